"""task=train: starts the ranks that compile the model and train it (moecompile.tasks.ranks.train)."""

from __future__ import annotations

from pathlib import Path

from moecompile.schema import Config
from moecompile.tasks.start import start_ranks


def run(config: Config, run_dir: Path) -> None:
    """Starts one process per rank, or runs in place if ranks exist already."""
    start_ranks(config, run_dir, max_restarts=config.trainer.max_restarts)
