"""Memory of a training step beside what the plan says: peak bytes in the tensors of the fullest rank.

    python benchmarks/memory.py                          three recipes on 1, 2 and 4 ranks: docs/assets/memory.md
    python benchmarks/memory.py "mixtral_ep cpu_1x4"     one of them
    python benchmarks/memory.py --budget                 checkpointing=budget in less memory: docs/assets/budget.md

Each row is a run of `task=bench` with evenly drawn experts (`routing.workload=balanced`), which is what a plan assumes;
how the peak is measured is in moecompile/bench/measure.py. Exits with 1 if a plan is off by more than 10%.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from moecompile.plan import read

TABLE = Path(__file__).parents[1] / "docs" / "assets" / "memory.md"
BUDGET_TABLE = TABLE.with_name("budget.md")
BUDGETS = {
    "deepseek_ep cpu_1": (0.125, 0.108, 0.102), "mixtral_ep cpu_1": (0.115, 0.1), "deepseek_ep cpu_1x2": (0.09, 0.08),
}  # fmt: skip
"""Recipe and mesh -> GiB of a rank, all less than what it needs with nothing computed again."""
RECIPES, MESHES = ("deepseek_ep", "mixtral_ep", "switch_ep"), ("cpu_1", "cpu_1x2", "cpu_1x4")
MOST = 0.10


@dataclass(frozen=True, kw_only=True)
class Row:
    """Bytes of the fullest rank. again: what backward computes again."""

    case: str
    planned: int
    measured: int
    again: str = ""

    @property
    def error(self) -> float:
        """Of the plan, relative."""
        return self.planned / self.measured - 1


def new_python(*words: str) -> None:
    """`python WORDS`."""
    subprocess.run([sys.executable, *words], check=True, capture_output=True)


def measured(cases: Sequence[str], folder: Path, python: Callable[..., object] = new_python) -> list[Row]:
    """Runs `recipe mesh` of each case, or `recipe mesh GIB` with a budget."""
    rows = []
    for case in cases:
        recipe, mesh, *memory = case.split()
        run = folder / case.replace(" ", "-")
        settings = [f"recipe={recipe}", f"mesh={mesh}", "routing.workload=balanced"]
        settings += ["trainer.checkpointing=budget", f"hardware.memory_gib={memory[0]}"] if memory else []
        settings += ["bench.rounds=1", "bench.warmup=1", "bench.machine=false", f"hydra.run.dir={run}"]
        python("-m", "moecompile", "task=bench", *settings)
        step = json.loads((run / "bench.json").read_text())["step"]
        again = "; ".join(
            f"{', '.join(each.parts)}{' and exchanges' * each.sends} of {len(each.layers)}"
            for each in read(run / "plan.yaml").recomputed
        )
        rows.append(Row(case=case, planned=step["planned_bytes"], measured=step["peak_bytes"], again=again))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| recipe and mesh | planned | measured | off by |", "|---|---|---|---|"]
    for row in rows:
        sizes = f"{row.planned / 2**20:.1f} MiB | {row.measured / 2**20:.1f} MiB"
        lines.append(f"| `{row.case}` | {sizes} | {row.error:+.1%} |")
    return "\n".join(lines) + "\n"


def budget_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| recipe and mesh | memory | computed again, layers | planned | measured | off by |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        recipe, mesh, memory = row.case.split()
        sizes = f"{row.planned / 2**20:.1f} MiB | {row.measured / 2**20:.1f} MiB"
        lines.append(
            f"| `{recipe} {mesh}` | {float(memory) * 1024:.0f} MiB | {row.again} | {sizes} | {row.error:+.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints, and writes the table if all cases were measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[f"{recipe} {mesh}" for recipe in RECIPES for mesh in MESHES])
    parser.add_argument("--budget", action="store_true", help="trainer.checkpointing=budget in less memory")
    given = parser.parse_args()
    cases = [f"{case} {gib}" for case, each in BUDGETS.items() for gib in each] if given.budget else given.cases
    with TemporaryDirectory() as folder:
        rows = measured(cases, Path(folder))
    text = budget_table(rows) if given.budget else table(rows)
    print(text, end="")
    if given.budget:
        BUDGET_TABLE.write_text(text, encoding="utf-8")
    elif len(rows) == len(RECIPES) * len(MESHES):
        TABLE.write_text(text, encoding="utf-8")
    if worst := [row for row in rows if abs(row.error) > MOST]:
        sys.exit(f"{len(worst)} plans are off by more than {MOST:.0%}")


if __name__ == "__main__":
    main()
