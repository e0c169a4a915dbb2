"""The tasks. The command line calls `run`; each rank of a launched task calls `in_rank`."""

from __future__ import annotations

import importlib
from contextlib import suppress
from pathlib import Path

from moecompile import rundir, waiting
from moecompile.errors import RankFailure, VerificationFailed
from moecompile.report.page import try_report
from moecompile.report.result import write_result
from moecompile.runtime import slurm
from moecompile.runtime.in_place import is_leading
from moecompile.runtime.signals import Stopped
from moecompile.schema import Config, TaskName


def run(config: Config, run_dir: Path) -> int:
    """Runs `config.task`, in this process or on all ranks of the mesh, and returns the exit code."""
    name = config.task.name.value
    module = importlib.import_module(f"moecompile.tasks.{name}")
    was_pending = rundir.place(run_dir) != run_dir
    if not config.task.name.is_launched:
        waiting.done()
    try:
        module.run(config, run_dir)
    except Stopped as stopped:
        slurm.ask_for_requeue(config, stopped)
        raise
    except RankFailure as error:
        refused = is_leading() and rundir.is_discarded(run_dir, was_pending=was_pending)  # another rank refused the run
        with suppress(OSError):  # a full disk
            if not refused:
                write_result(rundir.place(run_dir), name, config.name, {"error": str(error)}, status="failed")
                try_report(rundir.place(run_dir), name)
        raise
    except VerificationFailed:
        try_report(run_dir, name)
        raise
    if config.task.name is not TaskName.submit:  # which has no results
        try_report(run_dir, name)
    return 0


def in_rank(config: Config, run_dir: Path) -> None:
    """Runs this rank's part of a launched task."""
    module = importlib.import_module(f"moecompile.tasks.ranks.{config.task.name.value}")
    waiting.done()
    module.run_rank(config, run_dir)
