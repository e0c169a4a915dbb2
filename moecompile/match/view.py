"""A graph with the module that its attribute paths refer to, and the queries that the search for FFNs needs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import fx, nn

from moecompile.match.linears import Linear, attribute, read_linears
from moecompile.match.pointwise import torch_name


class GraphView:
    """A graph and the module that its attribute paths refer to (the traced module, or the recorded model)."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph, self.root = graph, root

    @cached_property
    def linears(self) -> dict[fx.Node, Linear]:
        """Every linear of the graph, in graph order, however it is written."""
        return read_linears(self.graph, self.root)

    @cached_property
    def weight_users(self) -> dict[int, list[fx.Node]]:
        """Id of a weight -> the nodes that use it; tied weights share an id."""
        users: dict[int, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                users.setdefault(id(self.tensor(str(node.target))), []).extend(node.users)
            elif node.op == "call_module":
                for parameter in self.module(str(node.target)).parameters():
                    users.setdefault(id(parameter), []).append(node)
        return users

    @cached_property
    def position(self) -> dict[fx.Node, int]:
        """Node -> position in the graph."""
        return {node: i for i, node in enumerate(self.graph.nodes)}

    def name(self, node: object) -> str:
        """The torch name of a node's op: `linear`, `gelu`, `layer_norm`; empty for anything else."""
        return torch_name(node, self.module) if isinstance(node, fx.Node) else ""

    def module(self, path: str) -> nn.Module:
        """The submodule at `path`."""
        return self.root.get_submodule(path)

    def tensor(self, path: str) -> object:
        """The attribute at `path`."""
        return attribute(self.root, path)


def common_owner(paths: Sequence[str]) -> str:
    """The longest module path that contains all attribute (or module) paths."""
    parts = [path.split(".")[:-1] for path in paths]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    # The common path of two linears is their parent; of one linear alone it is the linear.
    return ".".join(shared)
