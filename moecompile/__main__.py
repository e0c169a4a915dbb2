"""The door: `python -m moecompile` and the console script `moecompile`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moecompile import compose

if TYPE_CHECKING:
    from moecompile.schema import Config


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code."""
    return compose.main(_run)


def _run(config: Config, run_dir: Path) -> int:
    from moecompile import tasks  # torch: only once there is something to run

    return tasks.run(config, run_dir)


if __name__ == "__main__":
    sys.exit(main())
