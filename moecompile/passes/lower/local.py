"""local: one EP rank has every expert, so nothing is sent and the one-device dispatch is already right."""

from __future__ import annotations

from torch import fx

from moecompile.passes.lower.dispatch import DispatchNodes
from moecompile.plan import LayerPlan


def lower_local(graph: fx.Graph, nodes: DispatchNodes, layer: LayerPlan) -> None:
    """Keeps the graph as it is."""
