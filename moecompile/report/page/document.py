"""Sections to one HTML file. The charts are plotly figures, and plotly's own JavaScript draws them.

Algorithm:
  1. Collect the figures of all sections, as JSON; the arrays of a slider are bytes in base64.
  2. Compress the JavaScript of the library, once per process, and the figures. Both stand in the file as base64, which
     the page inflates with DecompressionStream (docs/decisions/0027).
  3. Write the file atomically: a reader sees the page before or after, never a part of it.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from moecompile.atomic import write_text
from moecompile.version import __version__


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure: its JSON as plotly writes it. height: pixels. cube: for a slider, see `page.js`."""

    name: str
    figure: Mapping[str, Any]
    height: int = 380
    cube: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section. parts: HTML (already escaped) and charts, in order."""

    name: str
    title: str
    parts: Sequence[str | Chart] = field(default_factory=tuple)


def write_document(path: Path, title: str, subtitle: str, sections: Sequence[Section], *, reload: bool = False) -> None:
    """Writes the page. reload: it loads itself again every 20 s, because the run is not over."""
    import plotly.io

    charts = [part for section in sections for part in section.parts if isinstance(part, Chart)]
    data = {  # Step 1
        "charts": {
            chart.name: {**chart.figure, "cube": chart.cube} if chart.cube else dict(chart.figure) for chart in charts
        },
        "templates": {
            name: {"layout": plotly.io.templates[name].to_plotly_json()["layout"]}
            for name in ("plotly_white", "plotly_dark")
        },
    }
    body = _PAGE.format(
        title=escape(title),
        subtitle=escape(subtitle),
        refresh='<meta http-equiv="refresh" content="20">' if reload else "",
        css=_asset("page.css"),
        contents="".join(f'<a href="#{section.name}">{escape(section.title)}</a>' for section in sections),
        sections="".join(map(_section_html, sections)),
        library=_library() if charts else "",  # Step 2
        data=_packed(json.dumps(data, separators=(",", ":")).encode()) if charts else "",
        script=_asset("page.js") if charts else "",
        version=escape(__version__),
    )
    write_text(path, body)  # Step 3


def escape(text: object) -> str:
    """Text for HTML."""
    return html.escape(str(text))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: bool = True) -> str:
    """An HTML table; all cells are escaped. numbers: columns after the first are aligned to the right."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    kind = ' class="numbers"' if numbers else ""
    return f'<div class="wide"><table{kind}><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def first_rows(head: Sequence[str], rows: Sequence[Sequence[object]], limit: int, what: str) -> str:
    """A table of at most `limit` rows, which says how many there are. what: the rows are, in the plural."""
    left_out = note(f"The first {limit} of {len(rows):,} {what}.") if len(rows) > limit else ""
    return table(head, rows[:limit]) + left_out


def note(text: str) -> str:
    """A paragraph of small print."""
    return f'<p class="note">{escape(text)}</p>'


def details(summary: str, inside: str) -> str:
    """Something that is shown on a click, and in print. inside: HTML."""
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def _section_html(section: Section) -> str:
    parts = "".join(
        f'<div class="chart" id="{part.name}" style="height:{part.height}px"></div>'
        if isinstance(part, Chart)
        else part
        for part in section.parts
    )
    return f'<section id="{section.name}"><h2>{escape(section.title)}</h2>{parts}</section>'


@cache
def _library() -> str:
    from plotly.offline import get_plotlyjs

    return _packed(get_plotlyjs().encode())


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()


@cache
def _asset(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
{refresh}
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<header><h1>{title}</h1><p>{subtitle}</p></header>
<nav>{contents}</nav>
<main>{sections}</main>
<footer>written by moecompile {version}; charts by plotly.js</footer>
<script type="text/plain" id="library">{library}</script>
<script type="text/plain" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


# -- charts ------------------------------------------------------------------------------------------------------------


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
