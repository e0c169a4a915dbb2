"""A matched FFN, and the registry of user patterns for FFNs that the compiler does not know."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx
from torch.utils.hooks import RemovableHandle

from moecompile.match.linears import Linear
from moecompile.match.pointwise import describe
from moecompile.match.view import GraphView


@dataclass(frozen=True)
class FFNMatch:
    """A dense FFN in a graph.

    Attributes:
        ins: the linears before the activation, gate first.
        pointwise: the nodes between them and the last linear, in graph order.
        down: the last linear.
        asks: nodes that query sizes and dtypes inside and whose results are used only inside.
        whole: whether the pointwise nodes need all hidden units of a token at once (a norm), so that experts cannot be
            slices of the FFN.
    """

    ins: tuple[Linear, ...]
    pointwise: tuple[fx.Node, ...]
    down: Linear
    asks: tuple[fx.Node, ...] = ()
    whole: bool = False

    @property
    def kind(self) -> str:
        """`gated` or `up_down`."""
        return "gated" if len(self.ins) == 2 else "up_down"

    @property
    def activation(self) -> str:
        """Names of the pointwise operations: `silu, mul`."""
        return describe(self.pointwise)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes of the FFN."""
        ins = dict.fromkeys(node for linear in self.ins for node in linear.nodes)  # rows of one linear share its nodes
        return (*ins, *self.pointwise, *self.down.reads, *self.down.nodes, *self.asks)


@dataclass(frozen=True)
class NearMiss:
    """Something that looks like an FFN but cannot be rewritten. weight: attribute path of its last linear."""

    weight: str
    reason: str


def activation_module(root: fx.GraphModule, match: FFNMatch) -> fx.GraphModule:
    """The pointwise operations of a match as a separate module with one argument per linear, gate first."""
    graph = fx.Graph()
    names = ("gate", "up") if match.kind == "gated" else ("up",)
    env = {linear.node: graph.placeholder(name) for linear, name in zip(match.ins, names, strict=True)}

    def copied(node: fx.Node) -> fx.Node:
        if node not in env and node.op == "get_attr":  # a parameter of the activation: the experts share it
            env[node] = graph.get_attr(str(node.target))
        return env[node]

    for node in match.pointwise:
        env[node] = graph.node_copy(node, copied)
    graph.output(env[match.down.x])
    activation = fx.GraphModule(root, graph, class_name="Activation")
    return copy.deepcopy(activation)


Pattern = Callable[[Linear, GraphView], FFNMatch | None]
_patterns: OrderedDict[int, Pattern] = OrderedDict()


def register_pattern(pattern: Pattern) -> RemovableHandle:
    """Makes the compiler look for one more form of FFN.

    Args:
        pattern: called with every linear of a graph and the graph's `GraphView`. Returns the FFN that ends there, or
            None. The nodes between the linears may be anything that maps each token independently of the others.

    Returns:
        A handle; `handle.remove()`, or the end of a `with handle:`, unregisters the pattern.
    """
    handle = RemovableHandle(_patterns)
    _patterns[handle.id] = pattern
    return handle


def registered_patterns() -> Sequence[Pattern]:
    """The patterns in order of registration."""
    return tuple(_patterns.values())
