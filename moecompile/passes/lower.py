"""lower: inserts the exchanges that the plan names, by logical mesh axis. The result is rank-free.

Algorithm, for each experts call:
  1. Read the one-device dispatch around it.
  2. Let the planned dispatch put its exchanges there (moecompile.comm).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from moecompile.comm import LOWERINGS, DispatchNodes
from moecompile.errors import PassError
from moecompile.nn import Experts
from moecompile.nn.existing import ExistingExperts
from moecompile.passes.base import erase_unused, op_name
from moecompile.plan import EXCHANGES, LayerPlan

EXCHANGE_OPS = frozenset(op for ops in EXCHANGES.values() for op in ops)


@dataclass(frozen=True, kw_only=True)
class Lower:
    """No options: the plan says which exchanges each layer gets."""

    name: str = "lower"

    def requires(self, graph_module: fx.GraphModule, layers: Sequence[LayerPlan]) -> None:
        """One experts call a layer, in the same order, each between a permute and an unpermute, and no exchange."""
        calls = experts_calls(graph_module)
        where = layers[0].site.fqn
        if len(calls) != len(layers):
            raise PassError(self.name, where, f"{len(calls)} experts calls for {len(layers)} planned layers")
        for call, layer in zip(calls, layers, strict=True):
            held = graph_module.get_submodule(str(call.target)).num_experts
            if held != layer.experts.num_routed:
                rule = f"{call.target} holds {held} experts, planned are {layer.experts.num_routed}"
                raise PassError(self.name, layer.site.fqn, rule)
        if found := exchanges_of(graph_module):
            raise PassError(self.name, where, f"the graph is lowered already, it holds {[op_name(n) for n in found]}")

    def run(self, graph_module: fx.GraphModule, layers: Sequence[LayerPlan]) -> fx.GraphModule:
        """A new GraphModule over the same modules; the input keeps its graph."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(graph_module.graph, {}))
        new = fx.GraphModule(graph_module, graph, class_name=type(graph_module).__name__)
        for call, layer in zip(experts_calls(new), layers, strict=True):
            # Step 1
            try:
                nodes = DispatchNodes.around(call)
            except ValueError as error:
                raise PassError(self.name, layer.site.fqn, str(error)) from error
            # Step 2
            LOWERINGS[layer.dispatch.kind](new.graph, nodes, layer)
        erase_unused(new.graph)
        new.graph.lint()
        new.recompile()
        return new

    def ensures(self, graph_module: fx.GraphModule, layers: Sequence[LayerPlan]) -> None:
        """Exactly the planned exchanges in order, on their logical axes; no one-device permute feeds remote experts."""
        wanted = [step for layer in layers for step in layer.steps]
        got = [(op_name(node), str(node.args[-1])) for node in exchanges_of(graph_module)]
        if got != wanted:
            raise PassError(self.name, layers[0].site.fqn, f"exchanges are {got}, planned are {wanted}")
        for call, layer in zip(experts_calls(graph_module), layers, strict=True):
            source = call.args[0].args[0]  # type: ignore[union-attr]
            if layer.dispatch.exchanges and op_name(source) == "permute":  # type: ignore[arg-type]
                raise PassError(self.name, layer.site.fqn, "rows reach remote experts without an exchange")


def experts_calls(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Calls of experts modules, in graph order."""
    return [
        node
        for node in graph_module.graph.nodes
        if node.op == "call_module"
        and isinstance(graph_module.get_submodule(str(node.target)), (Experts, ExistingExperts))
    ]


def exchanges_of(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Exchange nodes, in graph order."""
    return [n for n in graph_module.graph.nodes if n.op == "call_function" and op_name(n) in EXCHANGE_OPS]
