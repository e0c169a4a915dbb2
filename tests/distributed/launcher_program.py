"""A command line for the launcher's tests: `python -m tests.distributed.launcher_program WORLD_SIZE RUN_DIR`.

As the real one does it: one message and the exit code of the error, on the one rank that has the word.
"""

from __future__ import annotations

import sys
from pathlib import Path

from moecompile.errors import MoecompileError
from moecompile.runtime.launch import agree_on_run_dir, launch, leave
from moecompile.runtime.ranks import in_place_ranks


def main() -> int:
    """Launches the job in RUN_DIR, or in a directory of rank 0's own if every rank computes another one."""
    ranks, run_dir = in_place_ranks(), Path(sys.argv[2])
    if ranks is not None:
        run_dir = agree_on_run_dir(ranks, run_dir / f"of_rank_{ranks.rank}")
        run_dir.mkdir(parents=True, exist_ok=True)
    try:
        launch(int(sys.argv[1]), run_dir, module="tests.distributed.launched_job", threads=1, timeout_s=60)
    except MoecompileError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    leave(main())
