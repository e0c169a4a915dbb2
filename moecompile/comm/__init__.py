"""Exchanges built from registered ops: each module turns the one-device dispatch of a layer into its own."""

from collections.abc import Callable

from torch import fx

from moecompile.comm.allgather import lower_allgather
from moecompile.comm.dedup import lower_dedup
from moecompile.comm.dispatch import DispatchNodes
from moecompile.comm.flat import lower_flat
from moecompile.comm.hierarchical import lower_hierarchical
from moecompile.comm.local import lower_local
from moecompile.plan import LayerPlan

LOWERINGS: dict[str, Callable[[fx.Graph, DispatchNodes, LayerPlan], None]] = {
    "local": lower_local,
    "flat": lower_flat,
    "dedup": lower_dedup,
    "hierarchical": lower_hierarchical,
    "allgather": lower_allgather,
}

__all__ = ["LOWERINGS", "DispatchNodes"]
