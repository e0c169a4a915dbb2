"""A dispatch back end: tokens go to the ranks of their experts by its dispatch, and sums come back by its combine.

dispatch_tokens -> permute -> experts -> unpermute -> combine_tokens

The rank of the experts does with the rows received what one device does with its tokens; a row without a local expert
is dropped there.
"""

from __future__ import annotations

import torch
from torch import fx

from moecompile.ops.backend import combine_tokens, dispatch_tokens
from moecompile.passes.base import items
from moecompile.passes.lower.dispatch import DispatchNodes
from moecompile.passes.lower.wire import on_the_wire
from moecompile.plan import LayerPlan

ops = torch.ops.moecompile


def lower_to_backend(graph: fx.Graph, nodes: DispatchNodes, layer: LayerPlan) -> None:
    """Replaces permute and unpermute by those of the rows received, between the calls of the back end, in place."""
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
