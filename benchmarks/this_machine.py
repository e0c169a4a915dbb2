"""How well is the CPU time of a step on this machine predicted, from what task=bench measured with another recipe?

    python benchmarks/this_machine.py                 # a quarter of an hour on two cores that do nothing else

`task=bench recipe=mixtral_ep` on four ranks writes a `hardware` file. With it, `task=plan` predicts the steps of
mixtral_ep and deepseek_ep on one, two and four ranks, and task=bench measures them, three times in turn. In each round
the kinds of dispatch run on four ranks, beside the one that `dispatch=auto` takes with that file. Writes
results/this_machine.json and docs/assets/this_machine.md, and exits with 1 unless the predictions of deepseek_ep are
within 20% and the chosen dispatch is within 10% of the fastest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TABLE = ROOT / "benchmarks" / "results" / "this_machine.json", ROOT / "docs" / "assets" / "this_machine.md"
CALIBRATED, PREDICTED = "mixtral_ep", "deepseek_ep"
MESHES = {"cpu_1": 1, "cpu_1x2": 2, "cpu_1x4": 4}
KINDS = ("flat", "dedup", "allgather")
MOST_ERROR, MOST_SLOWER = 0.2, 1.1
WAITING = "waiting for a core"
STEP = ("task=bench", "bench.machine=false")


def ran(folder: Path, name: str, *overrides: str) -> Path:
    """The run directory of one job."""
    run_dir = folder / name
    command = [sys.executable, "-m", "moecompile", *overrides, f"hydra.run.dir={run_dir}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return run_dir


def step_of(run_dir: Path) -> dict[str, float]:
    """The step that task=bench measured."""
    step: dict[str, float] = json.loads((run_dir / "bench.json").read_text())["step"]
    return step


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds of CPU time by recipe and mesh, measured and predicted; of wall time by dispatch. Medians of rounds,
    because a shared machine is not equally fast all the time: each round calibrates, then measures everything."""
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    walls: dict[str, list[float]] = {kind: [] for kind in KINDS}
    chosen = set()
    for number in range(rounds):
        place = folder / str(number)
        calibration = ran(place, "calibration", "task=bench", f"recipe={CALIBRATED}", "mesh=cpu_1x4")
        machine = [f"--config-dir={calibration}", "hardware=this_machine"]
        for recipe, (mesh, ranks) in product((CALIBRATED, PREDICTED), MESHES.items()):
            words = [f"recipe={recipe}", f"mesh={mesh}"]
            found.setdefault((recipe, ranks), []).append(step(place / f"{recipe}-{mesh}", words, machine))
        four = [f"recipe={PREDICTED}", "mesh=cpu_1x4"]
        for kind in KINDS:
            walls[kind].append(step_of(ran(place, kind, *STEP, *four, f"dispatch={kind}"))["wall_ms"])
        plan = ran(place, "chosen", "task=plan", *four, "dispatch=auto", *machine)
        chosen |= {*json.loads((plan / "result.json").read_text())["dispatch"]}
    steps = [
        {"recipe": recipe, "ranks": ranks}
        | {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        | {"rounds": [row["predicted"] / row["measured"] for row in rows]}
        for (recipe, ranks), rows in found.items()
    ]
    return {"steps": steps, "wall": walls, "chosen": sorted(chosen)}


def step(folder: Path, words: list[str], machine: list[str]) -> dict[str, float]:
    """A step as it was measured and as the machine's file predicts it."""
    measured = step_of(ran(folder, "measured", *STEP, *words))
    plan = ran(folder, "plan", "task=plan", *words, *machine)
    parts = json.loads((plan / "result.json").read_text())["step_parts"]
    wall = 1e3 * sum(parts.values())
    return {
        "measured": measured["cpu_ms"], "predicted": wall - 1e3 * parts.get(WAITING, 0.0),
        "wall_measured": measured["wall_ms"], "wall_predicted": wall,
    }  # fmt: skip


def report(found: Mapping[str, Any]) -> str:
    """The table of the documentation."""
    lines = [
        "| recipe | ranks | CPU time, measured | predicted | | wall time, measured | predicted | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["steps"]:
        times = [
            f"{row[f'{kind}measured']:.0f} ms | {row[f'{kind}predicted']:.0f} ms | "
            f"{row[f'{kind}predicted'] / row[f'{kind}measured']:.2f}"
            for kind in ("", "wall_")
        ]
        lines.append(f"| `{row['recipe']}` | {row['ranks']} | {' | '.join(times)} |")
    walls = {kind: statistics.median(values) for kind, values in found["wall"].items()}
    shown = ", ".join(f"`{kind}` {wall:.0f} ms" for kind, wall in walls.items())
    chosen = ", ".join(f"`{kind}`" for kind in found["chosen"])
    alone = [ratio for row in found["steps"] if row["recipe"] == PREDICTED for ratio in row["rounds"]]
    lines += [
        "",
        f"Medians of {len(alone) // len(MESHES)} rounds. "
        f"One round alone predicted {min(alone):.2f} to {max(alone):.2f} of what was measured for `{PREDICTED}`.",
        "",
        f"A step of `{PREDICTED}` on four ranks, wall time: {shown}. `dispatch=auto` takes {chosen}.",
    ]
    return "\n".join(lines) + "\n"


def holds(found: Mapping[str, Any]) -> bool:
    """Whether the predictions and the choice are as good as they should be."""
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in found["steps"] if row["recipe"] == PREDICTED]
    walls = {kind: statistics.median(values) for kind, values in found["wall"].items()}
    return max(errors) <= MOST_ERROR and max(walls[kind] for kind in found["chosen"]) <= MOST_SLOWER * min(
        walls.values()
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), parser.parse_args().rounds)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    TABLE.write_text(report(found), encoding="utf-8")
    print(report(found))
    return 0 if holds(found) else 1


if __name__ == "__main__":
    sys.exit(main())
