"""plotly figures as JSON, with what all charts share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moecompile.report.page.document import Chart

WIDE = 160
"""Points of a line; a longer one is thinned, so that long runs stay small."""


def chart(name: str, traces: Sequence[Any], layout: Mapping[str, Any], *, height: int = 380, **more: Any) -> Chart:
    """A chart of plotly traces. layout: on top of margins and a legend that suits phones.

    Keyword arguments go to `Chart`. A `coloraxis` says in `meta.scale` which of the page's scales it has.
    """
    import plotly.graph_objects as go

    base = {
        "margin": {"l": 60, "r": 20, "t": 40, "b": 50},
        "height": height,
        "legend": {"orientation": "h", "y": -0.2},
        "hovermode": "closest",
        "meta": {},
        "modebar": {"bgcolor": "rgba(0,0,0,0)"},
    }
    figure = go.Figure(data=list(traces), layout={**base, **layout})
    found = json.loads(figure.to_json())
    return Chart(name=name, figure={"data": found["data"], "layout": found["layout"]}, height=height, **more)


def lines(
    name: str, curves: Sequence[tuple[str, Sequence[float], Sequence[float]]], x: str, y: str, **layout: Any
) -> Chart:
    """One line per (label, x values, y values)."""
    import plotly.graph_objects as go

    traces = [
        go.Scatter(x=_thin(xs), y=_thin(ys), name=label, mode="lines+markers" if len(xs) < 30 else "lines")
        for label, xs, ys in curves
    ]
    shape = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}, "showlegend": len(traces) > 1}
    return chart(name, traces, {**shape, **layout})


def heat(
    values: Any, *, x: Sequence[Any], y: Sequence[Any], hover: str, coloraxis: str = "coloraxis", **more: Any
) -> Any:
    """A heat map on a named colour axis; the first row is on top (`yaxis.autorange` of the chart)."""
    import plotly.graph_objects as go

    return go.Heatmap(z=values, x=list(x), y=list(y), coloraxis=coloraxis, hovertemplate=f"{hover}<extra></extra>",
                      xgap=1 if len(x) <= 64 else 0, ygap=1 if len(y) <= 64 else 0, **more)  # fmt: skip


def _thin(values: Sequence[float]) -> list[float]:
    """Every n-th value, and the last one."""
    stride = max(1, -(-len(values) // WIDE))
    kept = list(values[::stride])
    if values and (len(values) - 1) % stride:
        kept.append(values[-1])
    return kept
