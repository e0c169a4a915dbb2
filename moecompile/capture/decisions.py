"""Which arguments the Python of a traced module branches on, and which it only passes on.

A proxy cannot observe `is None`. So the module is traced again with proxies in place of plain values. If the graph is
the same except where a plain value was passed on, no branch depends on it and the graph accepts any value. Otherwise
the value is a constant, and the graph asserts it.

Algorithm:
  1. Trace with plain values.
  2. Trace with proxies for all of them; if the graph changes, try each alone.
  3. For each argument that was not None but may be: trace with None. If the graph changes, Python branches on it.
  4. Assert all values that Python branches on.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from moecompile.capture.guided import PLAIN, GuidedTracer
from moecompile.torch_private import check


def trace_guarded(
    module: nn.Module, arguments: Mapping[str, Any], inlined: Collection[str] | None
) -> tuple[fx.Graph, dict[str, Holds]]:
    """A graph that asserts every plain value that the module's Python branches on, and its assertions on arguments."""
    tracer = GuidedTracer(arguments, inlined)  # Step 1
    graph = tracer.trace_calls(module)
    constants = dict(tracer.sources)
    if constants:  # Step 2
        traced = _same_trace(module, tracer, graph, arguments, set(constants))
        if traced is None:
            passed_on = [name for name in constants if _same_trace(module, tracer, graph, arguments, {name})]
            traced = _same_trace(module, tracer, graph, arguments, passed_on)
        if traced is not None:
            tracer, graph = traced
    needed = _not_optional(module, tracer, graph, arguments)  # Step 3
    asserted: dict[str, Holds] = {}
    for node in list(graph.nodes):  # Step 4
        if node.name in tracer.sources:
            value = tracer.sources[node.name]
            name = str(node.target).strip("*") if node.op == "placeholder" else node.name
            rule = f"{name} was {value} when the model was captured"
            holds = Holds(operator.is_ if value is None else operator.eq, value, rule)
        elif node in needed:
            holds = Holds(operator.is_not, None, f"{node.target} was given when the model was captured")
        else:
            continue
        _assert(graph, node, holds)
        if node.op == "placeholder":
            asserted[str(node.target)] = holds
    return graph, asserted


@dataclass(frozen=True)
class Holds:
    """The assertion `test(argument, value)`; if it fails, the graph raises with the message `rule`."""

    test: Callable[[Any, Any], bool]
    value: Any
    rule: str


_Traced = tuple[GuidedTracer, fx.Graph]


def _same_trace(
    module: nn.Module, tracer: GuidedTracer, graph: fx.Graph, arguments: Mapping[str, Any], opaque: Collection[str]
) -> _Traced | None:
    """The trace with proxies for `opaque`, if it gives the same graph."""
    other_tracer = GuidedTracer(arguments, tracer.inlined, opaque)
    try:
        other = other_tracer.trace_calls(module)
    except Exception:  # a proxy does not support what Python does with the value
        return None
    return (other_tracer, other) if _same(graph, tracer, other, other_tracer) else None


def _same(a: fx.Graph, in_a: GuidedTracer, b: fx.Graph, in_b: GuidedTracer) -> bool:
    """Whether two graphs are equal, except for plain values in one that are nodes in the other."""
    partner: dict[fx.Node, fx.Node] = {}
    for x, y in zip(a.nodes, b.nodes, strict=False):
        if (x.op, x.target) != (y.op, y.target):
            return False
        if not _equal((x.args, x.kwargs), (y.args, y.kwargs), partner, in_a.values, in_b.values):
            return False
        partner[x] = y
    return len(a.nodes) == len(b.nodes)


def _equal(
    x: Any, y: Any, partner: Mapping[fx.Node, fx.Node], in_x: Mapping[fx.Node, Any], in_y: Mapping[fx.Node, Any]
) -> bool:
    if isinstance(x, fx.Node) and isinstance(y, fx.Node):
        return partner.get(x) is y
    if isinstance(x, fx.Node) or isinstance(y, fx.Node):
        node, value, values = (x, y, in_x) if isinstance(x, fx.Node) else (y, x, in_y)
        return isinstance(values[node], PLAIN) and type(values[node]) is type(value) and values[node] == value
    if isinstance(x, (tuple, list)) and isinstance(y, (tuple, list)):
        return len(x) == len(y) and all(_equal(i, j, partner, in_x, in_y) for i, j in zip(x, y, strict=True))
    if isinstance(x, dict) and isinstance(y, dict):
        return list(x) == list(y) and all(_equal(x[key], y[key], partner, in_x, in_y) for key in x)
    return type(x) is type(y) and bool(x == y)


def _not_optional(
    module: nn.Module, tracer: GuidedTracer, graph: fx.Graph, arguments: Mapping[str, Any]
) -> list[fx.Node]:
    """Placeholders of arguments that may be None but were not, and whose absence changes the graph."""
    parameters = inspect.signature(module.forward).parameters
    needed = []
    for node in graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if arguments.get(name) is None or name not in parameters or parameters[name].default is not None:
            continue
        without = GuidedTracer({**arguments, name: None}, tracer.inlined, tracer.opaque)
        try:
            other = without.trace_calls(module)
        except Exception:  # the module itself fails without it
            continue
        tracer.values[node] = None
        if not _same(graph, tracer, other, without):
            needed.append(node)
        tracer.values[node] = arguments[name]
    return needed


def _assert(graph: fx.Graph, node: fx.Node, holds: Holds) -> None:
    last = next(n for n in reversed(graph.nodes) if n.op == "placeholder") if node.op == "placeholder" else node
    with graph.inserting_after(last):
        test = graph.call_function(holds.test, (node, holds.value))
    with graph.inserting_after(test):
        graph.call_function(check, (test, holds.rule))
