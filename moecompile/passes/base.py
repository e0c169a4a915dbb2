"""What all passes share: the record of what a pass did, and the contract check that runs between every two of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch.fx import Graph, GraphModule, Node


@dataclass(frozen=True, kw_only=True)
class PassRecord:
    """What one pass did, for the console: "after lower: 12 -> 19 nodes, +3 all_to_all".

    nodes_before, nodes_after: graph nodes over all regions. added: op name -> how many nodes were added. detail: one
    line in words. seconds: wall time.
    """

    name: str
    nodes_before: int
    nodes_after: int
    added: dict[str, int] = field(default_factory=dict)
    detail: str = ""
    seconds: float = 0.0


def op_name(node: Node) -> str:
    """A short name of what the node does: `all_to_all`, `experts`, `silu`."""
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target)).split(".")[0]
    return str(node.target).rsplit(".", 1)[-1]


def erase_unused(graph: Graph) -> None:
    """Erases attributes, our own ops and their items that nobody reads.

    Not `eliminate_dead_code`: it would also erase the user's in-place methods (`h.add_(1)`), whose results go unread.
    """
    for node in reversed(list(graph.nodes)):
        if not node.users and _reads_only(node):
            graph.erase_node(node)


def _reads_only(node: Node) -> bool:
    if op_name(node) == "getitem" and node.op == "call_function":
        return isinstance(node.args[0], Node) and (is_ours(node.args[0]) or node.args[0].op == "call_module")
    return node.op == "get_attr" or is_ours(node)


def is_ours(node: Node) -> bool:
    """Whether the node is one of our registered ops; `x.permute(0, 2, 1)` of the user is not."""
    return node.op == "call_function" and str(node.target).startswith("moecompile.")


def count_ops(graph_module: GraphModule) -> Counter[str]:
    """How often each op occurs, placeholders, attributes and outputs left out."""
    return Counter(
        op_name(n) for n in graph_module.graph.nodes if n.op in ("call_function", "call_module", "call_method")
    )
