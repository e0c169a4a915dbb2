"""Where does the layout that others published rank among all that fit, by the predicted time of a step?

    python benchmarks/search.py          # a minute; writes benchmarks/results/search.json and docs/assets/search.md
    python benchmarks/search.py --own    # ten minutes; results/full_size.json and docs/assets/full_size.md

Held as published: model, machine, GPUs, batch, sequence, precision, dispatcher, overlap, graphs and what is recomputed.
Searched: tp, pp, vpp, cp, ep, etp, ZeRO and the micro-batch, all that divide and fit into memory (planner/search). A
published layout that does not fit by our own estimate is ranked all the same, and that is said.

Four cases are rows of published.yaml; the layouts of the others, and their sources, are in published/search.yaml.

With `--own`: what this package runs beside the best that is described, with the same software and with a stack of 2026,
for five models. Each is two runs of `task=search`, whose directories are kept in runs/full_size and not made again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))

from forecast.runs import layout_of, machine, models, read, read_runs  # noqa: E402

from moecompile.planner.cost_model.forecast import step_of  # noqa: E402
from moecompile.planner.cost_model.inputs import Inputs, Software  # noqa: E402
from moecompile.planner.search.described import described, memory_of, space_of  # noqa: E402
from moecompile.planner.search.found import Rejected  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "search.json"
MARKDOWN = REPOSITORY / "docs" / "assets" / "search.md"
TOP, NEAR, WANTED = 1.0, 10.0, 6  # percent of candidates, percent of the best time, cases
GIB = 2**30
SIZES = ("tp", "pp", "vpp", "cp", "ep", "etp", "zero", "micro_batch")


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One case. rank: candidates that are faster, plus one. top, behind: percent of candidates, of the best time."""

    name: str
    published: str
    best: str
    candidates: int
    considered: int
    rank: int
    top: float
    seconds: float
    best_seconds: float
    behind: float
    memory_gib: float
    fits: bool
    cpu_seconds: float

    @property
    def holds(self) -> bool:
        """Whether it is in the top 1% and within 10% of the best."""
        return self.top <= TOP and self.behind <= NEAR


def cases() -> dict[str, Inputs]:
    """Name -> the published case."""
    data = read("search.yaml")
    rows = {run.id: run for run in read_runs()[0]}
    found = {row["name"]: described_case(row) for row in data["rows"]}
    for entry in data["cases"]:
        if "row" in entry:
            run = rows[entry["row"]]
            found[entry["name"]] = Inputs(
                model=run.model, layout=run.layout, machine=run.machine, software=run.software
            )
    return {
        entry["name"]: replace(
            found[entry["name"]], software=replace(found[entry["name"]].software, **entry.get("software", {}))
        )
        for entry in data["cases"]
    }


def described_case(row: dict[str, Any]) -> Inputs:
    """The case of a row of search.yaml."""
    software = {**row["software"], "recompute": tuple(row["software"].get("recompute", ()))}
    model = models()[row["model"]]
    layout, _ = layout_of(row, model)
    return Inputs(model=model, layout=layout, machine=machine(row["system"]), software=Software(**software))


def ranked(name: str, case: Inputs) -> Ranked:
    """Where the published layout stands."""
    start, rejected = time.process_time(), Rejected()
    space = space_of(case, case.layout.global_batch)
    limit = case.machine.capacity
    found = sorted(described(case, space, limit, rejected), key=lambda each: each.seconds)
    spent = time.process_time() - start
    seconds = sum(step_of(case).values())
    needed = sum(memory_of(case).values())
    faster = sum(each.seconds < seconds for each in found)
    best = found[0]
    return Ranked(
        name=name, published=text(case.layout), best=text(best.layout), candidates=len(found),
        considered=len(found) + rejected.total, rank=faster + 1, top=100 * (faster + 1) / len(found), seconds=seconds,
        best_seconds=best.seconds, behind=100 * (seconds / best.seconds - 1), memory_gib=needed / GIB,
        fits=needed <= limit, cpu_seconds=spent,
    )  # fmt: skip


def text(layout: Any) -> str:
    """The sizes that are not 1."""
    shown = {name: getattr(layout, name) for name in SIZES if getattr(layout, name) != 1 or name == "zero"}
    return " ".join(f"{'mbs' if name == 'micro_batch' else name}={value}" for name, value in shown.items())


def table(rows: Sequence[Ranked]) -> str:
    """The table of the docs."""
    lines = [
        "| case | published layout | fits | rank | behind the best | fastest that fits |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        fits = f"{row.memory_gib:.0f} GiB" + ("" if row.fits else ", does not")
        rank = f"{row.rank:,} of {row.candidates:,}, top {row.top:.1f}%"
        lines.append(f"| {row.name} | {row.published} | {fits} | {rank} | {row.behind:.1f}% | {row.best} |")
    held = sum(row.holds for row in rows)
    lines += ["", f"In the top {TOP:.0f}% and within {NEAR:.0f}% of the best: {held} of {len(rows)} (bar: {WANTED})."]
    return "\n".join(lines) + "\n"


OWN_RESULTS, OWN_MARKDOWN = RESULTS.with_name("full_size.json"), MARKDOWN.with_name("full_size.md")
# model, ranks -> its layout, and the stack of what is described
FIVE: dict[str, tuple[tuple[str, ...], str]] = {
    "gpt-oss-120b, 64 H100": (
        ("model=gpt_oss_120b", "model.attention=flex_attention", "mesh=h100_2x8", "mesh.num_nodes=8"), "megatron_2026",
    ),
    "Qwen3-30B-A3B, 16 H100": (("model=qwen3_30b_a3b", "mesh=h100_2x8"), "megatron_2026"),
    "Mixtral 8x22B, 128 H100, ep 8": (
        ("model=mixtral_8x22b", "mesh=h100_2x8", "mesh.num_nodes=16", "mesh.ep=8"), "megatron_2026",
    ),
    "Qwen3-235B, 256 H100": (("model=qwen3_235b_a22b", "mesh=h100_2x8", "mesh.num_nodes=32"), "megatron_2026"),
    "DeepSeek-V3, 2,048 H800": (("model=deepseek_v3", "mesh=h800_256x8"), "deepseek_v3"),
}  # fmt: skip


def own() -> None:
    """Writes what runs beside what is described: predicted tokens/s of a rank."""
    found = {}
    for name, (overrides, stack) in FIVE.items():
        runs, same = _searched(name, "ours", overrides)
        _, theirs = _searched(name, stack, (*overrides, f"stack={stack}"))
        found[name] = {"runs": runs, "same software": same, stack: theirs}
    OWN_RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    lines = [
        "| case | runs | described, same software | described, stack of 2026 |",
        "|---|---|---|---|",
    ]
    for name, row in found.items():
        runs, *others = row.values()
        ratios = [f"{each:,.0f} ({each / runs:.2f} x)" for each in others]
        lines.append(f"| {name} | {runs:,.0f} | {' | '.join(ratios)} |")
    OWN_MARKDOWN.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(OWN_MARKDOWN.read_text(encoding="utf-8"))


def _searched(name: str, kind: str, overrides: Sequence[str]) -> tuple[float, float]:
    """Tokens/s of a rank: of the best layout that runs, and of the best that is described."""
    folder = REPOSITORY / "runs" / "full_size" / f"{name.split(',', maxsplit=1)[0]}.{kind}"
    result = folder / "result.json"
    if not result.is_file():
        command = [sys.executable, "-m", "moecompile", "task=search", *overrides, f"hydra.run.dir={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    body = json.loads(result.read_text(encoding="utf-8"))
    speed = "tokens_per_second_per_rank"
    return float(body["best"][speed]), max(float(each[speed]) for each in body["described_front"])


def main() -> None:
    """The program."""
    if sys.argv[1:] == ["--own"]:
        own()
        return
    rows = [ranked(name, case) for name, case in cases().items()]
    RESULTS.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    MARKDOWN.write_text(table(rows), encoding="utf-8")
    print(MARKDOWN.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
