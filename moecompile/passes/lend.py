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
from moecompile.passes.base import LayerPass, all_before, argument, exchanges_of, is_ours, items, op_name
from moecompile.plan import EXCHANGES, LENDING_OPS, LayerPlan

ops = torch.ops.moecompile
_BORROWED = "borrowed"  # keyword of the experts call
_SIZES = ("num_experts", "num_local")  # arguments of ops that count experts, of all ranks or of one


@dataclass(frozen=True, kw_only=True)
class Lend(LayerPass):
    """The plan says which layers, with how many slots, and what a loan costs."""

    name: str = "lend"
    stage: str = "lent"
    detail: str = "experts in slots of other ranks"

    def requires(self, region: Region, layers: Sequence[LayerPlan]) -> None:
        """One experts call a layer, and nothing lent already."""
        super().requires(region, layers)
        if lent := [node.name for node in exchanges_of(region.graph) if op_name(node) in LENDING_OPS]:
            raise PassError(self.name, layers[0].site.fqn, f"experts are lent already: {lent}")

    def wants(self, layer: LayerPlan) -> bool:
        """Layers that lend experts."""
        return layer.dispatch.lends

    def change(self, graph_module: fx.GraphModule, calls: list[fx.Node], layer: LayerPlan) -> None:
        """Steps 1 to 3."""
        _lend(graph_module, calls[0], layer)

    def ensures(self, before: Region, after: Region, layers: Sequence[LayerPlan]) -> None:
        """The planned exchanges in the planned order; a call has borrowed experts if and only if it is planned so."""
        self.has_exchanges(after, layers, [step for layer in layers for step in layer.lent_steps])
        for layer, (call,) in self.calls(after, layers):
            if (_BORROWED in call.kwargs) != layer.dispatch.lends:
                rule = (
                    "has no borrowed experts" if layer.dispatch.lends else "has borrowed experts, but is not planned so"
                )
                raise PassError(self.name, layer.site.fqn, rule)


def _lend(graph_module: fx.GraphModule, call: fx.Node, layer: LayerPlan) -> None:
    graph, dispatch, placement = graph_module.graph, layer.dispatch, layer.placement
    nodes = _dispatch_of(call, layer)
    ids = argument(nodes[0], "ids_TK")
    assert ids is not None
    # Step 1
    with graph.inserting_before(nodes[0]):
        counts = graph.call_function(ops.count_experts, (ids[1], placement.num_experts))
        gathered = graph.call_function(ops.gather_counts, (counts, dispatch.axis))
        all_counts, rank = items(graph, gathered, "all_counts", "ep_rank")
        limits = (dispatch.slots, placement.nodes, dispatch.loan_rows, dispatch.far_loan_rows)
        mapped = graph.call_function(ops.to_slots, (ids[1], all_counts, rank, *limits))
        slots, borrowed_table = items(graph, mapped, "slots", "borrowed_table")
    # Step 2
    before, after = placement.experts_per_rank, placement.experts_per_rank + dispatch.slots
    for node in nodes:
        if not (is_ours(node) or op_name(node) in EXCHANGES):
            continue
        node.args = tuple(slots if each is ids[1] else each for each in node.args)
        for size in filter(None, (argument(node, name) for name in _SIZES)):
            assert isinstance(size[1], int)
            node.update_arg(size[0], size[1] // before * after)
    # Step 3
    with graph.inserting_before(next(node for node in nodes if _sends_rows(node))):
        weights = [
            graph.call_function(ops.local_experts, (weight, placement.experts_per_rank))
            for weight in _weights(graph_module, call)
        ]
        lent = graph.call_function(ops.lend_experts, (weights, borrowed_table, dispatch.axis))
        borrowed = items(graph, lent, *(f"borrowed_{i}" for i in range(len(weights))))
    call.kwargs = {**call.kwargs, _BORROWED: list(borrowed)}


def _sends_rows(node: fx.Node) -> bool:
    name = op_name(node)
    return name == "wire_cast" or (name in EXCHANGES and EXCHANGES[name].sends == "rows")


def _dispatch_of(call: fx.Node, layer: LayerPlan) -> list[fx.Node]:
    """What leads from the first reader of this layer's ids to the experts' rows, in graph order."""
    before, begins = set(all_before([call])), layer.dispatch.row.begins
    order = [node for node in call.graph.nodes if node in before]
    first = [i for i, node in enumerate(order) if op_name(node) == begins]
    if not first:
        raise ValueError(f"no {begins} leads to {call.name}")
    return order[first[-1] :]  # an earlier layer has one too


def _weights(graph_module: fx.GraphModule, call: fx.Node) -> list[fx.Node]:
    """The weights that are stacked over experts, in the order in which the experts take them."""
    if len(call.args) > 2:  # of existing experts
        return [weight for weight in call.args[2:] if isinstance(weight, fx.Node)]
    experts = graph_module.get_submodule(str(call.target))
    return [call.graph.get_attr(f"{call.target}.{name}") for name, _ in experts.named_parameters(recurse=False)]
