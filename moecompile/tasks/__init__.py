"""The tasks, which the command line runs."""

from __future__ import annotations

import importlib
from contextlib import suppress
from pathlib import Path

from moecompile import rundir, waiting
from moecompile.errors import DoesNotFit, RankFailure, VerificationFailed
from moecompile.report.page import try_report
from moecompile.report.result import write_result
from moecompile.runtime import slurm
from moecompile.runtime.external_launch import is_leading
from moecompile.runtime.signals import Stopped
from moecompile.schema import Config, TaskName

_RUNS = {
    TaskName.train: "moecompile.tasks.launched:start_ranks",
    TaskName.bench: "moecompile.tasks.launched:start_ranks",
    TaskName.verify: "moecompile.tasks.verify:run",
    TaskName.compile: "moecompile.tasks.compile:run",
    TaskName.data: "moecompile.tasks.data:run",
    TaskName.chat: "moecompile.tasks.chat:run",
    TaskName.plan: "moecompile.tasks.plan:run",
    TaskName.search: "moecompile.tasks.search:run",
    TaskName.import_config: "moecompile.tasks.import_config:run",
    TaskName.rehearse: "moecompile.tasks.rehearse:run",
    TaskName.place: "moecompile.tasks.place:run",
    TaskName.export: "moecompile.tasks.export:run",
    TaskName.submit: "moecompile.runtime.slurm:submit",
}
"""The function of each task, (config, run directory); its module is imported when it is run."""


def run(config: Config, run_dir: Path) -> int:
    """Runs `config.task`, in this process or on all ranks of the mesh, and returns the exit code."""
    name = config.task.name.value
    module, _, function = _RUNS[config.task.name].partition(":")
    run_task = getattr(importlib.import_module(module), function)
    was_pending = rundir.output_dir(run_dir) != run_dir
    if not config.task.name.is_launched:
        waiting.done()
    try:
        run_task(config, run_dir)
    except Stopped as stopped:
        slurm.ask_for_requeue(config, stopped)
        raise
    except RankFailure as error:
        refused = is_leading() and rundir.is_discarded(run_dir, was_pending=was_pending)  # another rank refused the run
        with suppress(OSError):  # a full disk
            if not refused:
                write_result(rundir.output_dir(run_dir), name, config.name, {"error": str(error)}, status="failed")
                try_report(rundir.output_dir(run_dir), name)
        raise
    except (VerificationFailed, DoesNotFit):
        try_report(run_dir, name)
        raise
    if config.task.name not in (TaskName.submit, TaskName.chat):  # which have no results
        try_report(run_dir, name)
    return 0
