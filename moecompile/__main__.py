"""Entry point of `python -m moecompile` and of the console script `moecompile`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from moecompile import clock, hub_kernels, waiting
from moecompile.errors import RankFailure
from moecompile.rundir import OVERRIDES, output_dir
from moecompile.runtime.logs import outlive_readers
from moecompile.runtime.ranks import started_ranks

if TYPE_CHECKING:
    from moecompile.schema import Config


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code.

    If torchrun or SLURM has started the ranks, only rank 0 runs it and prints; the others follow its commands.
    """
    ranks = started_ranks()
    hub_kernels.switch_off(told=ranks is None or ranks.rank == 0)
    if ranks is None:
        return _command_line()
    from moecompile.runtime import external_launch

    return external_launch.follow(ranks) if ranks.rank > 0 else external_launch.lead(ranks, _command_line)


def _command_line() -> int:
    from moecompile import compose

    code = compose.main(_run, _prepare, _check, _summarize)
    from moecompile.runtime.slurm import wait_for_jobs

    try:
        wait_for_jobs()  # here the run directory is free for the job
    except KeyboardInterrupt:
        return 130
    except RankFailure as error:
        code = compose.report(error, debug=False)
    return code


def _prepare(config: Config, run_dir: Path) -> Config:
    from moecompile.checkpoint.resume import resumed
    from moecompile.planner.given import with_plan
    from moecompile.planner.placement import with_placement
    from moecompile.schema import SEARCHED, TaskName, of_the_job

    if config.task.name is TaskName.import_config:
        from moecompile.imports.composed import with_import

        words = (output_dir(run_dir) / OVERRIDES).read_text(encoding="utf-8").splitlines()
        return with_import(config, words)
    if config.task.name is TaskName.submit:  # what its job would refuse is refused before it waits
        resumed(_with_epochs(with_plan(with_placement(of_the_job(config)))), run_dir)
        return config
    from moecompile.tasks.inputs import check_packages

    check_packages(config)  # before files are read
    config = _with_epochs(with_plan(with_placement(config)))
    if config.mesh.ep == SEARCHED and config.task.name is not TaskName.search:
        from moecompile.tasks.layout import with_layout  # imports torch

        config = with_layout(config)
    return resumed(config, run_dir)


def _with_epochs(config: Config) -> Config:
    if config.data.epochs is None:
        return config
    waiting.show(f"{config.name}: reading the data, for the steps of data.epochs")
    from moecompile.tasks.data import with_epochs  # imports torch

    try:
        return with_epochs(config)
    finally:
        waiting.done()


def _check(config: Config) -> None:
    from moecompile.runtime.external_launch import check_started

    if config.task.name.value in ("train", "bench"):  # verify has a smaller mesh
        check_started(config.mesh.num_nodes, config.mesh.ranks_per_node)
    if config.task.name.is_launched:
        from moecompile.tasks.launched import prepare_ranks

        prepare_ranks(config)
    from moecompile.tasks.inputs import check_inputs

    check_inputs(config)


def _summarize(sweep: Path) -> None:
    from moecompile.report.sweep import summarize
    from moecompile.runtime.slurm import has_results, wait_for_jobs

    if not has_results():
        return
    try:
        wait_for_jobs()
    finally:
        summarize(sweep)


def _run(config: Config, run_dir: Path) -> int:
    clock.begin()
    world_size = config.mesh.num_nodes * config.mesh.ranks_per_node
    where = f" on {world_size} ranks" if config.task.name.is_launched and world_size > 1 else ""
    if config.task.name.value != "submit":
        is_quiet = config.task.name.value == "chat"  # what it prints is an answer
        waiting.show(f"{config.name}: {config.task.name.value}{where}, loading torch", line=not is_quiet)
    try:
        from moecompile import tasks

        return tasks.run(config, run_dir)
    finally:
        waiting.done()


def _terminated(number: int, frame: object) -> NoReturn:
    """Exits by an exception, as for Ctrl-C, so that files are closed and removed."""
    raise SystemExit(128 + number)


def console() -> NoReturn:
    """Runs the process. It ends with `os._exit`, because Python's shutdown with torch takes seconds."""
    outlive_readers()
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a batch system's warning; ranks that train answer it
    code = main()
    from moecompile.runtime.slurm import requeue_if_asked

    if (told := requeue_if_asked()) is not None:
        print(told, flush=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    console()
