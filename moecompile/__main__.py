"""Entry point of `python -m moecompile` and of the console script `moecompile`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from moecompile import clock, waiting
from moecompile.runtime.ranks import in_place_ranks

if TYPE_CHECKING:
    from moecompile.schema import Config

_ON_RANKS = ("train", "verify", "bench")


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code.

    If torchrun or SLURM has started the ranks, only rank 0 runs it and prints; the others follow its orders.
    """
    ranks = in_place_ranks()
    if ranks is None:
        return _command_line()
    from moecompile.runtime import in_place

    return in_place.follow(ranks) if ranks.rank > 0 else in_place.lead(ranks, _command_line)


def _command_line() -> int:
    from moecompile import compose

    return compose.main(_run, _prepare, _check, _summarize)


def _prepare(config: Config, run_dir: Path) -> Config:
    from moecompile.checkpoint.resume import resumed
    from moecompile.planner.given import with_plan

    return resumed(with_plan(config), run_dir)


def _check(config: Config) -> None:
    from moecompile.tasks.inputs import check_inputs

    check_inputs(config)


def _summarize(sweep: Path) -> None:
    from moecompile.report.sweep import summarize

    summarize(sweep)


def _run(config: Config, run_dir: Path) -> int:
    clock.begin()
    world_size = config.mesh.num_nodes * config.mesh.ranks_per_node
    where = f" on {world_size} ranks" if config.task.name.value in _ON_RANKS and world_size > 1 else ""
    waiting.show(f"{config.name}: {config.task.name.value}{where}, loading torch")
    try:
        from moecompile import tasks  # imports torch, so only when needed

        return tasks.run(config, run_dir)
    finally:
        waiting.done()


def _terminated(number: int, frame: object) -> NoReturn:
    """Exits by an exception, as for Ctrl-C, so that files are closed and removed."""
    raise SystemExit(128 + number)


def console() -> NoReturn:
    """Runs the process. It ends with `os._exit`, because Python's shutdown with torch takes seconds."""
    signal.signal(signal.SIGTERM, _terminated)
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    console()
