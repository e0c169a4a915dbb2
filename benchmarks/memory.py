"""Memory of a training step beside what the plan says: peak bytes in the tensors of the fullest rank.

    python benchmarks/memory.py                          three recipes on 1, 2 and 4 ranks: docs/assets/memory.md
    python benchmarks/memory.py "mixtral_ep cpu_1x4"     one of them

Each row is a run of `task=bench` with evenly drawn experts (`routing.workload=balanced`), which is what a plan assumes;
how the peak is measured is in moecompile/bench/measure.py. Exits with 1 if a plan is off by more than 10%.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

TABLE = Path(__file__).parents[1] / "docs" / "assets" / "memory.md"
RECIPES, MESHES = ("deepseek_ep", "mixtral_ep", "switch_ep"), ("cpu_1", "cpu_1x2", "cpu_1x4")
MOST = 0.10


@dataclass(frozen=True, kw_only=True)
class Row:
    """Bytes of the fullest rank."""

    case: str
    planned: int
    measured: int

    @property
    def error(self) -> float:
        """Of the plan, relative."""
        return self.planned / self.measured - 1


def measured(cases: Sequence[str], folder: Path) -> list[Row]:
    """Runs `recipe mesh` of each case."""
    rows = []
    for case in cases:
        recipe, mesh = case.split()
        run = folder / case.replace(" ", "-")
        settings = [f"recipe={recipe}", f"mesh={mesh}", "routing.workload=balanced"]
        settings += ["bench.rounds=1", "bench.warmup=1", "bench.machine=false", f"hydra.run.dir={run}"]
        command = [sys.executable, "-m", "moecompile", "task=bench", *settings]
        subprocess.run(command, check=True, capture_output=True)
        step = json.loads((run / "bench.json").read_text())["step"]
        rows.append(Row(case=case, planned=step["planned_bytes"], measured=step["peak_bytes"]))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| recipe and mesh | planned | measured | off by |", "|---|---|---|---|"]
    for row in rows:
        sizes = f"{row.planned / 2**20:.1f} MiB | {row.measured / 2**20:.1f} MiB"
        lines.append(f"| `{row.case}` | {sizes} | {row.error:+.1%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints, and writes the table if all cases were measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[f"{recipe} {mesh}" for recipe in RECIPES for mesh in MESHES])
    cases = parser.parse_args().cases
    with TemporaryDirectory() as folder:
        rows = measured(cases, Path(folder))
    print(table(rows), end="")
    if len(rows) == len(RECIPES) * len(MESHES):
        TABLE.write_text(table(rows), encoding="utf-8")
    if worst := [row for row in rows if abs(row.error) > MOST]:
        sys.exit(f"{len(worst)} plans are off by more than {MOST:.0%}")


if __name__ == "__main__":
    main()
