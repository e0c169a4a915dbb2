"""Shows graphs: listings, stable summaries for golden files, timelines of exchanges, and pictures."""

from __future__ import annotations

import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import torch
from grandalf.graphs import Edge, Vertex, graph_core
from grandalf.layouts import SugiyamaLayout
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextToPath
from torch.fx import GraphModule, Node

from moecompile.passes.base import GRAD_TOKEN, op_name
from moecompile.passes.types import SHOWN
from moecompile.plan import EXCHANGE_OPS, HALVES, WAIT_OPS
from moecompile.report.text import plural
from moecompile.torch_private import OPS

# -- listings and summaries --------------------------------------------------------------------------------------------


_EXPERT_MODULES = {"router", "experts", "shared_experts"}
_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip


def write_graphs(stages: Mapping[str, GraphModule], folder: Path, stem: str) -> None:
    """Writes `<stem>.<stage>.txt` (listing and Python code) and `<stem>.<stage>.svg` (picture) for every stage.

    Args:
        stages: `captured`, `rewritten`, `lowered` -> graph. stem: file name, the region's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = stem.replace("/", "_")  # a key of a dict of modules may have any character but a dot
    for stage, graph_module in stages.items():
        title = f"{stem}, {stage}: {_counts(graph_module)}"
        in_flight = timeline(graph_module)
        parts = [f"# {title}", *([in_flight] if in_flight else []), listing(graph_module), graph_module.code.strip()]
        text = "\n\n".join(parts) + "\n"
        (folder / f"{file}.{stage}.txt").write_text(text, encoding="utf-8")
        draw([picture(graph_module, title)], folder / f"{file}.{stage}.svg")


def write_before_after(before: GraphModule, after: GraphModule, path: Path) -> None:
    """Draws both graphs side by side; the suffix of `path` (`.svg`, `.png`) determines the format."""
    titled = {"before": before, "after": after}
    draw([picture(graph, f"{name}: {_counts(graph)}") for name, graph in titled.items()], path)


def graph_summary(graph_module: GraphModule) -> str:
    """The graph op by op, for golden files: values are numbered, so node names do not matter.

    %0 = placeholder x
    %1 = moecompile.flatten_tokens(%0)
    %2 = router[Router](%1)
    output(%2)
    """
    numbers = {node: f"%{i}" for i, node in enumerate(graph_module.graph.nodes)}
    lines = []
    for node in graph_module.graph.nodes:
        call = _call(node, graph_module, numbers.__getitem__)
        lines.append(call if node.op == "output" else f"{numbers[node]} = {call}")
    return "\n".join(lines) + "\n"


def listing(graph_module: GraphModule) -> str:
    """One line per node: name = op(args), shape and dtype if they are known, and from `lower` on its type."""

    def known(node: Node) -> str:
        return "; ".join(filter(None, (_value_text(node.meta.get("val")), node.meta.get(SHOWN))))

    nodes = graph_module.graph.nodes
    rows = [(node.name, _call(node, graph_module, lambda n: n.name), known(node)) for node in nodes]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(
        f"{name:<{widths[0]}} = {call:<{widths[1]}}  # {value}" if value else f"{name:<{widths[0]}} = {call}"
        for name, call, value in rows
    )


def picture(graph_module: GraphModule, title: str) -> Picture:
    """The graph as a picture, without weights and tuple unpacking; edges skip these nodes."""
    hidden = {n for n in graph_module.graph.nodes if n.op == "get_attr" or _unpacks(n)}
    index = {node: i for i, node in enumerate(n for n in graph_module.graph.nodes if n not in hidden)}
    boxes = [_box(node, graph_module) for node in index]
    edges = {(index[source], i): None for node, i in index.items() for source in _producers(node, hidden)}
    return Picture(title=title, boxes=tuple(boxes), edges=tuple(edges))


def _unpacks(node: Node) -> bool:
    """Whether the node unpacks a tuple, rather than indexing a tensor."""
    return node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[1], int)


def _producers(node: Node, hidden: set[Node]) -> Iterator[Node]:
    for source in node.all_input_nodes:
        if source in hidden:
            yield from _producers(source, hidden)
        else:
            yield source


def _box(node: Node, graph_module: GraphModule) -> Box:
    if node.op in ("placeholder", "output"):
        return Box(label=str(node.target), detail=_value_text(node.meta.get("val")), role=Role.BOUNDARY)
    name = op_name(node)
    role = _role(node, name)
    detail = _value_text(node.meta.get("val"))
    if node.op == "call_module" and not detail:
        module = graph_module.get_submodule(str(node.target))
        detail = module.extra_repr() if role is Role.EXPERTS else type(module).__name__
    return Box(label=name, detail=detail, role=role)


def _role(node: Node, name: str) -> Role:
    if name in EXCHANGE_OPS | WAIT_OPS:
        return Role.EXCHANGE
    if node.op == "call_module" and re.sub(r"_\d+$", "", name) in _EXPERT_MODULES:
        return Role.EXPERTS
    if _qualified(node).startswith("moecompile."):
        return Role.ROWS
    return Role.COMPUTE


def _counts(graph_module: GraphModule) -> str:
    nodes = list(graph_module.graph.nodes)
    exchanges = sum(n.op == "call_function" and op_name(n) in EXCHANGE_OPS for n in nodes)
    return plural(len(nodes), "node") + (f", {plural(exchanges, 'exchange')}" if exchanges else "")


def _call(node: Node, graph_module: GraphModule, name_of: Callable[[Node], str]) -> str:
    """The operation of a node in one line, without its result."""
    if node.op in ("placeholder", "get_attr"):
        return f"{node.op} {node.target}"
    args = [_argument(arg, name_of) for arg in node.args]
    args += [f"{key}={_argument(value, name_of)}" for key, value in node.kwargs.items()]
    called = _qualified(node)
    if node.op == "call_module":
        called = f"{node.target}[{type(graph_module.get_submodule(str(node.target))).__name__}]"
    return f"{called}({', '.join(args)})"


def _qualified(node: Node) -> str:
    """`moecompile.permute` or `aten.add.Tensor` for registered ops, the bare name for everything else."""
    if isinstance(node.target, OPS):
        return str(node.target).removesuffix(".default")
    return op_name(node)


def _argument(value: Any, name_of: Callable[[Node], str]) -> str:
    if isinstance(value, Node):
        return name_of(value)
    if isinstance(value, list | tuple):
        inside = ", ".join(_argument(item, name_of) for item in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_argument(item, name_of)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        return ":".join("" if v is None else _argument(v, name_of) for v in (value.start, value.stop, value.step))
    if isinstance(value, torch.dtype):
        return _dtype_text(value)
    return value.__name__ if callable(value) and hasattr(value, "__name__") else repr(value)


def _value_text(value: Any) -> str:
    """`f32[16, 64]`, or several of these; empty if nothing is known."""
    if isinstance(value, torch.Tensor):
        return f"{_dtype_text(value.dtype)}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(_value_text, value)))
    return ""


def _dtype_text(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


# -- a timeline --------------------------------------------------------------------------------------------------------


_START, _WAIT = HALVES["all_to_all"]
_COLUMN = 3  # characters


def timeline(graph_module: GraphModule) -> str:
    """A timeline of a graph with asynchronous exchanges, read from the graph itself, not from the plan.

    For either direction, one line per exchange and one for the computation; empty if none is asynchronous. A column is
    an event: a start, a wait, or something that is computed. A bar is an all-to-all of rows, from its start to its
    wait. Backward is the same graph from its end to its beginning: the backward of a wait starts an exchange of
    gradients, and the backward of the start waits for it. Weight gradients are computed where the graph makes their
    token.

        rows 0 ->   ├────────┤
        rows 1 ->      ├──────────────┤
        rows 0 <-                  ├───────────┤
        rows 1 <-                           ├─────┤
        computing         shared 0       1

        grads 1 ->  ├─────┤
        grads 0 ->     ├───────────┤
        grads 1 <-               ├─────────────────┤
        grads 0 <-                        ├───────────┤
        computing            1        0     weights shared
    """
    events = [node for node in graph_module.graph.nodes if op_name(node) in (_START, _WAIT) or _computes(node)]
    waits = {_start_of(node): node for node in events if op_name(node) == _WAIT}
    if not waits:
        return ""
    seen: Counter[str] = Counter()
    numbers = {}
    for start in waits:
        name = _exchange_name(start)
        numbers[start] = (name, seen[name])
        seen[name] += 1
    calls = [node for node in events if _word(node) == "experts"]

    def word(node: Node) -> str:
        return str(calls.index(node)) if node in calls else _word(node)

    forward = [node for node in events if _word(node) != "weights"]
    names = {start: f"rows {number} {name}" for start, (name, number) in numbers.items()}
    back = {wait: f"grads {numbers[start][1]} {_turned(numbers[start][0])}" for start, wait in waits.items()}
    parts = [_drawn(forward, waits, names, word)]
    if len(forward) < len(events):
        parts.append(_drawn(events[::-1], {wait: start for start, wait in waits.items()}, back, word))
    return "\n\n".join(parts)


def _drawn(
    events: Sequence[Node], ends: Mapping[Node, Node], names: Mapping[Node, str], word: Callable[[Node], str]
) -> str:
    """ends: where a bar begins -> where it ends."""
    place, x = dict[Node, int](), 0
    for node in events:
        place[node] = x
        x += max(_COLUMN, len(word(node)) + 1) if _computes(node) else _COLUMN
    lines, computing = dict[str, str](), ""
    for node in events:
        if node in ends:
            begin, end = place[node], place[ends[node]]
            lines[names[node]] = " " * begin + "├" + "─" * (end - begin - 1) + "┤"
        elif _computes(node):
            computing = computing.ljust(place[node]) + word(node)
    lines["computing"] = computing
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {line}" for name, line in lines.items())


def _computes(node: Node) -> bool:
    is_call = node.op == "call_module" and op_name(node).startswith(("experts", "shared_experts"))
    return is_call or op_name(node) == GRAD_TOKEN


def _word(node: Node) -> str:
    """experts, shared, or weights: the weight gradients of experts, in backward."""
    if not _computes(node):
        return ""
    if op_name(node) == GRAD_TOKEN:
        return "weights"
    return "shared" if op_name(node).startswith("shared") else "experts"


def _start_of(wait: Node) -> Node:
    (start,) = wait.args[0].all_input_nodes  # type: ignore[union-attr]
    return start


def _exchange_name(start: Node) -> str:
    """`->` (dispatch) or `<- intra` (combine), with the level if there are two."""
    axis = str(start.args[-1])
    level = f" {axis.rpartition('_')[2]}" if axis.endswith(("_inter", "_intra")) else ""
    return f"{'<-' if start.args[3] else '->'}{level}"


def _turned(name: str) -> str:
    return name.replace("->", "<-") if "->" in name else name.replace("<-", "->")


# -- pictures ----------------------------------------------------------------------------------------------------------


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


def draw(pictures: list[Picture], path: Path) -> None:
    """Draws `pictures` side by side into one file; the suffix (`.svg`, `.png`) determines the format.

    Algorithm, lengths in points (1/72 inch), y downwards; a Sugiyama layout (grandalf), matplotlib without pyplot:
      1. Size every box by its text.
      2. Lay out each connected component, top to bottom, and place the components side by side.
      3. Draw each edge as a chain of curves through the layout's bends, with ends spread along a box so that they do
         not touch; then the boxes over them, a title above every graph and one legend.
    The same graph gives the same bytes: no dates, no random ids, text as outlines of matplotlib's own font.
    """
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
    vertices, codes = [chain[0]], [Outline.MOVETO]
    for (x0, y0), (x1, y1) in pairwise(chain):
        middle = (y0 + y1) / 2
        vertices += [(x0, middle), (x1, middle), (x1, y1)]
        codes += [Outline.CURVE4] * 3
    axes.add_artist(PathPatch(Outline(vertices, codes), fill=False, edgecolor=_EDGE_COLOR, linewidth=1.1))
    head = [(x, y), (x - _ARROW / 2, y - _ARROW), (x + _ARROW / 2, y - _ARROW)]
    axes.add_artist(Polygon(head, closed=True, facecolor=_EDGE_COLOR, edgecolor=_EDGE_COLOR, linewidth=0.5))


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
    axes.add_artist(
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
