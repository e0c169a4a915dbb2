"""A command line for the launcher's tests: `python -m tests.distributed.launcher_program WORLD_SIZE RUN_DIR...`.

As the real one does it: one run after the other; one message and the exit code of the error, on the one rank that has
the word.
"""

from __future__ import annotations

import sys
from pathlib import Path

from moecompile.errors import MoecompileError
from moecompile.runtime.launch import agree_on_run_dir, launch, leave
from moecompile.runtime.ranks import in_place_ranks


def main(world_size: int, run_dirs: list[Path]) -> int:
    """Launches the job in each directory, or in one of rank 0's own where every rank computes another one."""
    ranks = in_place_ranks()
    for given in run_dirs:
        run_dir = given if ranks is None else agree_on_run_dir(ranks, given / f"of_rank_{ranks.rank}")
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            launch(world_size, run_dir, module="tests.distributed.launched_job", threads=1, timeout_s=60)
        except MoecompileError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    leave(main(int(sys.argv[1]), [Path(text) for text in sys.argv[2:]]))
