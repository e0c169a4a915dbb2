"""The door: `python -m moecompile` and the console script `moecompile`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from moecompile import compose
from moecompile.runtime.ranks import Ranks, in_place_ranks

if TYPE_CHECKING:
    from moecompile.schema import Config

_RUN_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code."""
    ranks = in_place_ranks()
    return compose.main(_run, _prepare, _check) if ranks is None else _main_in_place(ranks)


def _main_in_place(ranks: Ranks) -> NoReturn:
    """One of many ranks that torchrun or SLURM started: each of them runs the whole command line.

    Rank 0 alone speaks and has a run directory, which the launcher tells the others; theirs, where Hydra insists on
    one, is temporary. All end at once, because gloo may abort the interpreter's own shutdown after success.
    """
    from moecompile.runtime.launch import leave, leave_silently

    if ranks.rank == 0:
        leave(compose.main(_run, _prepare, _check))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (for the life of the process)
    folder = tempfile.mkdtemp(prefix="moecompile-")
    mine = [argument for argument in sys.argv if argument.partition("=")[0] not in _RUN_FOLDERS]
    sys.argv = [*mine, *(f"{name}={folder}/run" for name in _RUN_FOLDERS)]
    code = compose.main(_run, _prepare, _check)
    shutil.rmtree(folder, ignore_errors=True)
    if code:
        leave_silently(code)
    leave(code)


def _prepare(config: Config, run_dir: Path) -> Config:
    from moecompile.checkpoint.resume import resumed

    return resumed(config, run_dir)


def _check(config: Config) -> None:
    from moecompile.inputs import check_inputs

    check_inputs(config)


def _run(config: Config, run_dir: Path) -> int:
    from moecompile import tasks  # torch: only once there is something to run

    return tasks.run(config, run_dir)


if __name__ == "__main__":
    sys.exit(main())
