"""A command line for the launcher's tests: `python -m tests.distributed.launcher_program WORLD_SIZE RUN_DIR...`.

As the real one does it: one run after the other; one message and the exit code of the error, on the one rank that has
the word.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from moecompile.errors import MoecompileError
from moecompile.runtime import external_launch
from moecompile.runtime.launch import launch
from moecompile.runtime.ranks import started_ranks


def main(world_size: int, run_dirs: list[Path]) -> int:
    """Launches the job in each directory."""
    for run_dir in run_dirs:
        run_dir.mkdir(parents=True, exist_ok=True)
        num_nodes = int(os.environ.get("MESH_NODES", "1"))
        try:
            launch(
                world_size, run_dir, module="tests.distributed.launched_job", threads=1,
                num_nodes=num_nodes,
            )  # fmt: skip
        except MoecompileError as error:
            if not error.reported:
                print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    external_launch.ANSWER_TIMEOUT_S = float(os.environ.get("ANSWER_TIMEOUT_S", external_launch.ANSWER_TIMEOUT_S))
    command_line = partial(main, int(sys.argv[1]), [Path(text) for text in sys.argv[2:]])
    ranks = started_ranks()
    if ranks is not None and ranks.rank > 0:
        external_launch.follow(ranks)
    if ranks is not None:
        external_launch.lead(ranks, command_line)
    external_launch.leave(command_line())
