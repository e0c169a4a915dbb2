"""For what the host waits in a training step on a GPU that is played by the CPU (host_gpu.py): op, caller, how often.

python tests/standin/waits.py recipe=mixtral_ep mesh=cpu_1x2 trainer.precision=bf16_mixed
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

STANDIN = Path(__file__).parent
STEPS = (8, 12)  # of two runs: what is done once, at the beginning or at the end, is in both


def per_step(arguments: list[str], folder: Path, *, timeout_s: float = 300) -> dict[tuple[str, str, str], float]:
    """(op, place of the call, place in moecompile) -> waits of rank 0 in a step, the most frequent first.

    Raises:
        CalledProcessError: a training failed.
    """
    seen = []
    for steps in STEPS:
        told = folder / f"waits-{steps}"
        words = [*arguments, "mesh.device=cuda", f"trainer.max_steps={steps}", "trainer.val_interval=1000"]
        subprocess.run(
            [sys.executable, "-m", "moecompile", *words, f"hydra.run.dir={folder / str(steps)}"], check=True,
            env={**os.environ, "PYTHONPATH": str(STANDIN), "MOECOMPILE_STANDIN_WAITS": str(told), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, timeout=timeout_s,
        )  # fmt: skip
        lines = told.with_name(f"{told.name}.0").read_text().splitlines()
        seen.append(Counter(tuple(line.split("\t")) for line in lines))
    fewer, more = seen
    return {key: count / (STEPS[1] - STEPS[0]) for key, count in (more - fewer).most_common()}


def main() -> None:
    """Prints a line for each."""
    with tempfile.TemporaryDirectory() as folder:
        for (op, place, ours), number in per_step(sys.argv[1:], Path(folder)).items():
            print(f"{number:6.1f}  {op:30}  {place}" + (f"  in {ours}" if ours != place else ""))


if __name__ == "__main__":
    main()
