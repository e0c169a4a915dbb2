"""Under load: is memory bounded, and is every token kept, when most tokens want the same experts?

    python benchmarks/soak.py                       # 200 steps on four ranks, zipf and hot: about four minutes
    python benchmarks/soak.py --steps 60 KEY=VALUE  # shorter, with other settings

Two dropless runs, one whose experts are drawn by a zipf law and one in which half of all tokens choose expert 0. Prints
the resident memory of every rank at steps 20, 40, ... and the assignments that were counted at the experts, against
tokens * top_k. Exits with 1 if memory grew by more than 2 % after step 20, or if an assignment was lost.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

WORKLOADS = ("zipf", "hot")
RANKS, FIRST, EVERY, MOST_GROWTH = 4, 20, 20, 0.02
SETTINGS = (
    "recipe=mixtral_ep", "mesh=cpu_2x2", "dispatch=flat", "routing.capacity_factor=null", "data.global_batch_size=8",
    "data.micro_batch_size=2", "data.val_batches=1", "trainer.log_interval=1", "trainer.save_interval=50",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs both workloads; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(arguments)
    bad = 0
    for workload in WORKLOADS:
        with tempfile.TemporaryDirectory() as folder:
            more = [f"trainer.max_steps={given.steps}", f"trainer.val_interval={given.steps}", *given.overrides]
            memory = soak(Path(folder), [*SETTINGS, f"routing.workload={workload}", *more])
            lost, counted = lost_assignments(Path(folder))
        growth = max(max(row[rank] for row in memory.values()) / memory[FIRST][rank] - 1 for rank in range(RANKS))
        print(f"{workload}: MiB of each rank")
        for step, row in memory.items():
            print(f"  step {step:4d}  " + "  ".join(f"{mib:7.1f}" for mib in row))
        print(f"  growth after step {FIRST}: {growth:.2%}   assignments lost: {lost} of {counted:,}", flush=True)
        bad += growth > MOST_GROWTH or lost != 0
    return 1 if bad else 0


def soak(run_dir: Path, overrides: list[str]) -> dict[int, list[float]]:
    """Step -> resident MiB of every rank, from `FIRST` on."""
    command = [sys.executable, "-m", "moecompile", *overrides, f"hydra.run.dir={run_dir}"]
    found = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            step = re.match(r"step (\d+)/", line)
            if step and int(step[1]) >= FIRST and int(step[1]) % EVERY == 0:
                found[int(step[1])] = [mib for _, mib in sorted(dict(resident(run_dir)).items())]
    if process.returncode:
        raise SystemExit(f"the run failed with exit code {process.returncode}")
    return found


def resident(run_dir: Path) -> Iterator[tuple[int, float]]:
    """(rank, resident MiB) of the ranks of a run."""
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            log = path.readlink()  # each rank holds its own
            if log.parent != run_dir.resolve() / "logs":
                continue
            pages = int((path.parents[1] / "statm").read_text().split()[1])
        except OSError:  # it has ended
            continue
        yield int(log.stem.removeprefix("rank_")), pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def lost_assignments(run_dir: Path) -> tuple[int, int]:
    """Assignments that no expert counted or that were dropped, and how many there were, over all layers and steps."""
    from moecompile.compose import load_resolved
    from moecompile.plan import load

    config, plan = load_resolved(run_dir / "resolved.yaml"), load(run_dir / "plan.yaml")
    tokens, lost, total = config.data.global_batch_size * config.data.seq_len, 0, 0
    with (run_dir / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("loss")]
    for layer in plan.layers:
        expected = tokens * layer.routing.top_k
        for row in rows:
            names = [name for name in row if name.startswith("load/") and f".{layer.site.fqn}." in name]
            drops = [name for name in row if name.startswith("drop_rate/") and f".{layer.site.fqn}." in name]
            assert names and len(drops) == 1
            counted = sum(int(float(row[name])) for name in names)
            lost += abs(expected - counted) + round(float(row[drops[0]]) * counted)
            total += expected
    return lost, total


if __name__ == "__main__":
    sys.exit(main())
