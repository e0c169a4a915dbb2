"""(4) The load of every expert over the steps: a map with a slider, dead experts, MaxVio and entropy."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecompile.load_history import NO_EXPERT, LoadHistory
from moecompile.report.heatmap import chosen_steps, load_ratios, short_names
from moecompile.report.page.charts import chart, heat, lines
from moecompile.report.page.document import Chart, Section, note
from moecompile.report.page.read import Run

MAX_STEPS = 50
"""Steps in the map, evenly spaced; a run of 1,000 steps of 61 layers with 256 experts is 0.8 MB."""
_LIMIT = 2  # colours end at a quarter and at four times the mean
_TICKS = {-2: "¼ or less", -1: "½", 0: "even", 1: "2 x", 2: "4 x or more"}
_FEW = 12  # layers with a line of their own


def section(run: Run) -> Section | None:
    """The section; None: no load was logged."""
    if run.history is None:
        return None
    history, names = run.history, short_names(run.history.layers)
    parts: list[str | Chart] = [
        _map(history, names),
        note(
            "Tokens that chose the expert over the mean of its layer, on all ranks together, before any are dropped. "
            "The neutral colour is even load. The scale is logarithmic: half of the mean is as far from even as twice "
            "the mean."
        ),
        _dead(history, names),
    ]
    for prefix, title, unit in (
        ("max_violation/", "MaxVio", "fullest expert over the mean, minus 1"),
        ("entropy/", "Entropy of the router", "nats per token"),
        ("drop_rate/", "Dropped assignments", "share"),
    ):
        curves = list(run.columns(prefix))
        if curves and any(value for _, _, values in curves for value in values):
            shown = short_names([name for name, _, _ in curves])
            parts.append(
                _per_layer(
                    prefix.strip("/"), title, unit, [(n, c[1], c[2]) for n, c in zip(shown, curves, strict=True)]
                )
            )
    return Section(name="load", title="Load of the experts", parts=parts)


def quantized(ratios: NDArray[np.float64]) -> NDArray[np.uint8]:
    """One byte per load: 0 no such expert, 1 no tokens, else 2 + 253 (log2(ratio) + 4) / 8, clipped; 2.2% a step."""
    missing = np.isnan(ratios)
    logs = np.log2(np.where(missing | (ratios <= 0), 1.0, ratios))
    scaled = 2 + np.clip(np.rint(253 * (logs + 4) / 8), 0, 253)
    found: NDArray[np.uint8] = np.where(missing, 0, np.where(ratios <= 0, 1, scaled)).astype(np.uint8)
    return found


def _map(history: LoadHistory, names: list[str]) -> Chart:
    chosen = chosen_steps(len(history.steps), MAX_STEPS)
    cube = np.stack([quantized(load_ratios(history.loads[i])) for i in chosen])
    num_steps, rows, columns = cube.shape
    slider = {
        "active": num_steps - 1, "pad": {"t": 50}, "currentvalue": {"prefix": "step "},
        "steps": [
            {"label": str(history.steps[i]), "value": str(place), "method": "skip"} for place, i in enumerate(chosen)
        ],
    }  # fmt: skip
    bar = {"title": {"text": "load"}, "tickvals": list(_TICKS), "ticktext": list(_TICKS.values()), "thickness": 12}
    layout: dict[str, Any] = {
        "title": {"text": "Layers x experts"},
        "xaxis": {"title": {"text": "expert"}},
        "yaxis": {"title": {"text": "layer"}, "autorange": "reversed", "type": "category"},
        "sliders": [slider],
        "coloraxis": {"cmin": -_LIMIT, "cmax": _LIMIT, "colorbar": bar},
        "meta": {"scale": {"coloraxis": "diverging"}},
    }
    trace = heat(
        None, x=range(columns), y=names, hover="layer %{y}, expert %{x}<br>%{customdata:.2f} x the mean of its layer"
    )
    stored = {
        "steps": num_steps, "rows": rows, "columns": columns, "limit": _LIMIT,
        "content": base64.b64encode(cube.tobytes()).decode(),
    }  # fmt: skip
    return chart("load-map", [trace], layout, height=260 + min(max(20 * rows, 100), 700), cube=stored)


def _dead(history: LoadHistory, names: list[str]) -> Chart | str:
    """Experts without a token in a logged step, by layer."""
    dead = np.stack([((load != NO_EXPERT) & (load == 0)).sum(1) for load in history.loads])
    if not dead.any():
        return note("No expert was without tokens in a logged step.")
    return _per_layer("dead", "Dead experts", "experts without a token in the step",
                      [(name, history.steps, dead[:, i].tolist()) for i, name in enumerate(names)])  # fmt: skip


def _per_layer(name: str, title: str, unit: str, curves: list[Any]) -> Chart:
    """A line per layer; with many layers, the mean and the highest and lowest of them."""
    if len(curves) > _FEW:
        steps = curves[0][1]
        values = np.array([found for _, _, found in curves if len(found) == len(steps)])
        curves = [(label, steps, of(values, axis=0).tolist()) for label, of in
                  (("highest layer", np.max), ("mean of layers", np.mean), ("lowest layer", np.min))]  # fmt: skip
    else:
        curves = [(f"layer {label}", steps, values) for label, steps, values in curves]
    return lines(f"by-layer-{name}", curves, "optimizer step", unit, title={"text": title})
