"""A timeline of a graph with asynchronous exchanges, read from the graph itself, not from the plan.

A column is an event: a start, a wait, or a call of experts. A bar is an all-to-all of rows, from its start to its wait.

    rows 0 ->  ├──────────────┤
    rows 1 ->     ├────────────────────┤
    rows 0 <-                       ├──────────┤
    rows 1 <-                                ├─────┤
    computing        shared   0        1
"""

from __future__ import annotations

from collections import Counter

from torch.fx import GraphModule, Node

from moecompile.passes.base import op_name
from moecompile.plan import HALVES

_START, _WAIT = HALVES["all_to_all"]
_COLUMN = 3  # characters


def timeline(graph_module: GraphModule) -> str:
    """One line per exchange and one for the computation; empty if no exchange is asynchronous."""
    events = [node for node in graph_module.graph.nodes if op_name(node) in (_START, _WAIT) or _computes(node)]
    waits = {_start_of(node): i for i, node in enumerate(events) if op_name(node) == _WAIT}
    if not waits:
        return ""
    seen: Counter[str] = Counter()
    lines: dict[str, str] = {}
    computing = ""
    for i, node in enumerate(events):
        if node in waits:
            name = _name(node)
            start, end = _COLUMN * i, _COLUMN * waits[node]
            lines[name.format(seen[name])] = " " * start + "├" + "─" * (end - start - 1) + "┤"
            seen[name] += 1
        elif _computes(node):
            word = "shared" if op_name(node).startswith("shared") else str(seen["experts"])
            seen["experts"] += word != "shared"
            computing = computing.ljust(_COLUMN * i) + word + " "
    lines["computing"] = computing.rstrip()
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {line}" for name, line in lines.items())


def _computes(node: Node) -> bool:
    return node.op == "call_module" and op_name(node).startswith(("experts", "shared_experts"))


def _start_of(wait: Node) -> Node:
    (start,) = wait.args[0].all_input_nodes  # type: ignore[union-attr]
    return start


def _name(start: Node) -> str:
    """`rows {} ->` (dispatch) or `rows {} <- intra` (combine): {} for the chunk, and the level if there are two."""
    axis = str(start.args[-1])
    level = f" {axis.rpartition('_')[2]}" if axis.endswith(("_inter", "_intra")) else ""
    return f"rows {{}} {'<-' if start.args[3] else '->'}{level}"
