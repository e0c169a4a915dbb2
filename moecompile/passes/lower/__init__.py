"""lower: inserts the planned exchanges, on logical mesh axes. The result is the same graph for every rank.

Algorithm, for each experts call:
  1. Read the one-device dispatch around it.
  2. Insert the exchanges of the planned dispatch (kinds.py), or the calls of a back end (backend.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moecompile.errors import PassError
from moecompile.match.regions import Region
from moecompile.ops.backend import DISPATCH, load
from moecompile.passes.base import check_calls, copy_graph_module, erase_unused, exchanges_of, experts_calls, op_name
from moecompile.passes.lower.backend import lower_to_backend
from moecompile.passes.lower.dispatch import DispatchNodes
from moecompile.passes.lower.kinds import LOWERINGS
from moecompile.plan import LayerPlan


@dataclass(frozen=True, kw_only=True)
class Lower:
    """No options: the plan says which exchanges each layer gets."""

    name: str = "lower"
    stage: str = "lowered"
    detail: str = "exchanges on logical axes"

    def requires(self, region: Region, layers: Sequence[LayerPlan]) -> None:
        """One experts call per layer, in the same order, with as many experts as planned, and no exchange."""
        for call, layer in zip(check_calls(self.name, region, layers), layers, strict=True):
            num_experts = region.graph.get_submodule(str(call.target)).num_experts
            if num_experts != layer.experts.num_routed:
                rule = f"{call.target} holds {num_experts} experts, planned are {layer.experts.num_routed}"
                raise PassError(self.name, layer.site.fqn, rule)
        if exchanges := exchanges_of(region.graph):
            names = [op_name(node) for node in exchanges]
            raise PassError(self.name, layers[0].site.fqn, f"the graph is lowered already, it holds {names}")

    def run(self, region: Region, layers: Sequence[LayerPlan]) -> Region:
        """A new graph over the same modules."""
        new, _ = copy_graph_module(region.graph)
        for call, layer in zip(experts_calls(new), layers, strict=True):
            # Step 1
            try:
                nodes = DispatchNodes.around(call)
            except ValueError as error:
                raise PassError(self.name, layer.site.fqn, str(error)) from error
            # Step 2
            if layer.dispatch.backend:
                load(DISPATCH, layer.dispatch.backend)
            insert = lower_to_backend if layer.dispatch.backend else LOWERINGS[layer.dispatch.kind]
            insert(new.graph, nodes, layer)
        erase_unused(new.graph)
        new.recompile()
        return region.with_graph(new)

    def ensures(self, before: Region, after: Region, layers: Sequence[LayerPlan]) -> None:
        """Exactly the planned exchanges in order, on logical axes; rows of permute do not reach remote experts."""
        planned = [step for layer in layers for step in layer.steps]
        got = [(op_name(node), str(node.args[-1])) for node in exchanges_of(after.graph)]
        if got != planned:
            raise PassError(self.name, layers[0].site.fqn, f"exchanges are {got}, planned are {planned}")
        for call, layer in zip(check_calls(self.name, after, layers), layers, strict=True):
            source = call.args[0].args[0]  # type: ignore[union-attr]
            own = op_name(source) == "permute" and not layer.dispatch.backend  # type: ignore[arg-type]
            if layer.steps and own:
                raise PassError(self.name, layer.site.fqn, "rows reach remote experts without an exchange")
