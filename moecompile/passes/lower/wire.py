"""Wire precision: casts rows for an exchange and back if the plan asks for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from moecompile.plan import WIRE_FORMATS, LayerPlan

ops = torch.ops.moecompile


def on_the_wire(
    graph: fx.Graph, layer: LayerPlan, rows: fx.Node, exchange: Callable[[fx.Node], fx.Node], like: fx.Node
) -> fx.Node:
    """`exchange(rows)` between a cast to the planned precision and a cast back to that of `like`; auto casts nothing.

    Each exchange has its own casts, so that sums between two exchanges (of rows in forward, of gradients in backward)
    are in the precision of the activations.
    """
    name = WIRE_FORMATS[layer.dispatch.wire_dtype].dtype
    if name is None:
        return exchange(rows)
    dtype = getattr(torch, name)
    return graph.call_function(ops.wire_uncast, (exchange(graph.call_function(ops.wire_cast, (rows, dtype))), like))


def all_to_all(
    graph: fx.Graph, layer: LayerPlan, rows: fx.Node, table: fx.Node, column: int, reverse: bool, axis: str
) -> fx.Node:
    """One all-to-all of rows, in the planned precision."""

    def exchange(sent: fx.Node) -> fx.Node:
        return graph.call_function(ops.all_to_all, (sent, table, column, reverse, axis))

    return on_the_wire(graph, layer, rows, exchange, like=rows)
