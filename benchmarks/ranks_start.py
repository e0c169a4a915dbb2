"""How long a small job takes from the command line on 1, 2 and 4 ranks, and how much CPU time: nearly all is starting.

python benchmarks/ranks_start.py                       # this commit: a minute
python benchmarks/ranks_start.py --against REV         # beside another one, A B A B, with ratios

A job is `recipe=deepseek_ep` with two small layers and three steps. CPU time is that of all its processes. (Linux: this
program adopts the ranks that outlive their parents, and waits for them.)
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
MESHES = ("cpu_1", "cpu_1x2", "cpu_2x2")
JOB = (
    "recipe=deepseek_ep", "model.config.num_hidden_layers=2", "model.config.hidden_size=32", "data.vocab_size=300",
    "model.config.intermediate_size=80", "model.config.num_attention_heads=2", "model.config.num_key_value_heads=2",
    "data.seq_len=32", "data.micro_batch_size=2", "data.global_batch_size=8", "data.val_batches=2",
    "data.val_fraction=0.01", "trainer.max_steps=3",
)  # fmt: skip
_PR_SET_CHILD_SUBREAPER = 36


def seconds(tree: Path, mesh: str) -> tuple[float, float]:
    """(wall, CPU) seconds of one job of the package in `tree`; CPU of all its processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "moecompile", *JOB, f"mesh={mesh}", f"hydra.run.dir={folder}/run"]
        environ = {**os.environ, "PYTHONPATH": str(tree)}
        before, began = _cpu_seconds(), time.monotonic()
        subprocess.run(command, cwd=folder, env=environ, check=True, stdout=subprocess.DEVNULL)
        wall = time.monotonic() - began
        with suppress(ChildProcessError):
            while True:
                os.wait()
    return wall, _cpu_seconds() - before


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compared(trees: Sequence[Path], mesh: str, rounds: int) -> list[tuple[float, float]]:
    """For each tree the median (wall, CPU) seconds; they take turns."""
    found = [[seconds(tree, mesh) for tree in trees] for _ in range(rounds + 1)][1:]  # the first one fills caches
    return [tuple(map(statistics.median, zip(*each, strict=True))) for each in zip(*found, strict=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints one line a mesh."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(arguments)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory() as folder:
        trees = [REPOSITORY]
        if given.against is not None:
            trees.append(Path(folder, "tree"))
            subprocess.run(
                ["git", "worktree", "add", "--quiet", "--detach", trees[1], given.against], cwd=REPOSITORY, check=True
            )
        try:
            for mesh in MESHES:
                (wall, cpu), *others = compared(trees, mesh, given.rounds)
                line = f"{mesh:8} {wall:5.1f} s, {cpu:5.1f} s of CPU time"
                for there in others:
                    ratios = f"{wall / there[0]:.2f} and {cpu / there[1]:.2f}"
                    line += f"; there {there[0]:5.1f} s, {there[1]:5.1f} s: {ratios}"
                print(line, flush=True)
        finally:
            for tree in trees[1:]:
                subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=REPOSITORY, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
