"""hierarchical: one row per (token, destination node), then one per (token, rank) inside the node; sums come back.

count_hops -> send_counts (inter) -> onward_counts -> send_counts (intra) -> read_tables
-> pack_rows -> all_to_all (inter) -> exchange_assignments -> pack_rows -> all_to_all (intra) -> exchange_assignments
-> expand_rows -> experts -> reduce_rows -> all_to_all (intra) -> combine_rows -> all_to_all (inter) -> combine_rows

moecompile.ops.hops describes the route of a token and of the counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from moecompile.passes.base import items
from moecompile.passes.lower.dispatch import DispatchNodes
from moecompile.passes.lower.wire import all_to_all
from moecompile.plan import LayerPlan

ops = torch.ops.moecompile
_ROWS, _ASSIGNMENTS = 0, 1  # columns of the counts


class _Hop(NamedTuple):
    """What one hop received; for the way back, `source` maps each sent row to its source row."""

    rows: fx.Node
    weights: fx.Node
    codes: fx.Node
    source: fx.Node


def lower_hierarchical(graph: fx.Graph, nodes: DispatchNodes, layer: LayerPlan) -> None:
    """Replaces permute and unpermute by two hops forth and two hops back, in place."""
    placement, num_nodes = layer.placement, layer.placement.nodes
    inter, intra = f"{layer.dispatch.axis}_inter", f"{layer.dispatch.axis}_intra"
    on_node = placement.ep // num_nodes
    with graph.inserting_before(nodes.after_choice):
        counted = graph.call_function(ops.count_hops, (nodes.ids, placement.num_experts, num_nodes, on_node))
        codes, counts = items(graph, counted, "codes", "counts")
        inter_table, intra_table = _tables(graph, counts, inter, intra)
    with graph.inserting_before(nodes.experts):

        def hop(rows: fx.Node, weights: fx.Node, codes: fx.Node, parts: int, table: fx.Node, axis: str) -> _Hop:
            experts = placement.num_experts if axis == inter else placement.num_experts // num_nodes
            packed = graph.call_function(ops.pack_rows, (rows, weights, codes, experts, parts, table))
            sent, source, weights, codes = items(graph, packed, "rows", "source", "weights_sent", "codes_sent")
            received_rows = all_to_all(graph, layer, sent, table, _ROWS, False, axis)
            exchanged = graph.call_function(ops.exchange_assignments, (weights, codes, table, _ASSIGNMENTS, axis))
            weights, codes = items(graph, exchanged, "weights", "codes")
            return _Hop(received_rows, weights, codes, source)

        node = hop(nodes.tokens, nodes.weights, codes, num_nodes, inter_table, inter)
        rank = hop(node.rows, node.weights, node.codes, on_node, intra_table, intra)
        expanded = graph.call_function(
            ops.expand_rows, (rank.rows, rank.weights, rank.codes, placement.experts_per_rank)
        )
        copies, weights, source, _, counts = items(
            graph, expanded, "copies", "copy_weights", "source", "order", "counts"
        )
    nodes.feed(copies, counts)
    with graph.inserting_before(nodes.unpermute):
        partial = graph.call_function(ops.reduce_rows, (nodes.outputs, weights, source, rank.rows))
        back = all_to_all(graph, layer, partial, intra_table, _ROWS, True, intra)
        partial = graph.call_function(ops.combine_rows, (back, rank.source, node.rows))
        back = all_to_all(graph, layer, partial, inter_table, _ROWS, True, inter)
        combined = graph.call_function(ops.combine_rows, (back, node.source, nodes.tokens))
    nodes.unpermute.replace_all_uses_with(combined)
    graph.erase_node(nodes.unpermute)


def _tables(graph: fx.Graph, counts: fx.Node, inter: str, intra: str) -> tuple[fx.Node, ...]:
    """The split sizes of both hops, on the host."""
    received = graph.call_function(ops.send_counts, (counts, inter))
    onward = graph.call_function(ops.onward_counts, (received,))
    arriving = graph.call_function(ops.send_counts, (onward, intra))
    tables = graph.call_function(ops.read_tables, (counts, received, onward, arriving))
    return items(graph, tables, "inter_table", "intra_table")
