"""Over which mesh axes gradients are summed: a pure function of the placement of weights and the split of the batch.

The rule: All reductions are plain sums. A rank's loss is a sum over its own tokens, so the gradient of a weight is the
sum over all ranks whose tokens used it. The batch is split over every axis. Along an axis on which ranks have
*different* weights, the exchange brings the tokens to the weight, and in backward their gradients, so nothing is left
to sum there.
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
