"""The tasks. The command line calls `run`; each rank of a launched task calls `in_rank`."""

from __future__ import annotations

import importlib
from contextlib import suppress
from pathlib import Path

from moecompile import waiting
from moecompile.errors import RankFailure
from moecompile.report.result import write_result
from moecompile.rundir import is_discarded, place
from moecompile.runtime.in_place import is_leading
from moecompile.schema import Config


def run(config: Config, run_dir: Path) -> int:
    """Runs `config.task`, in this process or on all ranks of the mesh, and returns the exit code."""
    name = config.task.name.value
    module = importlib.import_module(f"moecompile.tasks.{name}")
    was_pending = place(run_dir) != run_dir
    if not hasattr(module, "run_rank"):
        waiting.done()
    try:
        module.run(config, run_dir)
    except RankFailure as error:
        refused = is_leading() and is_discarded(run_dir, was_pending=was_pending)  # another rank refused the run
        with suppress(OSError):  # a full disk
            if not refused:
                write_result(place(run_dir), name, config.name, {"error": str(error)}, status="failed")
        raise
    return 0


def in_rank(config: Config, run_dir: Path) -> None:
    """Runs this rank's part of a launched task."""
    module = importlib.import_module(f"moecompile.tasks.{config.task.name.value}")
    waiting.done()
    module.run_rank(config, run_dir)
