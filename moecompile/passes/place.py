"""place: the dispatch reads positions instead of expert ids, where the plan places experts in an order of its own.

Routing, balance, losses and metrics are before it and know ids alone. What comes after it, exchanges and lending, takes
a position for an id: rank r has the positions from e r to e (r + 1). `shard` gives it the experts of these positions.

Algorithm, for each experts call of a region with a layer that is placed so:
  1. Map the ids that the one-device dispatch sorts by. In such a region, layers in the order of ids get the op too, so
     that the last one before an experts call is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from moecompile.errors import PassError
from moecompile.match.regions import Region
from moecompile.passes.base import DispatchNodes, LayerPass, all_before, op_name
from moecompile.plan import LayerPlan

ops = torch.ops.moecompile
_OP = "place_ids"


@dataclass(frozen=True, kw_only=True)
class Place(LayerPass):
    """The plan says where each expert is."""

    name: str = "place"
    stage: str = "placed"
    detail: str = "positions for expert ids"

    def requires(self, region: Region, layers: Sequence[LayerPlan]) -> None:
        """One experts call per layer; nothing is placed yet."""
        super().requires(region, layers)
        if any(op_name(node) == _OP for node in region.graph.graph.nodes):
            raise PassError(self.name, layers[0].site.fqn, "experts are placed already")

    def wants(self, layer: LayerPlan) -> bool:
        """Every layer of a region in which one is placed."""
        return True

    def run(self, region: Region, layers: Sequence[LayerPlan]) -> Region:
        """The same region where no layer is placed in an order of its own."""
        return super().run(region, layers) if any(layer.placement.order for layer in layers) else region

    def change(self, graph_module: fx.GraphModule, calls: list[fx.Node], layer: LayerPlan) -> None:
        """Step 1."""
        nodes = DispatchNodes.around(calls[0])
        with graph_module.graph.inserting_before(nodes.after_choice):
            placed = graph_module.graph.call_function(ops.place_ids, (nodes.ids, list(layer.placement.positions)))
        nodes.permute.update_arg(1, placed)

    def ensures(self, before: Region, after: Region, layers: Sequence[LayerPlan]) -> None:
        """The experts of each call are in the planned order."""
        super().ensures(before, after, layers)
        for layer, (call,) in self.calls(after, layers):
            if (order := order_of(call)) not in (layer.placement.order, tuple(range(layer.placement.num_experts))):
                raise PassError(self.name, layer.site.fqn, f"experts are in the order {list(order)}")
            if layer.placement.order and order != layer.placement.order:
                raise PassError(self.name, layer.site.fqn, "experts are in the order of their ids")


def order_of(call: fx.Node) -> tuple[int, ...]:
    """The expert at each position of an experts call; empty: in the order of ids."""
    before = set(all_before([call]))
    placed = [node for node in call.graph.nodes if node in before and op_name(node) == _OP]
    if not placed:
        return ()
    positions = placed[-1].args[1]
    assert isinstance(positions, (list, tuple))
    return tuple(sorted(range(len(positions)), key=positions.__getitem__))
