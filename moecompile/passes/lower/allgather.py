"""allgather: all ranks of the EP group get all tokens that have an expert; each computes the part of its own experts,
and sums come back.

count_gathered -> exchange_counts -> own_tokens -> pad_tokens -> all_gather (rows) -> gather_assignments -> take_local
-> experts -> reduce_rows -> reduce_scatter -> spread_tokens

On several nodes, rows are gathered across nodes first, between ranks with the same local rank, then within each node;
reduce_scatter runs in reverse order. So a token is sent to each other node once, not to each of its ranks.
"""

from __future__ import annotations

import torch
from torch import fx

from moecompile.passes.base import items
from moecompile.passes.lower.dispatch import DispatchNodes
from moecompile.passes.lower.wire import on_the_wire
from moecompile.plan import LayerPlan

ops = torch.ops.moecompile


def lower_allgather(graph: fx.Graph, nodes: DispatchNodes, layer: LayerPlan) -> None:
    """Replaces permute and unpermute by gathers before the experts and sums after them, in place."""
    placement, axis = layer.placement, layer.dispatch.axis
    axes = [name for op, name in layer.steps if op == "all_gather"]
    with graph.inserting_before(nodes.after_choice):
        counts = graph.call_function(ops.count_gathered, (nodes.ids, placement.num_experts, placement.ep))
        received, table = items(graph, graph.call_function(ops.exchange_counts, (counts, axis)), "received", "table")
    with graph.inserting_before(nodes.experts):
        own = graph.call_function(ops.own_tokens, (nodes.ids, table, placement.num_experts))
        padded = graph.call_function(ops.pad_tokens, (nodes.tokens, nodes.weights, nodes.ids, own, table))
        rows, weights, ids = items(graph, padded, "padded", "padded_weights", "padded_ids")
        for level in axes:
            rows = _over(graph, layer, rows, ops.all_gather, level)
            gathered = graph.call_function(ops.gather_assignments, (weights, ids, level))
            weights, ids = items(graph, gathered, "weights", "ids")
        taken = graph.call_function(ops.take_local, (rows, weights, ids, received, table, placement.experts_per_rank))
        copies, weights, source, _, counts = items(graph, taken, "copies", "copy_weights", "source", "order", "counts")
    nodes.feed(copies, counts)
    with graph.inserting_before(nodes.unpermute):
        partial = graph.call_function(ops.reduce_rows, (nodes.outputs, weights, source, rows))
        for level in reversed(axes):
            partial = _over(graph, layer, partial, ops.reduce_scatter, level)
        combined = graph.call_function(ops.spread_tokens, (partial, own, nodes.tokens))
    nodes.unpermute.replace_all_uses_with(combined)
    graph.erase_node(nodes.unpermute)


def _over(graph: fx.Graph, layer: LayerPlan, rows: fx.Node, op: torch._ops.OpOverloadPacket, axis: str) -> fx.Node:
    return on_the_wire(graph, layer, rows, lambda sent: graph.call_function(op, (sent, axis)), like=rows)
