"""flat: one row per (token, expert) travels to the expert's rank and its output comes back. The baseline.

count_experts -> exchange_counts -> permute -> all_to_all -> regroup -> experts -> ungroup -> all_to_all -> unpermute

Counts go first, so that rows are put in order and copied while they are on their way to the host. Where assignments may
be dropped, the table has the number of rows to copy, and only the order is ready before.
"""

from __future__ import annotations

import torch
from torch import fx

from moecompile.passes.base import items
from moecompile.passes.lower.dispatch import DispatchNodes
from moecompile.passes.lower.wire import all_to_all
from moecompile.plan import LayerPlan

ops = torch.ops.moecompile
_ALL = -1  # the sum over the numbers of a rank: rows for all of its experts


def lower_flat(graph: fx.Graph, nodes: DispatchNodes, layer: LayerPlan) -> None:
    """Inserts the exchanges around the experts call, in place."""
    axis = layer.dispatch.axis
    with graph.inserting_before(nodes.after_choice):
        counts = graph.call_function(ops.count_experts, (nodes.ids, layer.placement.num_experts))
        received, table = items(graph, graph.call_function(ops.exchange_counts, (counts, axis)), "received", "table")
    if not nodes.dropless:
        nodes.permute.args = (*nodes.permute.args, table)
    with graph.inserting_before(nodes.experts):
        landed = all_to_all(graph, layer, nodes.rows, table, _ALL, False, axis)
        rows, order, counts = items(
            graph, graph.call_function(ops.regroup, (landed, received)), "grouped", "order", "counts"
        )
    nodes.feed(rows, counts)
    with graph.inserting_before(nodes.unpermute):
        outputs = graph.call_function(ops.ungroup, (nodes.outputs, order))
        back = all_to_all(graph, layer, outputs, table, _ALL, True, axis)
    nodes.unpermute.args = (back, *nodes.unpermute.args[1:])
