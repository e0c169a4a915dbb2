"""lend: rows go to slots instead of experts, and hot experts travel to slots of ranks that have little to do.

A rank has a slot for each of its experts and `dispatch.slots` more. What is lent is decided in every micro-batch from
the counts of all ranks (moecompile.ops.lending). The rest of the dispatch stays as it is, with slots for experts.

Algorithm, for each experts call that the plan lends:
  1. Send the counts of the experts to all ranks, and map the chosen expert ids to slots.
  2. The ops of the dispatch read slots instead of ids, and (e + n) / e times as many.
  3. Exchange the borrowed experts before the first rows, and hand them to the experts call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from moecompile.errors import PassError
from moecompile.match.regions import Region
from moecompile.passes.base import (
    check_calls,
    copy_graph_module,
    exchanges_of,
    experts_calls,
    items,
    op_name,
)
from moecompile.plan import LENDING_OPS, LayerPlan

ops = torch.ops.moecompile
_BORROWED = "borrowed"  # keyword of the experts call
# Op that chooses by expert -> place of the ids, if it reads them, and of the number of experts.
_IDS_AND_SIZE = {
    "count_experts": (0, 1), "count_rows": (0, 1), "count_hops": (0, 1), "permute": (1, 2), "pack_rows": (None, 3),
    "expand_rows": (None, 3),
}  # fmt: skip
_COUNTING = ("count_experts", "count_rows", "count_hops")
_FIRST_ROWS = ("all_to_all", "wire_cast")


@dataclass(frozen=True, kw_only=True)
class Lend:
    """No options: the plan says which layers, with how many slots, and what a loan costs."""

    name: str = "lend"
    stage: str = "lent"
    detail: str = "experts in slots of other ranks"

    def requires(self, region: Region, layers: Sequence[LayerPlan]) -> None:
        """One experts call a layer, and nothing lent already."""
        check_calls(self.name, region, layers)
        if lent := [node.name for node in exchanges_of(region.graph) if op_name(node) in LENDING_OPS]:
            raise PassError(self.name, layers[0].site.fqn, f"experts are lent already: {lent}")

    def run(self, region: Region, layers: Sequence[LayerPlan]) -> Region:
        """A new graph over the same modules; the same region where no layer is planned so."""
        if not any(layer.dispatch.lends for layer in layers):
            return region
        new, _ = copy_graph_module(region.graph)
        for call, layer in zip(experts_calls(new), layers, strict=True):
            if layer.dispatch.lends:
                _lend(new, call, layer)
        new.recompile()
        return region.with_graph(new)

    def ensures(self, before: Region, after: Region, layers: Sequence[LayerPlan]) -> None:
        """The planned exchanges in the planned order; a call has borrowed experts if and only if it is planned so."""
        planned = [step for layer in layers for step in layer.lent_steps]
        there = [(op_name(node), str(node.args[-1])) for node in exchanges_of(after.graph)]
        if there != planned:
            raise PassError(self.name, layers[0].site.fqn, f"exchanges are {there}, planned are {planned}")
        for call, layer in zip(check_calls(self.name, after, layers), layers, strict=True):
            if (_BORROWED in call.kwargs) != layer.dispatch.lends:
                rule = (
                    "has no borrowed experts" if layer.dispatch.lends else "has borrowed experts, but is not planned so"
                )
                raise PassError(self.name, layer.site.fqn, rule)


def _lend(graph_module: fx.GraphModule, call: fx.Node, layer: LayerPlan) -> None:
    graph, dispatch, placement = graph_module.graph, layer.dispatch, layer.placement
    nodes = _dispatch_of(call, layer)
    counting, ids = nodes[0], nodes[0].args[0]
    # Step 1
    with graph.inserting_before(counting):
        counts = graph.call_function(ops.count_experts, (ids, placement.num_experts))
        gathered = graph.call_function(ops.gather_counts, (counts, dispatch.axis))
        all_counts, rank = items(graph, gathered, "all_counts", "ep_rank")
        limits = (dispatch.slots, placement.nodes, dispatch.loan_rows, dispatch.far_loan_rows)
        mapped = graph.call_function(ops.to_slots, (ids, all_counts, rank, *limits))
        slots, borrowed_table = items(graph, mapped, "slots", "borrowed_table")
    # Step 2
    before, after = placement.experts_per_rank, placement.experts_per_rank + dispatch.slots
    for node in nodes:
        place, size = _IDS_AND_SIZE.get(op_name(node), (None, None))
        if place is not None:
            node.update_arg(place, slots)
        if size is not None:
            experts = node.args[size]
            assert isinstance(experts, int)
            node.update_arg(size, experts // before * after)
    # Step 3
    with graph.inserting_before(next(node for node in nodes if op_name(node) in _FIRST_ROWS)):
        weights = [
            graph.call_function(ops.local_experts, (weight, placement.experts_per_rank))
            for weight in _weights(graph_module, call)
        ]
        lent = graph.call_function(ops.lend_experts, (weights, borrowed_table, dispatch.axis))
        borrowed = items(graph, lent, *(f"borrowed_{i}" for i in range(len(weights))))
    call.kwargs = {**call.kwargs, _BORROWED: list(borrowed)}


def _dispatch_of(call: fx.Node, layer: LayerPlan) -> list[fx.Node]:
    """What leads from the first count of this layer to the experts' rows, in graph order."""
    before, queue = {call}, [call]
    for node in queue:
        new = [other for other in node.all_input_nodes if other not in before]
        before.update(new)
        queue += new
    order = [node for node in call.graph.nodes if node in before]
    counts = [i for i, node in enumerate(order) if op_name(node) in _COUNTING]
    if not counts:
        raise PassError(Lend.name, layer.site.fqn, f"none of {_COUNTING} leads to {call.name}")
    return order[counts[-1] :]  # an earlier layer has counts too


def _weights(graph_module: fx.GraphModule, call: fx.Node) -> list[fx.Node]:
    """The weights that are stacked over experts, in the order in which the experts take them."""
    if len(call.args) > 2:  # of existing experts
        return [weight for weight in call.args[2:] if isinstance(weight, fx.Node)]
    experts = graph_module.get_submodule(str(call.target))
    return [call.graph.get_attr(f"{call.target}.{name}") for name, _ in experts.named_parameters(recurse=False)]
