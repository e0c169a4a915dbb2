"""What evens out the load of experts, and what it costs: no rule, an auxiliary loss and a correction bias.

    python benchmarks/balance.py                    # nine runs in one process each: about ten minutes on one idle core
    python benchmarks/balance.py --sweep FOLDER     # from the jobs of an earlier call

Underneath is one multirun; everything is read from what its jobs leave behind. MaxVio = max(load) / mean(load) - 1 of a
layer and a step, as a mean over layers; `after` is a mean over the last tenth of the steps. Writes
docs/assets/balance.png and benchmarks/results/balance.json, and exits with 1 unless both rules end with MaxVio at least
four times lower than no rule, at a validation loss at most 1 % higher.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

REPOSITORY = Path(__file__).parents[1]
RULES = ("none", "aux", "bias")
SETTINGS = (
    "experts.num_routed=16", "routing.top_k=2", "routing.score=sigmoid", "balance.rate=0.01", "mesh=cpu_1",
    "data.global_batch_size=8", "data.micro_batch_size=8", "data.val_batches=20", "optimizer.lr=0.003",
    "trainer.max_steps=250", "trainer.val_interval=250", "trainer.log_interval=5", "trainer.progress_bar=false",
    "trainer.save_checkpoint=false",
)  # fmt: skip
LEAST_RATIO, MOST_LOSS = 4.0, 1.01

_WORDS = {"none": "no rule", "aux": "auxiliary loss", "bias": "correction bias"}
_LOOKS = {"none": ("#D55E00", "-"), "aux": ("#0072B2", "--"), "bias": ("#009E73", "-.")}


@dataclass(frozen=True)
class Run:
    """One job. curve: (step, MaxVio as a mean over layers), one a row of metrics.csv."""

    rule: str
    seed: int
    max_violation: float
    val_loss: float
    curve: tuple[tuple[int, float], ...]


def multirun(seeds: int, folder: Path) -> list[str]:
    """The command: one job for each rule and seed."""
    swept = [f"balance={','.join(RULES)}", f"seed={','.join(map(str, range(seeds)))}"]
    return [sys.executable, "-m", "moecompile", "-m", *swept, *SETTINGS, f"hydra.sweep.dir={folder}"]


def read(sweep: Path) -> list[Run]:
    """All jobs of a multirun, in their order; a job that failed is an error."""
    jobs = sorted((path for path in sweep.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    return [_read_job(job) for job in jobs]


def _read_job(job: Path) -> Run:
    config = yaml.safe_load((job / "resolved.yaml").read_text(encoding="utf-8"))
    result = json.loads((job / "result.json").read_text(encoding="utf-8"))
    if result["status"] != "ok":
        sys.exit(f"job {job} failed")
    with (job / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    layers = [column for column in rows[0] if column.startswith("max_violation/")]
    aux = bool(config["balance"]["losses"]["micro_batch"])
    return Run(
        rule="bias" if config["balance"]["rule"] == "bias" else "aux" if aux else "none",
        seed=config["seed"],
        max_violation=result["max_violation_mean_last"],
        val_loss=result["val_loss"],
        curve=tuple((int(row["step"]), fmean(float(row[layer]) for layer in layers)) for row in rows),
    )


def figures(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Per rule: means over the seeds, every seed's own figure, and how they compare with no rule."""
    found: dict[str, dict[str, Any]] = {}
    for rule in RULES:
        mine = [run for run in runs if run.rule == rule]
        found[rule] = {
            "max_violation": fmean(run.max_violation for run in mine),
            "val_loss": fmean(run.val_loss for run in mine),
            "seeds": {
                str(run.seed): {"max_violation": run.max_violation, "val_loss": run.val_loss} for run in mine
            },
        }  # fmt: skip
    for rule in RULES:
        found[rule]["times_lower"] = found["none"]["max_violation"] / found[rule]["max_violation"]
        found[rule]["loss_change"] = found[rule]["val_loss"] / found["none"]["val_loss"] - 1
    return found


def holds(found: dict[str, dict[str, Any]]) -> bool:
    """Whether both rules are as good as promised."""
    rules = [found[rule] for rule in RULES if rule != "none"]
    return all(rule["times_lower"] >= LEAST_RATIO and rule["loss_change"] <= MOST_LOSS - 1 for rule in rules)


def table(found: dict[str, dict[str, Any]]) -> str:
    """A Markdown table; in brackets the smallest and the largest of the seeds."""
    lines = [
        "| balance | MaxVio after | against no rule | validation loss | against no rule |",
        "|---|---|---|---|---|",
    ]
    for rule, row in found.items():
        violation, loss = _with_range(row, "max_violation", ".2f"), _with_range(row, "val_loss", ".3f")
        against = (
            ("", "") if rule == "none" else (f"{row['times_lower']:.1f} times lower", f"{row['loss_change']:+.1%}")
        )
        lines.append(f"| `{rule}`: {_WORDS[rule]} | {violation} | {against[0]} | {loss} | {against[1]} |")
    return "\n".join(lines) + "\n"


def _with_range(row: dict[str, Any], key: str, style: str) -> str:
    values = [seed[key] for seed in row["seeds"].values()]
    return f"{row[key]:{style}} ({min(values):{style}} to {max(values):{style}})"


def draw(runs: Sequence[Run], path: Path) -> None:
    """MaxVio over the steps, mean and range of the seeds, and the validation loss of every seed."""
    figure = Figure(figsize=(7.4, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    curves, losses = figure.subplots(1, 2, width_ratios=(2.2, 1))
    for place, rule in enumerate(RULES):
        mine = [run for run in runs if run.rule == rule]
        color, dash = _LOOKS[rule]
        steps = [step for step, _ in mine[0].curve]
        by_step = list(zip(*([value for _, value in run.curve] for run in mine), strict=True))
        curves.plot(steps, [fmean(values) for values in by_step], color=color, linestyle=dash, label=_WORDS[rule])
        curves.fill_between(
            steps, [min(v) for v in by_step], [max(v) for v in by_step], color=color, alpha=0.2, linewidth=0
        )
        loss = [run.val_loss for run in mine]
        losses.plot([place] * len(loss), loss, "o", color=color, markersize=4, alpha=0.6)
        losses.plot([place - 0.25, place + 0.25], [fmean(loss)] * 2, color=color, linewidth=2)
    curves.set_title("MaxVio, mean of layers", fontsize=9.5, loc="left")
    curves.set_xlabel("optimizer step", fontsize=9)
    curves.set_ylim(bottom=0)
    curves.legend(frameon=False, fontsize=8.5)
    losses.set_title("validation loss, nats per token", fontsize=9.5, loc="left")
    losses.set_xticks(range(len(RULES)), RULES)
    losses.set_xlim(-0.6, len(RULES) - 0.4)
    for axes in (curves, losses):
        axes.grid(color="#d9d9d9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8.5, length=3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sweep", type=Path, help="folder of an earlier multirun, which is not run again")
    parser.add_argument("--seeds", type=int, default=3, help="runs per rule")
    parser.add_argument("--out", type=Path, default=REPOSITORY, help="where docs/assets and benchmarks/results lie")
    arguments = parser.parse_args()
    sweep = arguments.sweep or Path("runs", "balance", f"{datetime.now():%Y-%m-%d-%H-%M-%S}").absolute()
    if not arguments.sweep:
        subprocess.run(multirun(arguments.seeds, sweep), check=True)
    runs = read(sweep)
    found = figures(runs)
    draw(runs, arguments.out / "docs" / "assets" / "balance.png")
    stored = arguments.out / "benchmarks" / "results" / "balance.json"
    stored.parent.mkdir(parents=True, exist_ok=True)
    settings = [f"balance={','.join(RULES)}", *SETTINGS]
    stored.write_text(json.dumps({"settings": settings, "rules": found}, indent=2) + "\n", encoding="utf-8")
    print(table(found))
    if not holds(found):
        print(f"not {LEAST_RATIO:g} times lower, or more than {MOST_LOSS - 1:.0%} more loss", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
