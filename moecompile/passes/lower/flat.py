"""flat: one row per (token, expert) is sent to the expert's rank and its output comes back. The baseline.

count_experts -> exchange_counts -> permute -> all_to_all -> regroup -> experts -> ungroup -> all_to_all -> unpermute

Counts are sent first, so that the device permutes rows while the counts are copied to the host. If assignments may be
dropped, permute needs the number of rows from the table, so only the sort overlaps with that copy.
"""

from __future__ import annotations

import torch
from torch import fx

from moecompile.passes.base import items
from moecompile.passes.lower.dispatch import DispatchNodes
from moecompile.passes.lower.wire import all_to_all
from moecompile.plan import LayerPlan

ops = torch.ops.moecompile
_ALL = -1  # sum over the columns: rows for all experts of a rank


def lower_flat(graph: fx.Graph, nodes: DispatchNodes, layer: LayerPlan) -> None:
    """Inserts the exchanges around the experts call, in place."""
    axis = layer.dispatch.axis
    with graph.inserting_before(nodes.after_choice):
        counts = graph.call_function(ops.count_experts, (nodes.ids, layer.placement.num_experts))
        received, table = items(graph, graph.call_function(ops.exchange_counts, (counts, axis)), "received", "table")
    if not nodes.dropless:
        nodes.permute.args = (*nodes.permute.args, table)
    with graph.inserting_before(nodes.experts):
        received_rows = all_to_all(graph, layer, nodes.rows, table, _ALL, False, axis)
        rows, order, counts = items(
            graph, graph.call_function(ops.regroup, (received_rows, received)), "grouped", "order", "counts"
        )
    nodes.feed(rows, counts)
    with graph.inserting_before(nodes.unpermute):
        outputs = graph.call_function(ops.ungroup, (nodes.outputs, order))
        back = all_to_all(graph, layer, outputs, table, _ALL, True, axis)
    nodes.unpermute.args = (back, *nodes.unpermute.args[1:])
