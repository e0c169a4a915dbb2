"""Which arguments a traced module's Python decides by, and which it only passes on.

`is None` cannot be seen by a proxy. So the module is traced again with proxies where it saw plain values: if the graph
is the same but for the places where a plain value was handed on, no decision depended on it, and the graph takes
whatever it is given there. Else the value is a constant, and the graph asserts it.

Algorithm:
  1. Trace with every plain value as it is.
  2. Trace with all of them as proxies; where that gives another graph, find out one by one.
  3. An argument that was given and may be None: trace without it. Another graph means that Python asks for it.
  4. Assert what Python decided by.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moecompile.capture.guided import PLAIN, GuidedTracer


def trace_guarded(
    module: nn.Module, arguments: Mapping[str, Any], inlined: Collection[str] | None
) -> tuple[fx.Graph, dict[str, Holds]]:
    """A graph that asserts every plain value that the module's Python decides by, and what it asserts of arguments."""
    tracer = GuidedTracer(arguments, inlined)  # Step 1
    graph = tracer.trace_calls(module)
    constants = dict(tracer.sources)
    if constants:  # Step 2
        alone = [set(constants)]
        if (found := _traced_alike(module, tracer, graph, arguments, alone[0])) is None:
            alone = [{name} for name in constants if _traced_alike(module, tracer, graph, arguments, {name})]
            found = _traced_alike(module, tracer, graph, arguments, set().union(*alone))
        if found is not None:
            tracer, graph = found
    needed = _asked_for(module, tracer, graph, arguments)  # Step 3
    asserted: dict[str, Holds] = {}
    for node in list(graph.nodes):  # Step 4
        if node.name in tracer.sources:
            value = tracer.sources[node.name]
            what = str(node.target).strip("*") if node.op == "placeholder" else node.name
            rule = f"{what} was {value} when the model was captured"
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
    """`test(argument, value)` is true, or the graph raises with `rule`."""

    test: Callable[[Any, Any], bool]
    value: Any
    rule: str


_Traced = tuple[GuidedTracer, fx.Graph]


def _traced_alike(
    module: nn.Module, tracer: GuidedTracer, graph: fx.Graph, arguments: Mapping[str, Any], opaque: Collection[str]
) -> _Traced | None:
    """The trace with proxies for `opaque`, if it is the same graph."""
    again = GuidedTracer(arguments, tracer.inlined, opaque)
    try:
        other = again.trace_calls(module)
    except Exception:  # Python did something with the value that a proxy does not do
        return None
    return (again, other) if _same(graph, tracer, other, again) else None


def _same(a: fx.Graph, in_a: GuidedTracer, b: fx.Graph, in_b: GuidedTracer) -> bool:
    """Whether two graphs are equal but for plain values in one that are nodes in the other."""
    partner: dict[fx.Node, fx.Node] = {}
    for x, y in zip(a.nodes, b.nodes, strict=False):
        if (x.op, x.target) != (y.op, y.target):
            return False
        if not _alike((x.args, x.kwargs), (y.args, y.kwargs), partner, in_a.values, in_b.values):
            return False
        partner[x] = y
    return len(a.nodes) == len(b.nodes)


def _alike(
    x: Any, y: Any, partner: Mapping[fx.Node, fx.Node], in_x: Mapping[fx.Node, Any], in_y: Mapping[fx.Node, Any]
) -> bool:
    if isinstance(x, fx.Node) and isinstance(y, fx.Node):
        return partner.get(x) is y
    if isinstance(x, fx.Node) or isinstance(y, fx.Node):
        node, value, known = (x, y, in_x) if isinstance(x, fx.Node) else (y, x, in_y)
        return isinstance(known[node], PLAIN) and type(known[node]) is type(value) and known[node] == value
    if isinstance(x, (tuple, list)) and isinstance(y, (tuple, list)):
        return len(x) == len(y) and all(_alike(i, j, partner, in_x, in_y) for i, j in zip(x, y, strict=True))
    if isinstance(x, dict) and isinstance(y, dict):
        return list(x) == list(y) and all(_alike(x[key], y[key], partner, in_x, in_y) for key in x)
    return type(x) is type(y) and bool(x == y)


def _asked_for(module: nn.Module, tracer: GuidedTracer, graph: fx.Graph, arguments: Mapping[str, Any]) -> list[fx.Node]:
    """Placeholders of arguments that may be None and were not, and without which Python takes another way."""
    parameters = inspect.signature(module.forward).parameters
    asked = []
    for node in graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if arguments.get(name) is None or name not in parameters or parameters[name].default is not None:
            continue
        without = GuidedTracer({**arguments, name: None}, tracer.inlined, tracer.opaque)
        try:
            other = without.trace_calls(module)
        except Exception:  # the module itself cannot do without
            continue
        tracer.values[node] = None
        if not _same(graph, tracer, other, without):
            asked.append(node)
        tracer.values[node] = arguments[name]
    return asked


def _assert(graph: fx.Graph, node: fx.Node, holds: Holds) -> None:
    last = next(n for n in reversed(graph.nodes) if n.op == "placeholder") if node.op == "placeholder" else node
    with graph.inserting_after(last):
        test = graph.call_function(holds.test, (node, holds.value))
    with graph.inserting_after(test):
        graph.call_function(torch._assert, (test, holds.rule))
