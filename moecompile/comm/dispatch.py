"""The one-device dispatch of a layer, as nodes: what every exchange starts from."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class DispatchNodes:
    """permute (tokens, ids) -> rows, order, counts; experts (rows, counts) -> outputs; unpermute (outputs, weights)."""

    permute: fx.Node
    rows: fx.Node
    counts: fx.Node
    experts: fx.Node
    unpermute: fx.Node

    @classmethod
    def around(cls, experts: fx.Node) -> DispatchNodes:
        """Reads the nodes around an experts call.

        Raises:
            ValueError: the call does not stand between one permute and one unpermute.
        """
        rows, counts = experts.args
        assert isinstance(rows, fx.Node) and isinstance(counts, fx.Node)
        permute, users = rows.args[0], list(experts.users)
        assert isinstance(permute, fx.Node)
        if _op(permute) != "permute" or len(users) != 1 or _op(users[0]) != "unpermute":
            raise ValueError(f"{experts.name} does not stand between one permute and one unpermute")
        return cls(permute, rows, counts, experts, users[0])

    @property
    def tokens(self) -> fx.Node:
        """x_TD."""
        return _node(self.permute.args[0])

    @property
    def ids(self) -> fx.Node:
        """ids_TK."""
        return _node(self.permute.args[1])

    @property
    def weights(self) -> fx.Node:
        """weights_TK."""
        return _node(self.unpermute.args[2])


def items(graph: fx.Graph, node: fx.Node, *names: str) -> tuple[fx.Node, ...]:
    """The outputs of a node that returns several tensors, named for people who read the graph."""
    return tuple(
        graph.create_node("call_function", operator.getitem, (node, i), name=name) for i, name in enumerate(names)
    )


def _op(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def _node(value: object) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value
