"""A heat map of the load: layers x experts at several steps of a run. Needs neither torch nor a display.

The colour of a cell is the expert's tokens over the mean of its layer. The scale is logarithmic and the same in every
picture, with even load in the middle: an expert with half of the mean is as far from even as one with twice the mean.
viridis is perceptually uniform, and readable in grey and with common kinds of colour blindness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecompile.load_history import NO_EXPERT, LoadHistory

MAX_PANELS = 6
_MAX_LABELS = 24  # of an axis
_SCALE = {0.25: "¼", 0.5: "½", 1.0: "1 (even)", 2.0: "2", 4.0: "4"}  # limits of the colours, and ticks
Ratios = NDArray[np.float64]


def write_heat_map(history: LoadHistory, path: Path, *, title: str) -> None:
    """Writes the picture as PNG.

    Algorithm:
      1. Choose up to six steps, evenly spaced over the logged ones, including the first and the last.
      2. Turn loads into ratios to the layer's mean; cells without an expert are blank.
      3. Draw one panel per step, all on one colour scale.

    Args:
        history: with at least one step.
        title: first line of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    chosen = chosen_steps(len(history.steps), MAX_PANELS)  # Step 1
    ratios = [load_ratios(history.loads[i]) for i in chosen]  # Step 2
    figure = Figure(figsize=_inches(len(chosen), history), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    columns, rows = _grid(len(chosen), ratios[0].shape[1])
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    scale = LogNorm(min(_SCALE), max(_SCALE), clip=True)
    for panel, i, ratio in zip(panels.flat, chosen, ratios, strict=False):  # Step 3
        image = panel.imshow(
            np.ma.masked_invalid(ratio), cmap="viridis", norm=scale, aspect="auto", interpolation="nearest"
        )
        panel.set_title(f"step {history.steps[i]}\nworst MaxVio {np.nanmax(ratio) - 1:.2f}", fontsize=9)
        panel.set_facecolor("0.9")
        panel.tick_params(labelsize=8, length=2)
        panel.label_outer()
    for panel in panels.flat[len(chosen) :]:
        panel.set_visible(False)
    _label(panels[0, 0], history)
    for panel in panels[:, 0]:
        panel.set_ylabel("layer", fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel("expert", fontsize=9)
    figure.suptitle(f"{title}: load of the experts", fontsize=11)
    aspect = 0.8 * figure.get_figwidth() / 0.14  # the bar is a seventh of an inch high
    bar = figure.colorbar(image, ax=panels, location="bottom", extend="both", shrink=0.8, aspect=aspect, pad=0.02)
    bar.set_ticks(list(_SCALE), labels=list(_SCALE.values()))
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    bar.set_label("tokens of the expert / mean of its layer", fontsize=9)
    figure.savefig(path)


def chosen_steps(count: int, most: int) -> list[int]:
    """Up to `most` indices out of `count`, evenly spaced, including the first and the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def load_ratios(load: NDArray[np.int64]) -> Ratios:
    """(L, E) tokens -> tokens over the mean of the layer; NaN if the layer has no such expert."""
    exists = load != NO_EXPERT
    mean = np.where(exists, load, 0).sum(1, keepdims=True) / exists.sum(1, keepdims=True)
    ratios: Ratios = np.where(exists, load / np.maximum(mean, 1e-9), np.nan)
    return ratios


def short_names(paths: Sequence[str]) -> list[str]:
    """Module paths without their common prefix and suffix; a single path is not changed."""
    if len(paths) == 1:
        return list(paths)
    parts = [path.split(".") for path in paths]
    front = _num_shared(parts)
    back = _num_shared([path[front:][::-1] for path in parts])
    return [".".join(path[front : len(path) - back]) for path in parts]


def _num_shared(lists: Sequence[Sequence[str]]) -> int:
    """Length of the common prefix."""
    count = 0
    for level in zip(*lists, strict=False):
        if len(set(level)) > 1:
            break
        count += 1
    return count


def _grid(count: int, num_experts: int) -> tuple[int, int]:
    """(columns, rows) of panels: wide panels get fewer columns."""
    columns = min(count, 6 if num_experts <= 8 else 3 if num_experts <= 64 else 2)
    return columns, math.ceil(count / columns)


def _inches(count: int, history: LoadHistory) -> tuple[float, float]:
    """Size of the figure: cells of a sixth of an inch within limits for a panel, and space for names and the bar."""
    num_layers, num_experts = history.loads[0].shape
    columns, rows = _grid(count, num_experts)
    width, height = min(max(num_experts / 6, 1.5), 4.5), min(max(num_layers / 5, 1.2), 4.0)
    names = 0.08 * max(map(len, short_names(history.layers)))
    return max(columns * width, 3.2) + names + 0.5, rows * (height + 0.5) + 1.4


def _label(panel: Any, history: LoadHistory) -> None:
    """Sets layer names and expert ids as tick labels, as many as are readable."""
    num_layers, num_experts = history.loads[0].shape
    shown, names = range(0, num_layers, math.ceil(num_layers / _MAX_LABELS)), short_names(history.layers)
    panel.set_yticks(list(shown), [names[i] for i in shown])
    stride = 2 ** max(0, math.ceil(math.log2(num_experts / 8)))
    panel.set_xticks(list(range(0, num_experts, stride)))
