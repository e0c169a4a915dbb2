"""The tasks. `run` is what the command line calls; `in_rank` is what each rank of a launched task calls."""

from __future__ import annotations

import importlib
from pathlib import Path

from moecompile.schema import Config


def run(config: Config, run_dir: Path) -> int:
    """Runs `config.task`, in this process or on all ranks of the mesh, and returns the exit code."""
    name = config.task.name.value
    module = importlib.import_module(f"moecompile.tasks.{name}")
    module.run(config, run_dir)
    return 0


def in_rank(config: Config, run_dir: Path) -> None:
    """This rank's part of a launched task."""
    importlib.import_module(f"moecompile.tasks.{config.task.name.value}").run_rank(config, run_dir)
