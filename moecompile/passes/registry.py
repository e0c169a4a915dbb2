"""What users add to the compiler (docs/python-api.md): patterns of FFNs that it does not know, and passes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import fx
from torch.utils.hooks import RemovableHandle

from moecompile.errors import ConfigError
from moecompile.plan import LayerPlan

if TYPE_CHECKING:
    from moecompile.passes.linears import Linear
    from moecompile.passes.match import FFNMatch, GraphView

    Pattern = Callable[[Linear, GraphView], FFNMatch | None]


class GraphPass(Protocol):
    """A pass over one graph that holds experts. layers: of this graph, in its order."""

    name: str

    def requires(self, graph_module: fx.GraphModule, layers: Sequence[LayerPlan]) -> None:
        """Raises PassError unless the graph is as `run` needs it."""

    def run(self, graph_module: fx.GraphModule, layers: Sequence[LayerPlan]) -> fx.GraphModule:
        """A new GraphModule; the input keeps its graph."""

    def ensures(self, graph_module: fx.GraphModule, layers: Sequence[LayerPlan]) -> None:
        """Raises PassError unless the result is as it must be."""


_PLACES = ("rewrite", "lower")
_patterns: OrderedDict[int, Pattern] = OrderedDict()
_passes: OrderedDict[int, tuple[str, GraphPass]] = OrderedDict()


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


def register_pass(graph_pass: GraphPass, *, after: str) -> RemovableHandle:
    """Runs a pass over every rewritten graph, between its contracts.

    Args:
        after: `rewrite` (the graph runs on one device) or `lower` (it has the exchanges).

    Returns:
        A handle, as from `register_pattern`.
    """
    if after not in _PLACES:
        raise ConfigError("after", after, "must be rewrite or lower", "Use one of these")
    handle = RemovableHandle(_passes)
    _passes[handle.id] = (after, graph_pass)
    return handle


def registered_patterns() -> Sequence[Pattern]:
    """In the order of their registration."""
    return tuple(_patterns.values())


def registered_passes(after: str) -> Sequence[GraphPass]:
    """The passes that run after a built-in one, in the order of their registration."""
    return tuple(graph_pass for place, graph_pass in _passes.values() if place == after)


def run_registered(after: str, graph_module: fx.GraphModule, layers: Sequence[LayerPlan]) -> fx.GraphModule:
    """The passes that run after a built-in one, each between its contracts."""
    for graph_pass in registered_passes(after):
        graph_pass.requires(graph_module, layers)
        graph_module = graph_pass.run(graph_module, layers)
        graph_pass.ensures(graph_module, layers)
        graph_module.graph.lint()
    return graph_module
