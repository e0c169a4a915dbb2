"""lower: inserts the planned exchanges, on logical mesh axes. The result is the same graph for every rank.

Algorithm, for each experts call:
  1. Read the one-device dispatch around it.
  2. Insert the exchanges of the planned dispatch (`LOWERINGS`), or the calls of a back end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx
from torch.fx.node import Argument

from moecompile.errors import PassError
from moecompile.match.regions import Region
from moecompile.ops.backend import check_dispatch_backend, combine_tokens, dispatch_tokens
from moecompile.passes.base import DispatchNodes, LayerPass, exchanges_of, items, op_name
from moecompile.plan import LayerPlan

ops = torch.ops.moecompile
_ALL = -1  # sum over the columns of the counts: rows for all experts of a rank
_ROWS, _ASSIGNMENTS = 0, 1  # columns of the counts


@dataclass(frozen=True, kw_only=True)
class Lower(LayerPass):
    """The plan says which exchanges each layer gets."""

    name: str = "lower"
    stage: str = "lowered"
    detail: str = "exchanges on logical axes"

    def requires(self, region: Region, layers: Sequence[LayerPlan]) -> None:
        """One experts call per layer, in the same order, with as many experts as planned, and no exchange."""
        for layer, (call,) in self.calls(region, layers):
            num_experts = region.graph.get_submodule(str(call.target)).num_experts
            if num_experts != layer.experts.num_routed:
                rule = f"{call.target} holds {num_experts} experts, planned are {layer.experts.num_routed}"
                raise PassError(self.name, layer.site.fqn, rule)
        if exchanges := exchanges_of(region.graph):
            names = [op_name(node) for node in exchanges]
            raise PassError(self.name, layers[0].site.fqn, f"the graph is lowered already, it holds {names}")

    def wants(self, layer: LayerPlan) -> bool:
        """All layers, with exchanges or without."""
        return True

    def change(self, graph_module: fx.GraphModule, calls: list[fx.Node], layer: LayerPlan) -> None:
        """Steps 1 and 2."""
        nodes = DispatchNodes.around(calls[0])
        if layer.dispatch.backend:
            check_dispatch_backend(layer.dispatch.backend, layer.dispatch.overlap)
        insert = lower_to_backend if layer.dispatch.backend else LOWERINGS[layer.dispatch.kind]
        insert(graph_module.graph, nodes, layer)

    def ensures(self, before: Region, after: Region, layers: Sequence[LayerPlan]) -> None:
        """Exactly the planned exchanges in order, on logical axes; rows of permute do not reach remote experts."""
        self.has_exchanges(after, layers, [step for layer in layers for step in layer.steps])
        for layer, (call,) in self.calls(after, layers):
            source = call.args[0].args[0]  # type: ignore[union-attr]
            own = op_name(source) == "permute" and not layer.dispatch.backend  # type: ignore[arg-type]
            if layer.steps and own:
                raise PassError(self.name, layer.site.fqn, "rows reach remote experts without an exchange")


# -- what every lowering uses -----------------------------------------------------------------------------------------


def on_the_wire(
    graph: fx.Graph, layer: LayerPlan, rows: fx.Node, exchange: Callable[[fx.Node], fx.Node], like: fx.Node
) -> fx.Node:
    """`exchange(rows)` between a cast to the planned precision and a cast back to that of `like`; auto casts nothing.

    Each exchange has its own casts, so that sums between two exchanges (of rows in forward, of gradients in backward)
    are in the precision of the activations.
    """
    name = layer.dispatch.wire.dtype
    if name is None:
        return exchange(rows)
    dtype = getattr(torch, name)
    return graph.call_function(ops.wire_uncast, (exchange(graph.call_function(ops.wire_cast, (rows, dtype))), like))


def all_to_all(
    graph: fx.Graph, layer: LayerPlan, rows: fx.Node, table: fx.Node, column: int, reverse: bool, axis: str
) -> fx.Node:
    """One all-to-all of rows, in the planned precision."""
    narrow = layer.dispatch.wire.narrow
    keywords: dict[str, Argument] = {"narrow_gradient" if reverse else "narrow": narrow} if narrow else {}

    def exchange(sent: fx.Node) -> fx.Node:
        return graph.call_function(ops.all_to_all, (sent, table, column, reverse, axis), keywords)

    return on_the_wire(graph, layer, rows, exchange, like=rows)


# -- the kinds --------------------------------------------------------------------------------------------------------


def lower_local(graph: fx.Graph, nodes: DispatchNodes, layer: LayerPlan) -> None:
    """One EP rank has every expert, so nothing is sent, and the one-device dispatch is already right."""


def lower_flat(graph: fx.Graph, nodes: DispatchNodes, layer: LayerPlan) -> None:
    """One row per (token, expert) is sent to the expert's rank and its output comes back. The baseline.

    count_experts -> exchange_counts -> permute -> all_to_all -> regroup -> experts -> ungroup -> all_to_all
    -> unpermute

    Counts are sent first, so that the device permutes rows while the counts are copied to the host. If assignments may
    be dropped, permute needs the number of rows from the table, so only the sort overlaps with that copy.
    """
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


def lower_dedup(graph: fx.Graph, nodes: DispatchNodes, layer: LayerPlan) -> None:
    """One row per (token, destination rank), with its routing weights and expert ids; partial sums come back.

    count_rows -> exchange_counts -> pack_rows -> all_to_all (rows) -> exchange_assignments -> expand_rows -> experts
    -> reduce_rows -> all_to_all -> combine_rows
    """
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


class _Hop(NamedTuple):
    """What one hop received; for the way back, `source` maps each sent row to its source row."""

    rows: fx.Node
    weights: fx.Node
    codes: fx.Node
    source: fx.Node


def lower_hierarchical(graph: fx.Graph, nodes: DispatchNodes, layer: LayerPlan) -> None:
    """One row per (token, destination node), then one per (token, rank) inside the node; sums come back.

    count_hops -> send_counts (inter) -> onward_counts -> send_counts (intra) -> read_tables
    -> pack_rows -> all_to_all (inter) -> exchange_assignments
    -> pack_rows -> all_to_all (intra) -> exchange_assignments
    -> expand_rows -> experts -> reduce_rows -> all_to_all (intra) -> combine_rows -> all_to_all (inter) -> combine_rows

    moecompile.ops.rows describes the route of a token and of the counts.
    """
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


def lower_allgather(graph: fx.Graph, nodes: DispatchNodes, layer: LayerPlan) -> None:
    """All ranks of the EP group get all tokens that have an expert; each computes the part of its own experts,
    and sums come back.

    count_gathered -> exchange_counts -> own_tokens -> pad_tokens -> all_gather (rows) -> gather_assignments
    -> take_local -> experts -> reduce_rows -> reduce_scatter -> spread_tokens

    On several nodes, rows are gathered across nodes first, between ranks with the same local rank, then within each
    node; reduce_scatter runs in reverse order. So a token is sent to each other node once, not to each of its ranks.
    """
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


def _over(graph: fx.Graph, layer: LayerPlan, rows: fx.Node, op: Callable[..., object], axis: str) -> fx.Node:
    return on_the_wire(graph, layer, rows, lambda sent: graph.call_function(op, (sent, axis)), like=rows)


def lower_to_backend(graph: fx.Graph, nodes: DispatchNodes, layer: LayerPlan) -> None:
    """A dispatch back end: tokens go to the ranks of their experts by its dispatch, and sums come back by its combine.

    dispatch_tokens -> permute -> experts -> unpermute -> combine_tokens

    The rank of the experts does with the rows received what one device does with its tokens; a row without a local
    expert is dropped there.
    """
    axis, placement, backend = layer.dispatch.axis, layer.placement, layer.dispatch.backend
    received: list[fx.Node] = []

    def dispatch(sent: fx.Node) -> fx.Node:
        arguments = (sent, nodes.ids, nodes.weights, placement.num_experts, backend, axis)
        got = graph.call_function(dispatch_tokens, arguments)
        received.extend(items(graph, got, "received", "local_ids", "local_weights", "handle"))
        return received[0]

    def combine(sums: fx.Node) -> fx.Node:
        return graph.call_function(combine_tokens, (sums, handle, nodes.tokens, backend, axis))

    with graph.inserting_before(nodes.experts):
        rows = on_the_wire(graph, layer, nodes.tokens, dispatch, like=nodes.tokens)
        _, ids, weights, handle = received
        permuted = graph.call_function(ops.permute, (rows, ids, placement.experts_per_rank, False))
        copies, order, counts = items(graph, permuted, "copies", "order", "counts")
    nodes.feed(copies, counts)
    with graph.inserting_before(nodes.unpermute):
        sums = graph.call_function(ops.unpermute, (nodes.outputs, order, weights))
        combined = on_the_wire(graph, layer, sums, combine, like=nodes.tokens)
    nodes.unpermute.replace_all_uses_with(combined)
    graph.erase_node(nodes.unpermute)


LOWERINGS: dict[str, Callable[[fx.Graph, DispatchNodes, LayerPlan], None]] = {
    "local": lower_local,
    "flat": lower_flat,
    "dedup": lower_dedup,
    "hierarchical": lower_hierarchical,
    "allgather": lower_allgather,
}
"""By the kind of dispatch: each replaces the one-device dispatch by exchanges built from registered ops."""
