"""One rank of a task, started by `runtime.launch`."""

from __future__ import annotations

import os
from pathlib import Path

from moecompile import waiting
from moecompile.rundir import place


def main(run_dir: Path) -> None:
    """Runs the task of the resolved config in `run_dir`."""
    if os.environ.get("RANK") == "0":
        waiting.show("loading torch", line=False)
    from moecompile.compose import load_resolved
    from moecompile.named_code import VARIABLE, from_launcher
    from moecompile.tasks import in_rank

    named = from_launcher(os.environ.get(VARIABLE))
    in_rank(load_resolved(place(run_dir) / "resolved.yaml", named=named), run_dir)
