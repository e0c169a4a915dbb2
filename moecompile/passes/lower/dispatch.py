"""The nodes of a layer's one-device dispatch, which every lowering starts from."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class DispatchNodes:
    """permute (tokens, ids) -> rows, order, counts; experts (rows, counts) -> outputs; unpermute (outputs, weights).

    outputs: the experts call, or the last row-wise module after it (a norm after the experts).
    """

    permute: fx.Node
    rows: fx.Node
    counts: fx.Node
    experts: fx.Node
    outputs: fx.Node
    unpermute: fx.Node

    @classmethod
    def around(cls, experts: fx.Node) -> DispatchNodes:
        """Reads the nodes around an experts call.

        Raises:
            ValueError: the call is not between one permute and one unpermute.
        """
        rows, counts = experts.args[:2]
        assert isinstance(rows, fx.Node) and isinstance(counts, fx.Node)
        permute, outputs, users = rows.args[0], experts, list(experts.users)
        assert isinstance(permute, fx.Node)
        while len(users) == 1 and users[0].op == "call_module":
            outputs, users = users[0], list(users[0].users)
        if _op(permute) != "permute" or len(users) != 1 or _op(users[0]) != "unpermute":
            raise ValueError(f"{experts.name} is not between one permute and one unpermute")
        return cls(permute, rows, counts, experts, outputs, users[0])

    def feed(self, rows: fx.Node, counts: fx.Node) -> None:
        """Makes the experts read these rows; any further arguments (weights of existing experts) stay."""
        self.experts.args = (rows, counts, *self.experts.args[2:])

    @property
    def tokens(self) -> fx.Node:
        """x_TD."""
        return _node(self.permute.args[0])

    @property
    def ids(self) -> fx.Node:
        """ids_TK."""
        return _node(self.permute.args[1])

    @property
    def after_choice(self) -> fx.Node:
        """The first node after the ids: counts are sent from here, before work that does not need them."""
        node = self.ids.next
        while node.op == "placeholder" or node.target is operator.getitem:
            node = node.next
        return node

    @property
    def dropless(self) -> bool:
        """Whether no assignment is dropped."""
        return bool(self.permute.args[3]) if len(self.permute.args) > 3 else True

    @property
    def weights(self) -> fx.Node:
        """weights_TK."""
        return _node(self.unpermute.args[2])


def _op(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def _node(value: object) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value
