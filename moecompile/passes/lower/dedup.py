"""dedup: one row per (token, destination rank), with its routing weights and expert ids; partial sums come back.

count_rows -> exchange_counts -> pack_rows -> all_to_all (rows) -> exchange_assignments -> expand_rows -> experts
-> reduce_rows -> all_to_all -> combine_rows
"""

from __future__ import annotations

import torch
from torch import fx

from moecompile.passes.base import items
from moecompile.passes.lower.dispatch import DispatchNodes
from moecompile.passes.lower.wire import all_to_all
from moecompile.plan import LayerPlan

ops = torch.ops.moecompile
_ROWS, _ASSIGNMENTS = 0, 1  # columns of the counts


def lower_dedup(graph: fx.Graph, nodes: DispatchNodes, layer: LayerPlan) -> None:
    """Replaces permute and unpermute by the deduplicated exchange, in place."""
    axis, placement = layer.dispatch.axis, layer.placement
    with graph.inserting_before(nodes.after_choice):
        counted = graph.call_function(ops.count_rows, (nodes.ids, placement.num_experts, placement.ep))
        codes, counts = items(graph, counted, "codes", "counts")
        _, table = items(graph, graph.call_function(ops.exchange_counts, (counts, axis)), "received", "table")
    with graph.inserting_before(nodes.experts):
        packed = graph.call_function(
            ops.pack_rows, (nodes.tokens, nodes.weights, codes, placement.num_experts, placement.ep, table)
        )
        rows, tokens, weights, codes = items(graph, packed, "rows", "tokens", "weights_sent", "codes_sent")
        received_rows = all_to_all(graph, layer, rows, table, _ROWS, False, axis)
        sent = graph.call_function(ops.exchange_assignments, (weights, codes, table, _ASSIGNMENTS, axis))
        weights, codes = items(graph, sent, "weights", "codes")
        expanded = graph.call_function(ops.expand_rows, (received_rows, weights, codes, placement.experts_per_rank))
        copies, weights, source, _, counts = items(
            graph, expanded, "copies", "copy_weights", "source", "order", "counts"
        )
    nodes.feed(copies, counts)
    with graph.inserting_before(nodes.unpermute):
        partial = graph.call_function(ops.reduce_rows, (nodes.outputs, weights, source, received_rows))
        back = all_to_all(graph, layer, partial, table, _ROWS, True, axis)
        combined = graph.call_function(ops.combine_rows, (back, tokens, nodes.tokens))
    nodes.unpermute.replace_all_uses_with(combined)
    graph.erase_node(nodes.unpermute)
