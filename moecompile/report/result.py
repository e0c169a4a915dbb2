"""Writes result.json: one flat JSON object per task (docs/use/command-line.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moecompile import clock
from moecompile.atomic import write_text
from moecompile.rundir import REPORT, RESULT
from moecompile.version import versions


def write_result(
    run_dir: Path, task: str, recipe: str, fields: Mapping[str, Any], *, status: str = "ok"
) -> dict[str, Any]:
    """Writes `run_dir`/result.json atomically; numbers that are not finite become null.

    Args:
        fields: results of the task. status: `ok`, `diverged` (`train`) or `failed`.

    Returns:
        the head (`task`, `recipe`, `status`, `seconds` so far, `report`) and `fields`; in the file, versions are
        between them.
    """
    head = {"task": task, "recipe": recipe, "status": status, "seconds": clock.seconds(), "report": REPORT}
    body = _finite({**head, "versions": versions(), **fields})
    write_text(run_dir / RESULT, json.dumps(body, indent=2, allow_nan=False) + "\n")
    return {**head, **fields}


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities replaced by None, which JSON can write."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
