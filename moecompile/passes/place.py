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
from moecompile.passes.base import check_calls, copy_graph_module, experts_calls, op_name
from moecompile.passes.lower.dispatch import DispatchNodes
from moecompile.plan import LayerPlan

ops = torch.ops.moecompile
_OP = "place_ids"


@dataclass(frozen=True, kw_only=True)
class Place:
    """No options: the plan says where each expert is."""

    name: str = "place"
    stage: str = "placed"
    detail: str = "positions for expert ids"

    def requires(self, region: Region, layers: Sequence[LayerPlan]) -> None:
        """One experts call per layer; nothing is placed yet."""
        check_calls(self.name, region, layers)
        if any(op_name(node) == _OP for node in region.graph.graph.nodes):
            raise PassError(self.name, layers[0].site.fqn, "experts are placed already")

    def run(self, region: Region, layers: Sequence[LayerPlan]) -> Region:
        """A new graph over the same modules; the same region where no layer is placed in an order of its own."""
        if not any(layer.placement.order for layer in layers):
            return region
        new, _ = copy_graph_module(region.graph)
        for call, layer in zip(experts_calls(new), layers, strict=True):
            try:
                nodes = DispatchNodes.around(call)
            except ValueError as error:
                raise PassError(self.name, layer.site.fqn, str(error)) from error
            with new.graph.inserting_before(nodes.after_choice):  # Step 1
                placed = new.graph.call_function(ops.place_ids, (nodes.ids, list(layer.placement.positions)))
            nodes.permute.update_arg(1, placed)
        new.recompile()
        return region.with_graph(new)

    def ensures(self, before: Region, after: Region, layers: Sequence[LayerPlan]) -> None:
        """The experts of each call are in the planned order."""
        for call, layer in zip(check_calls(self.name, after, layers), layers, strict=True):
            if (order := order_of(call)) not in (layer.placement.order, tuple(range(layer.placement.num_experts))):
                raise PassError(self.name, layer.site.fqn, f"experts are in the order {list(order)}")
            if layer.placement.order and order != layer.placement.order:
                raise PassError(self.name, layer.site.fqn, "experts are in the order of their ids")


def order_of(call: fx.Node) -> tuple[int, ...]:
    """The expert at each position of an experts call; empty: in the order of ids."""
    before, queue = {call}, [call]
    for node in queue:
        new = [other for other in node.all_input_nodes if other not in before]
        before.update(new)
        queue += new
    placed = [node for node in call.graph.nodes if node in before and op_name(node) == _OP]
    if not placed:
        return ()
    positions = placed[-1].args[1]
    assert isinstance(positions, (list, tuple))
    return tuple(sorted(range(len(positions)), key=positions.__getitem__))
