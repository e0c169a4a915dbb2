"""Draws layered graphs: a Sugiyama layout (grandalf), boxes and curves (matplotlib without pyplot).

Algorithm, lengths in points (1/72 inch), y downwards:
  1. Size every box by its text.
  2. Lay out each connected component, top to bottom, and place the components side by side.
  3. Draw each edge as a chain of curves through the layout's bends, with ends spread along a box so that they do not
     touch; then the boxes over them, a title above every graph and one legend.
The same graph gives the same bytes: no dates, no random ids, text as outlines of matplotlib's own font.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import Enum
from functools import cache
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any

import matplotlib
from grandalf.graphs import Edge, Vertex, graph_core
from grandalf.layouts import SugiyamaLayout
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path
from matplotlib.textpath import TextToPath


class Role(Enum):
    """The role of a box: (text in the legend, fill, border, text colour)."""

    EXCHANGE = ("exchange between ranks", "#d1263f", "#9c1028", "#ffffff")
    EXPERTS = ("router and experts", "#1f5fa8", "#143f73", "#ffffff")
    ROWS = ("row movement", "#fbe2a4", "#c79a2b", "#3a2e0c")
    COMPUTE = ("dense computation", "#e6eaef", "#9aa5b1", "#1f2933")
    BOUNDARY = ("input, output", "#ffffff", "#52606d", "#1f2933")


@dataclass(frozen=True, kw_only=True)
class Box:
    """A node of the graph. detail: a second, smaller line; may be empty."""

    label: str
    detail: str
    role: Role


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A graph to draw. edges: (index of the source box, index of the target box)."""

    title: str
    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int], ...]


Point = tuple[float, float]
Bounds = tuple[float, float, float, float]  # left, top, right, bottom

_FAMILY = "DejaVu Sans"
_LABEL_SIZE, _DETAIL_SIZE, _TITLE_SIZE = 10.0, 7.5, 12.0
_PAD_X, _LINE, _PAD_Y = 12.0, 12.0, 6.0
_GAP_X, _GAP_Y = 22.0, 30.0
_MARGIN, _TITLE_SPACE, _LEGEND_SPACE, _SWATCH = 18.0, 34.0, 34.0, 11.0
_ROUNDS = 8  # of crossing reduction; more do not change these graphs
_PORT_STEP, _PORT_SHARE = 16.0, 0.6
_ARROW, _EDGE_COLOR = 5.0, "#6b7785"


@dataclass
class _View:
    """Attributes that grandalf reads (w, h) and writes (xy, the centre)."""

    w: float
    h: float
    xy: Point = (0.0, 0.0)


class _EdgeView:
    """Attributes that grandalf writes: the bends of an edge, including the centres of source and target."""

    def __init__(self) -> None:
        self.points: list[Point] = []

    def setpath(self, points: list[Point]) -> None:
        self.points = list(points)


def draw(pictures: list[Picture], path: FilePath) -> None:
    """Draws `pictures` side by side into one file; the suffix (`.svg`, `.png`) determines the format."""
    laid_out = [_LaidOut(picture) for picture in pictures]
    titles = [_text_width(p.title, _TITLE_SIZE, bold=True) for p in pictures]
    widths = [max(graph.width, title) for graph, title in zip(laid_out, titles, strict=True)]
    roles = [role for role in Role if any(box.role is role for p in pictures for box in p.boxes)]
    legend_width = sum(_legend_entry_width(role) for role in roles)
    inner = max(sum(widths) + 2 * _MARGIN * (len(widths) - 1), legend_width)
    height = max(graph.height for graph in laid_out) + _TITLE_SPACE + _LEGEND_SPACE + 2 * _MARGIN
    axes = _canvas(inner + 2 * _MARGIN, height)
    left = _MARGIN + (inner - sum(widths) - 2 * _MARGIN * (len(widths) - 1)) / 2
    for picture, graph, width in zip(pictures, laid_out, widths, strict=True):
        _write(axes, picture.title, left + width / 2, _MARGIN + _TITLE_SIZE / 2, _TITLE_SIZE, "#1f2933", bold=True)
        graph.draw(axes, left + (width - graph.width) / 2, _MARGIN + _TITLE_SPACE)
        left += width + 2 * _MARGIN
    _legend(axes, roles, _MARGIN + (inner - legend_width) / 2, height - _MARGIN - _SWATCH)
    with matplotlib.rc_context({"svg.hashsalt": "moecompile", "svg.fonttype": "path"}):
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        axes.figure.savefig(path, dpi=144, metadata=metadata)


class _LaidOut:
    """A picture with positions (steps 1 and 2); its corner is at the origin."""

    def __init__(self, picture: Picture) -> None:
        self.picture = picture
        self.views = [_View(*_box_size(box)) for box in picture.boxes]
        self.paths: dict[tuple[int, int], list[Point]] = {}
        self.width = self.height = 0.0
        for members in _components(len(picture.boxes), picture.edges):
            self._place(members)

    def _place(self, members: list[int]) -> None:
        """Lays out one connected component to the right of the others."""
        vertices = {i: Vertex(i) for i in members}
        for i, vertex in vertices.items():
            vertex.view = self.views[i]
        edges = [Edge(vertices[a], vertices[b], data=(a, b)) for a, b in self.picture.edges if a in vertices]
        for edge in edges:
            edge.view = _EdgeView()
        layout = SugiyamaLayout(graph_core(vertices.values(), edges))
        layout.xspace, layout.yspace = _GAP_X, _GAP_Y
        layout.dw, layout.dh = _GAP_X, _LINE  # space for a passing edge
        layout.init_all(inverted_edges=[], optimize=True)  # the graph has no cycles
        layout.draw(_ROUNDS)
        half = {self.views[i].xy[1]: 0.0 for i in members}  # centre of a layer -> half of its height
        for i in members:
            half[self.views[i].xy[1]] = max(half[self.views[i].xy[1]], self.views[i].h / 2)
        paths = {edge.data: _upright(edge.view.points, half) for edge in edges}
        xs = [x for points in paths.values() for x, _ in points]
        left = min([self.views[i].xy[0] - self.views[i].w / 2 for i in members] + xs)
        top = min(self.views[i].xy[1] - self.views[i].h / 2 for i in members)
        shift = self.width + (_GAP_X if self.width else 0.0) - left
        for i in members:
            x, y = self.views[i].xy
            self.views[i].xy = (x + shift, y - top)
        for key, points in paths.items():
            self.paths[key] = [(x + shift, y - top) for x, y in points]
        right = max([self.views[i].xy[0] + self.views[i].w / 2 for i in members] + [x + shift for x in xs])
        self.width = right
        self.height = max([self.height, *(self.views[i].xy[1] + self.views[i].h / 2 for i in members)])

    def draw(self, axes: Any, left: float, top: float) -> None:
        """Draws edges and boxes (step 3), with the corner at (left, top)."""
        ends = self._ends()
        for key, points in self.paths.items():
            chain = [ends[key][0], *points[1:-1], ends[key][1]]
            _draw_edge(axes, [(x + left, y + top) for x, y in chain])
        for box, view in zip(self.picture.boxes, self.views, strict=True):
            _draw_box(axes, box, view, left, top)

    def _ends(self) -> dict[tuple[int, int], tuple[Point, Point]]:
        """The start of each edge at the bottom of its source, and its end at the top of its target."""
        leaving: defaultdict[int, list[tuple[float, tuple[int, int]]]] = defaultdict(list)
        arriving: defaultdict[int, list[tuple[float, tuple[int, int]]]] = defaultdict(list)
        for (a, b), points in self.paths.items():
            leaving[a].append((points[1][0], (a, b)))
            arriving[b].append((points[-2][0], (a, b)))
        starts = {key: p for box, edges in leaving.items() for key, p in self._spread(box, edges, +1)}
        stops = {key: p for box, edges in arriving.items() for key, p in self._spread(box, edges, -1)}
        return {key: (starts[key], stops[key]) for key in self.paths}

    def _spread(
        self, box: int, edges: list[tuple[float, tuple[int, int]]], side: int
    ) -> list[tuple[tuple[int, int], Point]]:
        view = self.views[box]
        step = min(_PORT_STEP, view.w * _PORT_SHARE / len(edges))
        y = view.xy[1] + side * view.h / 2
        first = view.xy[0] - step * (len(edges) - 1) / 2
        return [(key, (first + step * i, y)) for i, (_, key) in enumerate(sorted(edges))]


def _upright(points: list[Point], half: dict[float, float]) -> list[Point]:
    """Bends, stretched to the height of their layer, so that a passing edge bends between layers, not next to boxes."""
    bends = [(x, y + side * half[y]) for x, y in points[1:-1] for side in (-1, 1)]
    return [points[0], *bends, points[-1]]


def _components(count: int, edges: tuple[tuple[int, int], ...]) -> list[list[int]]:
    """Connected components, in order. Those of grandalf depend on the memory addresses of edges."""
    part = list(range(count))  # box -> the smallest box known to be in its component
    for a, b in edges:
        low, high = sorted((part[a], part[b]))
        part = [low if p == high else p for p in part]
    return [[i for i in range(count) if part[i] == first] for first in sorted(set(part))]


def _canvas(width: float, height: float) -> Any:
    figure = Figure(figsize=(width / 72, height / 72), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    return axes


def _draw_edge(axes: Any, points: list[Point]) -> None:
    """Curves with vertical tangents at every point, and an arrow head."""
    x, y = points[-1]
    chain = [*points[:-1], (x, y - _ARROW)]
    vertices, codes = [chain[0]], [Path.MOVETO]
    for (x0, y0), (x1, y1) in pairwise(chain):
        middle = (y0 + y1) / 2
        vertices += [(x0, middle), (x1, middle), (x1, y1)]
        codes += [Path.CURVE4] * 3
    axes.add_patch(PathPatch(Path(vertices, codes), fill=False, edgecolor=_EDGE_COLOR, linewidth=1.1))
    head = [(x, y), (x - _ARROW / 2, y - _ARROW), (x + _ARROW / 2, y - _ARROW)]
    axes.add_patch(Polygon(head, closed=True, facecolor=_EDGE_COLOR, edgecolor=_EDGE_COLOR, linewidth=0.5))


def _draw_box(axes: Any, box: Box, view: _View, left: float, top: float) -> None:
    _, fill, border, ink = box.role.value
    x, y = view.xy[0] + left, view.xy[1] + top
    _rounded(axes, x - view.w / 2, y - view.h / 2, view.w, view.h, fill, border)
    offset = _LINE / 2 if box.detail else 0.0
    _write(axes, box.label, x, y - offset, _LABEL_SIZE, ink, bold=True)
    if box.detail:
        _write(axes, box.detail, x, y + offset, _DETAIL_SIZE, ink)


def _legend(axes: Any, roles: list[Role], left: float, top: float) -> None:
    for role in roles:
        words, fill, border, _ = role.value
        _rounded(axes, left, top, _SWATCH, _SWATCH, fill, border)
        axes.text(
            left + _SWATCH + 6, top + _SWATCH / 2, words, size=_DETAIL_SIZE + 1, family=_FAMILY, va="center_baseline"
        )
        left += _legend_entry_width(role)


def _legend_entry_width(role: Role) -> float:
    return _SWATCH + 6 + _text_width(role.value[0], _DETAIL_SIZE + 1, bold=False) + 20


def _rounded(axes: Any, left: float, top: float, width: float, height: float, fill: str, border: str) -> None:
    style = "round,pad=0,rounding_size=3"
    axes.add_patch(
        FancyBboxPatch((left, top), width, height, boxstyle=style, facecolor=fill, edgecolor=border, linewidth=1.0)
    )


def _write(axes: Any, text: str, x: float, y: float, size: float, color: str, *, bold: bool = False) -> None:
    weight = "bold" if bold else "normal"
    axes.text(x, y, text, size=size, weight=weight, color=color, family=_FAMILY, ha="center", va="center_baseline")


def _box_size(box: Box) -> tuple[float, float]:
    width = max(_text_width(box.label, _LABEL_SIZE, bold=True), _text_width(box.detail, _DETAIL_SIZE, bold=False))
    return width + 2 * _PAD_X, _LINE * (2 if box.detail else 1) + 2 * _PAD_Y


@cache
def _text_width(text: str, size: float, *, bold: bool) -> float:
    font = FontProperties(family=_FAMILY, size=size, weight="bold" if bold else "normal")
    width, _, _ = TextToPath().get_text_width_height_descent(text, font, ismath=False)
    return float(width)
