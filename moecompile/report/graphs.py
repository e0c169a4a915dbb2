"""Shows graphs: listings, stable summaries for golden files, and pictures. The only file here that imports torch."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moecompile.passes.base import op_name
from moecompile.plan import EXCHANGE_OPS, WAIT_OPS
from moecompile.report.picture import Box, Picture, Role, draw
from moecompile.report.text import plural
from moecompile.report.timeline import timeline
from moecompile.torch_private import OPS

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
    """One line per node: name = op(args), and shape and dtype if they are known."""
    rows = [
        (node.name, _call(node, graph_module, lambda n: n.name), _value_text(node.meta.get("val")))
        for node in graph_module.graph.nodes
    ]
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
