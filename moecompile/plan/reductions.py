"""Which ranks' gradients are summed: one pure function of where weights live and how the batch is split.

The rule. All reductions are plain sums. A rank's loss is a sum over its own tokens, so the gradient
of a weight is the sum over all ranks whose tokens it saw. The batch is split over every axis; along an axis on which
ranks own *different* weights, the tokens came to the weight through the exchange and their gradients with them, so
nothing is left to be summed there.
"""

from __future__ import annotations

from moecompile.mesh import MeshSpec
from moecompile.plan.plan import Reduction

AXES = ("dp_replicate", "edp", "ep")


def reductions(mesh: MeshSpec) -> tuple[Reduction, ...]:
    """The reductions of all parameter classes on `mesh`; axes of one rank are left out."""
    sizes = {"dp_replicate": mesh.dp_replicate, "edp": mesh.edp_shard, "ep": mesh.ep}
    batch_axes = tuple(axis for axis in AXES if sizes[axis] > 1)

    def reduction(parameters: str, sharded: tuple[str, ...], owned: tuple[str, ...]) -> Reduction:
        here = tuple(axis for axis in batch_axes if axis in sharded)
        return Reduction(
            parameters=parameters,
            replicated_over=tuple(axis for axis in batch_axes if axis not in sharded),
            sharded_over=here,
            sum_over=tuple(axis for axis in batch_axes if axis not in owned),
        )

    return (
        reduction("dense", sharded=("edp", "ep"), owned=()),
        reduction("router", sharded=(), owned=()),
        reduction("experts", sharded=("edp", "ep"), owned=("ep",)),
    )
