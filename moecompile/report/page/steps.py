"""(2) Where a step went, by layer and rank, and (3) what imbalance costs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moecompile.load_history import LOAD_HISTORY
from moecompile.planner.cost_model.forecast import COMMUNICATION
from moecompile.report.heatmap import short_names
from moecompile.report.page.document import Chart, Section, chart, first_rows, note, table
from moecompile.report.page.read import Run
from moecompile.report.text import seconds_text

_LEAST = 0.002  # parts of a forecast below this share are joined
_MOST_BARS = 240
PARTS = {
    "router": "router",
    "dispatch": "exposed dispatch",
    "experts": "experts",
    "combine": "exposed combine",
    "waiting": "waiting for the fullest rank",
    "arriving": "waiting for ranks to arrive",
    "shared": "shared experts",
    "rows": "copies and sums of rows",
    "other": "the rest of the region",
}
"""Part of a layer's forward -> what the page calls it."""


def steps_section(run: Run) -> Section | None:
    """Where a step went; None: nothing was measured or predicted."""
    parts: list[str | Chart] = []
    if run.profile.get("parts"):
        parts += [*_phases(run), *_measured(run)]
    if run.forecast.get("step_parts"):
        parts += [_predicted(run)]
    return Section(name="steps", title="Where a step went", parts=parts) if parts else None


def price_section(run: Run) -> Section | None:
    """The price of imbalance; None: nothing was measured or predicted."""
    parts = [*_as_it_was(run), *_what_if(run)]
    return Section(name="price", title="The price of imbalance", parts=parts) if parts else None


def _phases(run: Run) -> Iterator[str]:
    phases, steps = run.profile["phases"], run.profile["timed_steps"]
    rows = [
        (f"rank {rank}", *(seconds_text(phases[name][rank]) for name in ("forward", "backward", "rest")))
        for rank in range(len(phases["forward"]))
    ]
    yield first_rows(("", "forward", "backward", "optimizer and the rest"), rows, 16, "ranks")
    yield note(
        f"Medians of {len(steps)} measured steps, the last ones. They took {100 * run.profile['cost']:+.0f}% beside "
        "the others, because of the clocks and of barriers that tell waiting from sending. All other steps ran without."
    )


def _measured(run: Run) -> Iterator[Chart | str]:
    """Stacked bars, one per layer and rank; of a large run one per layer, and one per rank."""
    layers = short_names(run.profile["layers"])
    parts = {PARTS[key]: 1e3 * np.array(values) for key, values in run.profile["parts"].items() if np.any(values)}
    num_layers, num_ranks = next(iter(parts.values())).shape
    ranks = [f"rank {rank}" for rank in range(num_ranks)]
    title = "Forward of the MoE layers"
    if num_layers * num_ranks <= _MOST_BARS:
        x: Any = [
            [f"layer {name}" for name in layers for _ in ranks],
            [str(r) for _ in layers for r in range(num_ranks)],
        ]
        yield _bars(
            "by-layer-and-rank", x, {name: v.ravel() for name, v in parts.items()}, f"{title}, by layer and rank"
        )
    else:
        means = {name: v.mean(1) for name, v in parts.items()}
        yield _bars("by-layer", [f"layer {name}" for name in layers], means, f"{title}, mean over ranks")
        yield _bars("by-rank", ranks, {name: v.sum(0) for name, v in parts.items()}, f"{title}, all layers together")
    yield note(
        "Exposed: the time in which nothing else ran on the rank. Waiting for the fullest rank is between the end of a "
        "rank's experts and the moment when all ranks of the EP group were done."
    )


def _bars(name: str, x: Any, parts: dict[str, Any], title: str) -> Chart:
    import plotly.graph_objects as go

    traces = [
        go.Bar(name=label, x=x, y=values.tolist(), hovertemplate=f"%{{x}}<br>{label} %{{y:.2f}} ms<extra></extra>")
        for label, values in parts.items()
    ]
    layout = {"barmode": "stack", "title": {"text": title}, "yaxis": {"title": {"text": "ms"}}}
    return chart(name, traces, layout, height=430)


def _predicted(run: Run) -> str:
    parts, seconds = run.forecast["step_parts"], run.forecast["step_seconds"]
    rows, rest = [], 0.0
    for name, value in sorted(parts.items(), key=lambda item: -item[1]):
        if value < _LEAST * seconds:
            rest += value
        else:
            shown = f"{name} (communication)" if name in COMMUNICATION else name
            rows.append((shown, seconds_text(value), f"{100 * value / seconds:.1f}%"))
    rows += [("all others", seconds_text(rest), f"{100 * rest / seconds:.1f}%")] * (rest > 0)
    head = ("predicted part of the step", "time", "share")
    return f"<h3>As predicted</h3>{table(head, rows)}"


def _as_it_was(run: Run) -> Iterator[str]:
    """Measured: the rows of the fullest rank, and what a step without imbalance would have taken."""
    if not run.profile.get("parts") or len(run.profile["rows"][0]) < 2:
        return
    rows = np.array(run.profile["rows"], dtype=float)
    experts = np.array(run.profile["parts"]["experts"]).mean(1)
    fullest = rows.max(1) / np.maximum(rows.mean(1), 1e-9)
    step = float(np.median(run.profile["phases"]["step"]))
    saved = 3 * float(((fullest - 1) * experts).sum())
    names = short_names(run.profile["layers"])
    yield table(
        ("", "step", "saves"),
        [
            ("the step as it was", seconds_text(step), ""),
            ("the same step, balanced", seconds_text(step - saved), f"{100 * saved / step:.1f}%"),
        ],
    )
    yield table(
        ("layer", "rows, mean rank", "rows, fullest rank", "over the mean", "experts, mean rank", "waiting, mean rank"),
        [
            (name, f"{rows[i].mean():,.0f}", f"{rows[i].max():,.0f}", f"{fullest[i]:.2f} x", seconds_text(experts[i]),
             seconds_text(float(np.mean(run.profile["parts"]["waiting"][i]))))
            for i, name in enumerate(names)
        ],
    )  # fmt: skip
    yield note(
        "Balanced: each layer's experts take what their rows take on the mean rank; backward costs twice the forward. "
        "The rows are those of the measured steps."
    )


def _what_if(run: Run) -> Iterator[str]:
    seconds = run.forecast.get("step_seconds")
    if not seconds:
        return
    prices = [_price_row(price) for price in run.forecast.get("imbalance", ())]
    if prices:
        yield "<h3>What if, as predicted</h3>"
        yield table(("load of the fullest rank", "median", "step", "99th percentile", "step"), prices)
    changes = [(seconds_text(c["seconds"]), f"{100 * (1 - c['seconds'] / seconds):.1f}%", c["change"])
               for c in run.forecast.get("changes", ())]  # fmt: skip
    if changes:
        yield table(("step", "saves", "with this change (memory not checked, stack.* not run)"), changes, numbers=False)


def _price_row(price: Mapping[str, Any]) -> tuple[str, ...]:
    name = "this run" if price["name"] == LOAD_HISTORY else price["name"]
    median, worst = (f"{price[key]:.2f} x mean" for key in ("p50_load", "p99_load"))
    return (name, median, seconds_text(price["p50_seconds"]), worst, seconds_text(price["p99_seconds"]))
