"""result.json: one flat JSON object a task (docs/use/command-line.md)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from moecompile.version import versions

REQUIRED = ("task", "recipe", "status", "seconds")


def write_result(run_dir: Path, result: dict[str, Any]) -> Path:
    """Writes `run_dir`/result.json in one step, with the versions added; numbers that are not finite become null.

    Args:
        result: `task`, `recipe`, `status` ("ok" or "failed"), `seconds`, and what the task found.

    Raises:
        ValueError: one of these four is missing.
    """
    missing = [name for name in REQUIRED if name not in result]
    if missing:
        raise ValueError(f"result.json needs {', '.join(missing)}")
    head = {name: result[name] for name in REQUIRED}
    body = _finite({**head, "versions": versions(), **result})
    path = run_dir / "result.json"
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps(body, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    tmp.replace(path)
    return path


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities replaced by None, which JSON can write."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
