"""Plots the results of a multirun: small panels over the swept settings. Needs neither torch nor hydra.

Algorithm:
  1. Find the settings that differ between the points. `seed` means repetition: points that differ only in it are drawn
     as one, at their mean with a whisker from the smallest to the largest, and a small dot for each seed.
  2. The first setting whose values are all numbers is the x axis, with one line per combination of the others.
     Without one, or if no line would have two points, each combination is a dot in a row of its own.
  3. Draw one panel for each quantity that was measured and is not zero everywhere. Its axis spans what was measured,
     and not zero: what differs is to be seen. A ring marks the best mean.
Colours are those of Okabe and Ito, which are safe for colour-blind readers; lines also differ in marker and dash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

PANELS = {
    "val_loss": ("validation loss, nats per token", ".3f"),
    "max_violation_mean_last": ("MaxVio, mean of layers", ".3f"),
    "tokens_per_second": ("tokens per second", ",.0f"),
    "memory_gib": ("memory of the fullest rank, GiB", ",.2f"),
    "step_seconds": ("predicted step, seconds", ",.3g"),
    "inter_node_bytes_per_token": ("inter-node bytes per token and layer", ",.0f"),
}
"""Quantity -> (title of its panel, format of the number at a dot)."""
_MORE_IS_BETTER = ("tokens_per_second",)

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":")
_REPETITION = "seed"
_LOG_RANGE = 8  # ratio of largest to smallest value from which the axis is logarithmic
_MAX_LINES, _MAX_ROWS = len(_COLORS) * len(_DASHES), 40
_COLUMNS = 2


@dataclass(frozen=True, kw_only=True)
class Point:
    """One job. settings: the swept settings, as text. measured: quantity -> value, None if it was not measured."""

    settings: Mapping[str, str]
    measured: Mapping[str, Any]


@dataclass(frozen=True)
class _Range:
    """Measured values of the repetitions of one combination."""

    values: Sequence[float]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def whisker(self) -> tuple[float, float]:
        """Lengths down to the smallest and up to the largest value."""
        return self.mean - min(self.values), max(self.values) - self.mean


def draw(points: Sequence[Point], path: Path) -> bool:
    """Writes a PNG if points differ in a setting and something was measured; returns whether it did."""
    keys = _keys(points)  # Step 1
    panels = [name for name in PANELS if any(point.measured.get(name) for point in points)]  # Step 3
    if not panels or len(points) < 2:
        return False
    axis = _axis(points, keys)  # Step 2
    figure = _lines(points, keys, axis, panels) if axis else _rows(points, keys, panels)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return True


def _keys(points: Sequence[Point]) -> list[str]:
    """Settings that differ, without the seed."""
    names = dict.fromkeys(name for point in points for name in point.settings)
    keys = [name for name in names if len({point.settings.get(name) for point in points}) > 1]
    return [name for name in keys if name != _REPETITION]


def _axis(points: Sequence[Point], keys: Sequence[str]) -> str | None:
    """The first numeric setting over which some line has two points."""
    for key in keys:
        if not all(_is_number(point.settings.get(key)) for point in points):
            continue
        lines: dict[str, set[str]] = {}
        for point in points:
            lines.setdefault(_label(point, keys, without=key), set()).add(point.settings[key])
        if any(len(xs) > 1 for xs in lines.values()):
            return key
    return None


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True


def _label(point: Point, keys: Sequence[str], without: str | None = None) -> str:
    return ", ".join(f"{key}={point.settings.get(key, '-')}" for key in keys if key != without)


def _groups(points: Sequence[Point], keys: Sequence[str], without: str | None = None) -> dict[str, list[Point]]:
    """Combination of settings -> its points, in order of first appearance."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(_label(point, keys, without), []).append(point)
    return groups


def _ranges(points: Sequence[Point], key: str, name: str) -> dict[str, _Range]:
    """Value of `key` -> the measured values, without those at which nothing was measured."""
    values: dict[str, list[float]] = {}
    for point in points:
        if point.measured.get(name) is not None:
            values.setdefault(point.settings.get(key, "-"), []).append(float(point.measured[name]))
    return {value: _Range(measured) for value, measured in values.items()}


def _best(name: str, ranges: Sequence[_Range]) -> _Range | None:
    """The one with the best mean; None: they are all the same."""
    means = {measured.mean for measured in ranges}
    if len(means) < 2:
        return None
    return (max if name in _MORE_IS_BETTER else min)(ranges, key=lambda measured: measured.mean)


# -- lines ---------------------------------------------------------------------------------------------------------


def _lines(points: Sequence[Point], keys: Sequence[str], axis: str, panels: Sequence[str]) -> Figure:
    groups = _groups(points, keys, without=axis)
    named = "" not in groups  # else there is one line, over the only setting
    legend_height = 0.22 * -(-min(len(groups), _MAX_LINES) // 3) + 0.05 if named else 0.0
    figure, panel_axes = _panels(panels, width=3.7, height=2.4, more_height=legend_height)
    ticks = sorted({float(point.settings[axis]): point.settings[axis] for point in points}.items())
    for axes, name in zip(panel_axes, panels, strict=True):
        drawn: list[tuple[float, _Range]] = []
        for i, (label, members) in enumerate(list(groups.items())[:_MAX_LINES]):
            ranges = sorted((float(x), measured) for x, measured in _ranges(members, axis, name).items())
            if ranges:
                _line(axes, [x for x, _ in ranges], [measured for _, measured in ranges], label, i)
            drawn += ranges
        if (best := _best(name, [measured for _, measured in drawn])) is not None:
            _ring(axes, next(x for x, measured in drawn if measured is best), best.mean)
        axes.set_xlabel(axis, fontsize=9)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _set_ticks(axes, ticks)
    if named:
        handles: dict[str, Any] = {}
        for axes in panel_axes:  # a line may be in some of them
            drawn_lines, labels = axes.get_legend_handles_labels()
            handles |= dict(zip(labels, drawn_lines, strict=True))
        shown = [label for label in groups if label in handles]
        figure.legend(
            [handles[label] for label in shown], shown, loc="outside lower center", ncols=min(3, len(shown)),
            frameon=False, fontsize=8,
        )  # fmt: skip
    _note_if_cut(figure, len(groups), _MAX_LINES)
    return figure


def _line(axes: Axes, xs: Sequence[float], ranges: Sequence[_Range], label: str, number: int) -> None:
    axes.errorbar(
        xs, [r.mean for r in ranges], yerr=list(zip(*(r.whisker for r in ranges), strict=True)), label=label,
        color=_COLORS[number % len(_COLORS)], marker=_MARKERS[number % len(_MARKERS)],
        linestyle=_DASHES[number // len(_COLORS)], markersize=5, linewidth=1.5, elinewidth=1, capsize=2,
    )  # fmt: skip


def _set_ticks(axes: Axes, ticks: Sequence[tuple[float, str]]) -> None:
    """Sets a tick at each swept value, with its text in the override as label."""
    xs = [x for x, _ in ticks]
    if xs[0] > 0 and xs[-1] / xs[0] >= _LOG_RANGE:
        axes.set_xscale("log")
    axes.set_xticks(xs, [text for _, text in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


# -- rows ----------------------------------------------------------------------------------------------------------


def _rows(points: Sequence[Point], keys: Sequence[str], panels: Sequence[str]) -> Figure:
    groups = list(_groups(points, keys).items())[:_MAX_ROWS]
    figure, panel_axes = _panels(panels, width=4.0, height=0.7 + 0.28 * len(groups))
    names = [_name(members, keys) for _, members in groups]
    for number, (axes, name) in enumerate(zip(panel_axes, panels, strict=True)):
        values = [[float(p.measured[name]) for p in m if p.measured.get(name) is not None] for _, m in groups]
        ranges = {place: _Range(measured) for place, measured in enumerate(values) if measured}
        best = _best(name, list(ranges.values()))
        for place, measured in ranges.items():
            _dot(axes, place, measured, PANELS[name][1], is_best=measured is best)
        _fit(axes, [value for measured in values for value in measured])
        axes.set_ylim(len(groups) - 0.5, -0.5)  # the first job on top
        axes.set_yticks(range(len(groups)), names if number % _COLUMNS == 0 else [""] * len(groups))
    figure.supylabel(", ".join(keys), fontsize=9)
    _note_if_cut(figure, len(_groups(points, keys)), _MAX_ROWS)
    return figure


def _name(members: Sequence[Point], keys: Sequence[str]) -> str:
    """A row's settings, and over how many seeds it is the mean."""
    settings = ", ".join(members[0].settings.get(key, "-") for key in keys)
    seeds = f"{len(members)} seeds" if len(members) > 1 else ""
    return f"{settings} ({seeds})" if settings and seeds else settings or seeds


def _dot(axes: Axes, place: int, measured: _Range, style: str, *, is_best: bool) -> None:
    if len(measured.values) > 1:
        axes.plot(measured.values, [place] * len(measured.values), "o", color=_COLORS[5], markersize=3)
    whisker = [[length] for length in measured.whisker] if len(measured.values) > 1 else None
    axes.errorbar(
        measured.mean, place, xerr=whisker, fmt="o", color=_COLORS[0], markersize=6, elinewidth=1, capsize=2
    )  # fmt: skip
    if is_best:
        _ring(axes, measured.mean, place)
    axes.annotate(
        format(measured.mean, style), (max(measured.values), place), xytext=(8, 0), textcoords="offset points",
        va="center", fontsize=8, weight="bold" if is_best else "normal",
    )  # fmt: skip


def _fit(axes: Axes, values: Sequence[float]) -> None:
    """An axis that spans the values, with space for the numbers beside the dots."""
    if values:
        low, high = min(values), max(values)
        span = (high - low) or abs(high) * 0.1 or 1.0
        axes.set_xlim(low - 0.1 * span, high + 0.35 * span)
    axes.xaxis.set_major_locator(MaxNLocator(4))


# -- both ----------------------------------------------------------------------------------------------------------


def _panels(panels: Sequence[str], *, width: float, height: float, more_height: float = 0) -> tuple[Figure, list[Axes]]:
    """A figure with one titled panel for each name, two in a row; sizes in inches."""
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(width * columns, height * rows + more_height), layout="constrained")
    FigureCanvasAgg(figure)
    panel_axes = [figure.add_subplot(rows, columns, number + 1) for number in range(len(panels))]
    for axes, name in zip(panel_axes, panels, strict=True):
        axes.set_title(PANELS[name][0], fontsize=9.5, loc="left")
        axes.grid(color="#d9d9d9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8.5, length=3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panel_axes


def _ring(axes: Axes, x: float, y: float) -> None:
    """Marks the best."""
    axes.plot([x], [y], "o", markersize=11, markerfacecolor="none", markeredgecolor=_COLORS[1], markeredgewidth=1.5,
              label="_best")  # fmt: skip


def _note_if_cut(figure: Figure, count: int, limit: int) -> None:
    if count > limit:
        figure.suptitle(f"the first {limit} of {count} combinations; all are in sweep.csv", fontsize=8.5)
