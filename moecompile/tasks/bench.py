"""task=bench: starts the ranks that measure layers and steps (moecompile.tasks.ranks.bench)."""

from __future__ import annotations

import os
from pathlib import Path

from moecompile.schema import Config
from moecompile.tasks.start import start_ranks


def run(config: Config, run_dir: Path) -> None:
    """Starts one process per rank, or runs in place if ranks exist already."""
    # torch warns that its profiler does not see older memory freed, which bench/peak.py allows for.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    start_ranks(config, run_dir)
