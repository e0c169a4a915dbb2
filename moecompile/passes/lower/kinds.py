"""The lowering of each kind of dispatch: it replaces the one-device dispatch by exchanges built from registered ops."""

from collections.abc import Callable

from torch import fx

from moecompile.passes.lower.allgather import lower_allgather
from moecompile.passes.lower.dedup import lower_dedup
from moecompile.passes.lower.dispatch import DispatchNodes
from moecompile.passes.lower.flat import lower_flat
from moecompile.passes.lower.hierarchical import lower_hierarchical
from moecompile.plan import LayerPlan


def _lower_local(graph: fx.Graph, nodes: DispatchNodes, layer: LayerPlan) -> None:
    """One EP rank has every expert, so nothing is sent, and the one-device dispatch is already right."""


LOWERINGS: dict[str, Callable[[fx.Graph, DispatchNodes, LayerPlan], None]] = {
    "local": _lower_local,
    "flat": lower_flat,
    "dedup": lower_dedup,
    "hierarchical": lower_hierarchical,
    "allgather": lower_allgather,
}
