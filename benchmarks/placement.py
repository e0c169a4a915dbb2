"""Placed experts: rows of the fullest rank on skewed runs, before and after, measured on four ranks.

    python benchmarks/placement.py                # about four minutes on two quiet cores

For each kind of skew: a run with experts in the order of their ids; `task=place` from its loads; a run that goes on
from its checkpoint with the placement. Rows are what ranks computed in the last steps of each run
(`step_profile.json`); those of the second one the placement has not seen.

zipf    `routing.workload=zipf`: the same experts are popular in every step, and have neighbouring ids
router  the model's own choice without a balance rule

Writes benchmarks/results/placement.json and docs/assets/placement.txt, and exits with 1 unless the fullest rank gets
lighter in every layer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "placement.json"
PAGE = REPOSITORY / "docs" / "assets" / "placement.txt"
KINDS = {"zipf": ["routing.workload=zipf", "routing.skew=0.6"], "router": ["optimizer.lr=0.003"]}
SETTINGS = [
    "recipe=deepseek_ep", "mesh=cpu_1x4", "dispatch=dedup", "balance=none", "model.config.num_hidden_layers=3",
    "trainer.log_interval=1", "trainer.progress_bar=false", "data.val_batches=1",
]  # fmt: skip


def measure(steps: int, folder: Path, settings: list[str]) -> list[dict[str, Any]]:
    """One entry for each kind and layer: rows of the fullest rank over the mean, and of each rank, before and after."""
    found = []
    for kind, overrides in KINDS.items():
        first, placed, second = (folder / f"{kind}_{name}" for name in ("first", "placed", "second"))
        common = [*SETTINGS, *overrides, *settings]
        _run([*common, f"trainer.max_steps={steps}", f"hydra.run.dir={first}"])
        _run(["task=place", f"place.run={first}", f"place.steps={steps // 2}", f"hydra.run.dir={placed}"])
        more = [f"trainer.max_steps={steps + steps // 2}", f"trainer.resume={first}/checkpoints/step-{steps}"]
        _run([*common, *more, f"mesh.placement={placed}", f"hydra.run.dir={second}"])
        before, after = (json.loads((run / "step_profile.json").read_text()) for run in (first, second))
        for i, layer in enumerate(before["layers"]):
            rows = {name: profile["rows"][i] for name, profile in (("before", before), ("after", after))}
            found.append({"kind": kind, "layer": layer, **rows})
    return found


def _run(overrides: list[str]) -> None:
    command = [sys.executable, "-m", "moecompile", *overrides]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{run.stdout[-2000:]}{run.stderr[-2000:]}")


def over_mean(rows: list[float]) -> float:
    """Rows of the fullest rank over the mean."""
    return max(rows) * len(rows) / sum(rows)


def holds(found: list[dict[str, Any]]) -> bool:
    """Whether the fullest rank got lighter everywhere."""
    return bool(found) and all(over_mean(row["after"]) < over_mean(row["before"]) for row in found)


def report(found: list[dict[str, Any]]) -> str:
    """One line for each kind and layer."""
    lines = [f"{'rows of the fullest rank over the mean':<40}{'by id':>8}{'placed':>8}"]
    for row in found:
        name = f"{row['kind']}, {row['layer']}"
        lines.append(f"{name:<40}{over_mean(row['before']):>8.3f}{over_mean(row['after']):>8.3f}")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of the first run; the second makes half as many more")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.steps, Path(folder), [])
    print(report(found))
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    PAGE.write_text(report(found) + "\n")
    sys.exit(0 if holds(found) else 1)


if __name__ == "__main__":
    main()
