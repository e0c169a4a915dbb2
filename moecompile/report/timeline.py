"""A timeline of a graph with asynchronous exchanges, read from the graph itself, not from the plan.

A column is an event: a start, a wait, or something that is computed. A bar is an all-to-all of rows, from its start to
its wait. Backward is the same graph from its end to its beginning: the backward of a wait starts an exchange of
gradients, and the backward of the start waits for it. Weight gradients are computed where the graph makes their token.

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

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from torch.fx import GraphModule, Node

from moecompile.passes.base import GRAD_TOKEN, op_name
from moecompile.plan import HALVES

_START, _WAIT = HALVES["all_to_all"]
_COLUMN = 3  # characters


def timeline(graph_module: GraphModule) -> str:
    """For either direction, one line per exchange and one for the computation; empty if none is asynchronous."""
    events = [node for node in graph_module.graph.nodes if op_name(node) in (_START, _WAIT) or _computes(node)]
    waits = {_start_of(node): node for node in events if op_name(node) == _WAIT}
    if not waits:
        return ""
    seen: Counter[str] = Counter()
    numbers = {}
    for start in waits:
        name = _name(start)
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


def _name(start: Node) -> str:
    """`->` (dispatch) or `<- intra` (combine), with the level if there are two."""
    axis = str(start.args[-1])
    level = f" {axis.rpartition('_')[2]}" if axis.endswith(("_inter", "_intra")) else ""
    return f"{'<-' if start.args[3] else '->'}{level}"


def _turned(name: str) -> str:
    return name.replace("->", "<-") if "->" in name else name.replace("<-", "->")
