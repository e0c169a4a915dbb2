"""Forms of FFNs: what is found of one, and the patterns that users add for forms that the compiler does not know."""

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

    ins: the linears before the activation, gate first. pointwise: what is between them and the last one, in graph
    order. asks: nodes that ask for sizes and dtypes inside, and whose answers are used inside alone. whole: whether
    what is between needs all hidden units of a token at once (a norm), so that experts cannot be slices of it.
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
        """The pointwise operations in words: `silu, mul`."""
        return describe(self.pointwise)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Every node that the FFN consists of."""
        ins = dict.fromkeys(node for linear in self.ins for node in linear.nodes)  # rows of one linear share its nodes
        return (*ins, *self.pointwise, *self.down.reads, *self.down.nodes, *self.asks)


@dataclass(frozen=True)
class NearMiss:
    """What looks like an FFN and is none. weight: attribute path of its last linear."""

    weight: str
    reason: str


def activation_module(root: fx.GraphModule, match: FFNMatch) -> fx.GraphModule:
    """The pointwise operations of a match as a module of their own: one argument per linear, gate first."""
    graph = fx.Graph()
    names = ("gate", "up") if match.kind == "gated" else ("up",)
    env = {linear.node: graph.placeholder(name) for linear, name in zip(match.ins, names, strict=True)}

    def copied(node: fx.Node) -> fx.Node:
        if node not in env and node.op == "get_attr":  # a parameter of what is between: the experts share it
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
        pattern: is asked about every linear of a graph whether an FFN ends there, given the graph's `GraphView`. It
            returns the FFN or None. What is between the linears may be anything that maps each token by itself.

    Returns:
        A handle; `handle.remove()`, or the end of a `with handle:`, takes the pattern back.
    """
    handle = RemovableHandle(_patterns)
    _patterns[handle.id] = pattern
    return handle


def registered_patterns() -> Sequence[Pattern]:
    """In the order of their registration."""
    return tuple(_patterns.values())
