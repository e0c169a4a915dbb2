"""task=bench: starts the ranks that measure layers and steps (moecompile.tasks.ranks.bench)."""

from __future__ import annotations

from pathlib import Path

from moecompile.schema import Config
from moecompile.tasks.start import start_ranks


def run(config: Config, run_dir: Path) -> None:
    """Starts one process per rank, or runs in place if ranks exist already."""
    start_ranks(config, run_dir)
