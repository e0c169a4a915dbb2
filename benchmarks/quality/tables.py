"""Tables and pictures of what `run.py` has left, complete or not.

    python benchmarks/quality/tables.py                 # writes docs/assets/quality, and says what is missing

Every comparison is paired: two arms of one size, domain and seed, which began with the same weights of a parent and saw
the same windows in the same order. A difference is arm - other of validation losses in nats per token: below 0 the arm
is better. Intervals are Student's t over the seeds, 95 %.

Equal tokens: both at their last step. Equal FLOPs: both at the FLOPs, by plan, at which the first of them ends; between
two validations the loss is a line over log FLOPs. Compute multiplier: FLOPs of the other over those of the arm at one
loss, the higher one of their ends, which both have reached. FLOPs are those after the parent; against an arm from
scratch, with those of the parent.
"""

from __future__ import annotations

import argparse
import itertools
import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # modules are named quality.*

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from quality import study
from quality.study import ARMS, DOMAINS, LEAST_ROUNDING, ROUNDED_ON_THE_WIRE, ROWS, SEQ, SHAPES, OtherSettings, Unit

Results = Mapping[Unit, Mapping[str, Any]]
ASSETS = study.REPOSITORY / "docs" / "assets" / "quality"
PAIRS = [(arm, "dense") for arm in ARMS if arm != "dense"] + [
    ("virtual", "copies"), ("drop", "copies"), ("even", "copies"),
    ("widened", "moe"), ("copies", "scratch"), ("widened", "scratch"), ("scratch", "dense_scratch"),
]  # fmt: skip
"""(arm, other)."""
FAMILY = [(arm, "dense") for arm in ARMS if arm not in ("dense", *study.DECLARED_LATER)]
"""The main outcomes, whose p-values are adjusted, in both sizes of the first study."""

# -- statistics -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """Mean over n seeds with a 95 % interval of Student's t; p: two-sided, of a mean of 0. One seed: no interval."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Of paired differences, one a seed."""
    mean, n = fmean(values), len(values)
    if n < 2:
        return Interval(mean, -math.inf, math.inf, math.nan, n)
    error = stdev(values) / math.sqrt(n)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else 0.0
    return Interval(mean, mean - half, mean + half, p, n)


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the given order."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted


# -- curves ---------------------------------------------------------------------------------------------------------

Curve = list[tuple[float, float]]  # (FLOPs, nats), increasing FLOPs; the first point of a new model has 0 FLOPs


def curve_of(result: Mapping[str, Any], before: float = 0.0) -> Curve:
    """Validation over FLOPs by plan. before: FLOPs of the parent."""
    per_token = result["flops_per_token"]["plan"]
    return [(before + point["tokens"] * per_token, point["val"]) for point in result["curve"]]


def loss_at(curve: Curve, flops: float) -> float:
    """The loss at some FLOPs within the curve, or at its end, on a line over log FLOPs."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 <= flops <= x1:
            if x0 <= 0:
                return y1 if flops == x1 else y0
            return y0 + (y1 - y0) * math.log(flops / x0) / math.log(x1 / x0)
    if flops > curve[-1][0]:
        return curve[-1][1]
    raise ValueError(f"{flops:g} FLOPs are before a curve that begins at {curve[0][0]:g}")


def flops_at(curve: Curve, loss: float) -> float | None:
    """The first FLOPs at which a curve is down to a loss; None: it never is."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 <= loss < y0 and x0 > 0:
            return float(x0 * (x1 / x0) ** ((y0 - loss) / (y0 - y1)))
        if y1 <= loss:
            return x1
    return None


def multiplier(arm: Curve, other: Curve) -> float | None:
    """FLOPs of the other over those of the arm at one loss: above 1 the arm needs less."""
    loss = max(arm[-1][1], other[-1][1])
    ours, theirs = flops_at(arm, loss), flops_at(other, loss)
    return None if ours is None or theirs is None else theirs / ours


# -- pairs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two arms of one seed. Curves are over comparable FLOPs. per_byte: the difference at equal tokens."""

    seed: int
    tokens: float
    flops: float
    per_byte: float
    multiplier: float | None


def pairs(results: Results, size: str, domain: str, arm: str, other: str) -> list[Pair]:
    """All pairs that are there. Arms from the same parent began with the same weights of it, else they are no pair."""
    found = []
    for seed in study.SEEDS:
        ours, theirs = (results.get(_unit(size, domain, name, seed)) for name in (arm, other))
        if ours is None or theirs is None or not _are_paired(arm, other, ours, theirs):
            continue
        whole = not {arm, other}.isdisjoint(study.FROM_SCRATCH)
        parts = [_before(results, size, domain, name) if whole else 0.0 for name in (arm, other)]
        if None in parts:
            continue
        a, b = (curve_of(result, before or 0.0) for result, before in zip((ours, theirs), parts, strict=True))
        last, end = [result["curve"][-1] for result in (ours, theirs)], min(a[-1][0], b[-1][0])
        found.append(
            Pair(
                seed, last[0]["val"] - last[1]["val"], loss_at(a, end) - loss_at(b, end),
                last[0]["val_per_byte"] - last[1]["val_per_byte"], multiplier(a, b),
            )
        )  # fmt: skip
    return found


def _unit(size: str, domain: str, arm: str, seed: int | None) -> Unit:
    return Unit("real" if size == study.REAL else "quality", size, domain, arm, seed)


def _are_paired(arm: str, other: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    same_parent = study.BASES.get(arm) != study.BASES.get(other) or ours["parent_hash"] == theirs["parent_hash"]
    one_is_longer = (arm in study.FROM_SCRATCH) != (other in study.FROM_SCRATCH)
    same_data = one_is_longer or ours["order_sha256"] == theirs["order_sha256"]
    return bool(same_parent and same_data and ours["text_sha256"] == theirs["text_sha256"])


def _before(results: Results, size: str, domain: str, arm: str) -> float | None:
    """FLOPs of the parent of an arm, 0 without one (those of SmolLM2 are unknown); None: its result is not there."""
    if _unit(size, domain, arm, 0).parent is None:
        return 0.0
    parent = results.get(_unit(size, domain, study.BASES[arm], None))
    return None if parent is None else SHAPES[size].parent_steps * ROWS * SEQ * parent["flops_per_token"]["plan"]


def cells(results: Results) -> list[tuple[str, str]]:
    """(size, domain) of which there is an arm."""
    there = {(unit.size, unit.domain) for unit in results if unit.seed is not None}
    return [(size, domain) for size in SHAPES for domain in DOMAINS if (size, domain) in there]


def of_quality(folder: Path = study.CURVES) -> Results:
    """What there is of the first study and of the real model, which share tables and pictures."""
    return study.read_all("quality", folder) | study.read_all("real", folder)


# -- tables: one a question -----------------------------------------------------------------------------------------


def losses(results: Results) -> str:
    """Is it better than dense, at equal tokens and at equal FLOPs?"""
    rows, family = [], []
    for size, domain in cells(results):
        for arm, other in PAIRS:
            if not (there := pairs(results, size, domain, arm, other)):
                continue
            tokens, flops = interval([p.tokens for p in there]), interval([p.flops for p in there])
            row = [size, domain, f"{arm} - {other}", _shown(tokens), _shown(flops),
                   f"{fmean(p.per_byte for p in there):+.4f}", "", _verdict(flops), str(len(there))]  # fmt: skip
            rows.append(row)
            if (arm, other) in FAMILY and size != study.REAL and flops.n > 1:
                family.append((row, flops.p))
    for (row, _), p in zip(family, holm([p for _, p in family]), strict=True):
        row[6] = f"{p:.3f}"
    head = ["size", "domain", "difference of", "nats at equal tokens", "nats at equal FLOPs", "per byte",
            "p (Holm)", "at equal FLOPs", "seeds"]  # fmt: skip
    return _table(head, rows)


def multipliers(results: Results) -> str:
    """How many times fewer FLOPs does it need?"""
    rows = []
    for size, domain in cells(results):
        for arm, other in PAIRS:
            there = [p.multiplier for p in pairs(results, size, domain, arm, other) if p.multiplier]
            if there:
                found = interval([math.log(value) for value in there])
                low, high = (math.exp(min(value, 99.0)) for value in (found.low, found.high))
                text = f"{math.exp(found.mean):.2f}" + (f" ({low:.2f} to {high:.2f})" if found.n > 1 else "")
                rows.append([size, domain, f"{arm} against {other}", text, str(found.n)])
    return _table(["size", "domain", "arm", "compute multiplier, geometric mean", "seeds"], rows)


def routing(results: Results) -> str:
    """How even are the experts, and what do they tell apart?"""
    rows = []
    for size, domain in cells(results):
        for arm in ARMS:
            there = [
                r["routing"]
                for u, r in results.items()
                if (u.size, u.domain, u.arm) == (size, domain, arm) and r["routing"]
            ]
            if not there:
                continue
            experts = [len(next(iter(loads.values()))) for loads in there[0]["loads"].values()]
            dead = fmean(sum(map(len, found["dead_experts"].values())) for found in there)
            other = next(name for name in DOMAINS if name != domain)
            values = [
                f"{fmean(found['max_violation'] for found in there):.2f}", f"{there[0]['max_violation_bound']:.0f}",
                f"{dead:.1f} of {sum(experts)}",
                f"{fmean(found['entropy'] for found in there) / math.log(experts[0]):.2f}",
                f"{fmean(specialisation(found['loads'], other.__eq__) for found in there):.3f}",
                f"{fmean(specialisation(found['loads'], str, without=other) for found in there):.3f}",
            ]  # fmt: skip
            rows.append([size, domain, arm, *values, str(len(there))])
    head = [
        "size",
        "domain",
        "arm",
        "MaxVio",
        "at most",
        "dead experts",
        "entropy / ln E",
        "of domains",
        "of sources",
        "seeds",
    ]
    return _table(head, rows)


def specialisation(
    loads: Mapping[str, Mapping[str, Sequence[int]]], group_of: Callable[[str], Any], without: str | None = None
) -> float:
    """How much an expert says of a token's group, from 0 to 1: mutual information over the log of the number of groups,
    which have equal weight, as a mean over layers.

    Args:
        loads: layer -> source -> assignments to each expert. group_of: the group of a source. without: a source that is
            left out.
    """
    found = []
    for layer in loads.values():
        sums: dict[Any, list[int]] = {}
        for source, counts in layer.items():
            if source != without:
                group = group_of(source)
                sums[group] = [a + b for a, b in zip(sums.get(group, [0] * len(counts)), counts, strict=True)]
        shares = [[count / sum(counts) for count in counts] for counts in sums.values()]
        mean = [fmean(column) for column in zip(*shares, strict=True)]
        bits = fmean(sum(p * math.log(p / q) for p, q in zip(row, mean, strict=True) if p) for row in shares)
        found.append(bits / math.log(len(shares)))
    return fmean(found)


def costs(results: Results) -> str:
    """What does a token cost, by the plan, by torch's counter, and in time?"""
    rows = []
    for size, domain in cells(results):
        for arm in ("parent_dense", "parent_moe", *ARMS):
            there = [r for u, r in results.items() if (u.size, u.domain, u.arm) == (size, domain, arm)]
            if there:
                flops, tokens = there[0]["flops_per_token"], there[0]["curve"][-1]["tokens"]
                rows.append([
                    size, domain, arm, f"{there[0]['params']['total'] / 1e6:.2f}", f"{tokens / 1e6:.2f}",
                    f"{flops['plan'] / 1e6:.2f}", f"{flops['counter'] / 1e6:.2f}",
                    f"{fmean(r['cpu_s'] for r in there):.0f}", f"{fmean(r['wall_s'] for r in there):.0f}",
                    f"{fmean(r['curve'][-1]['val'] for r in there):.4f}", str(len(there)),
                ])  # fmt: skip
    head = ["size", "domain", "arm", "M parameters", "M tokens", "MFLOPs a token, plan", "torch's counter", "CPU s",
            "wall s", "nats at the end", "seeds"]  # fmt: skip
    return _table(head, rows)


def layouts(results: Results) -> str:
    """Does the layout change the result? Distance of losses from those of one rank, and in which band of the plan."""
    reference = results.get(Unit("layout", "1m", "prose", "one_rank", 0))
    if reference is None:
        return ""
    gaps = {unit: distances(result, reference) for unit, result in results.items() if result is not reference}
    rows = []
    for unit, of_unit in gaps.items():
        val = abs(results[unit]["val"][-1]["val"] - reference["val"][-1]["val"])
        name = f"another seed ({unit.seed})" if unit.arm == "one_rank" else unit.arm
        rows.append([name, *(f"{each:.1e}" for each in (max(of_unit[:EARLY]), max(of_unit), val)), outside(unit, gaps)])
    head = ["run", f"largest of {EARLY} steps", "of all steps", "validation at the end", "steps outside its band"]
    return _table(head, rows)


def distances(result: dict[str, Any], reference: dict[str, Any]) -> list[float]:
    """Of the training losses of every step, nats."""
    return [abs(a["loss"] - b["loss"]) for a, b in zip(result["curve"], reference["curve"], strict=True)]


def outside(unit: Unit, gaps: dict[Unit, list[float]]) -> str:
    """At how many steps a run is outside the band that the plan gives its layout; of a seed, that of the others."""
    seeds = [each for other, each in gaps.items() if other.arm == "one_rank" and other != unit]
    rounding = next((each for other, each in gaps.items() if other.arm == "rounding"), None)
    if unit.arm == "rounding" or rounding is None or not seeds:
        return ""
    if unit.arm in ("one_rank", *ROUNDED_ON_THE_WIRE):
        nearest, furthest = ([of_step(each) for each in zip(*seeds, strict=True)] for of_step in (min, max))
        return f"{_above(gaps[unit], nearest)} (nearest seed), {_above(gaps[unit], furthest)} (furthest)"
    band = [10 * max(LEAST_ROUNDING, each) for each in itertools.accumulate(rounding, max)]
    return f"{_above(gaps[unit], band)} (rounding)"


def _above(gaps: Sequence[float], band: Sequence[float]) -> int:
    return sum(map(operator.gt, gaps, band))


def _shown(found: Interval) -> str:
    return f"{found.mean:+.4f}" + (f" ({found.low:+.4f} to {found.high:+.4f})" if found.n > 1 else "")


def _verdict(found: Interval) -> str:
    return "not decided" if found.low <= 0 <= found.high else "better" if found.mean < 0 else "worse"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


EARLY = 25  # steps, before rounding changes the choice of an expert here


# -- pictures -------------------------------------------------------------------------------------------------------

_COLORS = dict(
    zip(
        ARMS,
        ("#000000", "#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#D55E00", "#CC79A7", "#999999"),
        strict=True,
    )
)


def draw_curves(results: Results, path: Path) -> None:
    """Validation over FLOPs with the parent's, mean and range of the seeds; from scratch: from where they are near."""
    there = cells(results)
    figure = Figure(figsize=(4.4 * len(DOMAINS), 3.1 * max(1, len({s for s, _ in there}))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(1, len({s for s, _ in there})), len(DOMAINS), squeeze=False)
    sizes = [size for size in SHAPES if size in {s for s, _ in there}]
    for unused in axes.flat:
        unused.set_visible(False)
    for size, domain in there:
        plot = axes[sizes.index(size)][list(DOMAINS).index(domain)]
        plot.set_visible(True)
        for arm in ARMS:
            before = _before(results, size, domain, arm)
            mine = [r for u, r in results.items() if (u.size, u.domain, u.arm) == (size, domain, arm)]
            if not mine or before is None:
                continue
            curves = [curve_of(result, before) for result in mine]
            start = 1 + len(curves[0]) // 3 if arm in study.FROM_SCRATCH else 1
            x = [flops for flops, _ in curves[0]][start:]
            by_point = [[curve[i][1] for curve in curves] for i in range(start, len(curves[0]))]
            plot.plot(x, [fmean(values) for values in by_point], color=_COLORS[arm], label=arm, linewidth=1.3)
            plot.fill_between(x, list(map(min, by_point)), list(map(max, by_point)), color=_COLORS[arm], alpha=0.15)
        plot.set_title(f"{size}, {domain}: validation, nats per token", fontsize=9, loc="left")
        plot.set_xlabel("FLOPs by plan, with the parent's", fontsize=8.5)
        _plain(plot)
        if plot.has_data():
            plot.legend(frameon=False, fontsize=7.5)
    _save(figure, path)


def draw_multipliers(results: Results, path: Path) -> None:
    """Compute multipliers against dense: every seed, and the geometric mean."""
    there = cells(results)
    figure = Figure(figsize=(8.8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    plot, arms = figure.subplots(), [arm for arm in ARMS if arm != "dense"]
    for place, (size, domain) in enumerate(there):
        for index, arm in enumerate(arms):
            values = [p.multiplier for p in pairs(results, size, domain, arm, "dense") if p.multiplier]
            if values:
                x = place + 0.12 * (index - len(arms) / 2)
                plot.plot([x] * len(values), values, "o", color=_COLORS[arm], markersize=3, alpha=0.6)
                mean = math.exp(fmean(map(math.log, values)))
                plot.plot(
                    [x - 0.05, x + 0.05], [mean] * 2, color=_COLORS[arm], linewidth=2, label=None if place else arm
                )
    plot.axhline(1.0, color="#000000", linewidth=0.8)
    plot.set_xticks(range(len(there)), [f"{size}, {domain}" for size, domain in there])
    plot.set_title("compute multiplier against dense, above 1: fewer FLOPs", fontsize=9, loc="left")
    _plain(plot)
    if plot.get_legend_handles_labels()[0]:
        plot.legend(frameon=False, fontsize=7.5, ncols=3)
    _save(figure, path)


def draw_layouts(results: Results, path: Path) -> None:
    """Distance of every layout's training loss from that of one rank, beside the band of the seeds."""
    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.subplots()
    reference = results[Unit("layout", "1m", "prose", "one_rank", 0)]["curve"]
    for unit, result in results.items():
        gaps = [max(abs(a["loss"] - b["loss"]), 1e-9) for a, b in zip(result["curve"], reference, strict=True)]
        if unit.arm != "one_rank":
            plot.plot([point["step"] for point in reference], gaps, linewidth=1, label=unit.arm)
        elif unit.seed:
            label = "another seed" if unit.seed == 1 else None
            plot.plot([point["step"] for point in reference], gaps, color="#bbbbbb", linewidth=1, label=label)
    plot.set_yscale("log")
    plot.set_title("training loss, distance from one rank, nats", fontsize=9, loc="left")
    _plain(plot)
    plot.legend(frameon=False, fontsize=7.5, ncols=3)
    _save(figure, path)


def _plain(plot: Any) -> None:
    plot.grid(color="#d9d9d9", linewidth=0.6)
    plot.set_axisbelow(True)
    plot.tick_params(labelsize=8, length=3)
    plot.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


# -- the command line -----------------------------------------------------------------------------------------------

TABLES = {"losses": losses, "multipliers": multipliers, "routing": routing, "costs": costs}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--curves", type=Path, default=study.CURVES, help="folder of results")
    parser.add_argument("--out", type=Path, default=ASSETS, help="where tables and pictures are written")
    given = parser.parse_args()
    try:
        results, of_layouts = of_quality(given.curves), study.read_all("layout", given.curves)
    except OtherSettings as error:
        print(error, file=sys.stderr)
        return 1
    given.out.mkdir(parents=True, exist_ok=True)
    if results:
        for name, make in TABLES.items():
            text = make(results)
            (given.out / f"{name}.txt").write_text(text, encoding="utf-8")
            print(f"{name}: {(make.__doc__ or '').strip()}\n\n{text}")
        draw_curves(results, given.out / "curves.png")
        draw_multipliers(results, given.out / "multipliers.png")
    if text := layouts(of_layouts):
        (given.out / "layouts.txt").write_text(text, encoding="utf-8")
        print(text)
        draw_layouts(of_layouts, given.out / "layouts.png")
    for name in ("quality", "real", "layout"):
        absent = [unit.name for unit in study.units(name) if unit not in results and unit not in of_layouts]
        print(f"{name}: {len(absent)} of {len(study.units(name))} units are missing {', '.join(absent[:3])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
