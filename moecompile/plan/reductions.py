"""Over which mesh axes gradients are summed: a pure function of where tokens are split and where weights live.

The rule, for every class of weights:

    sum over the axes on which tokens are split at that weight, minus the axes that own it

A rank's loss is a sum over its own tokens, so the gradient of a weight is the sum over all ranks whose tokens used it.
Along an axis that *owns* a weight (its ranks have different parts of it), the forward brings the tokens to the weight,
and the backward brings their gradients back, so nothing is left to sum there. Along an axis on which tokens are *not*
split, every rank computes the whole gradient.

Along `cp` tokens are split everywhere: its ranks have different positions of the same sequences. Attention brings all
positions together, and its backward takes each gradient back to where its position is.

At the norms of single heads, heads are split over `tp` instead of tokens: each rank's gradient is from its own heads, a
part of the whole one too.
"""

from __future__ import annotations

from dataclasses import dataclass

from moecompile.mesh import DENSE_AXES, EXPERT_AXES, TOKEN_AXES, MeshSpec
from moecompile.plan.plan import Reduction


@dataclass(frozen=True, kw_only=True)
class WeightClass:
    """A class of weights on the mesh.

    axes: of the factorization of the ranks that places it. split: axes on which tokens (or heads) are split at it.
    owned: axes whose ranks own different parts of it. sharded: axes over which it is stored in parts.
    """

    name: str
    axes: tuple[str, ...] = DENSE_AXES
    split: tuple[str, ...] = TOKEN_AXES
    owned: tuple[str, ...] = ()
    sharded: tuple[str, ...] = ()


DENSE, ROUTER, EXPERTS = "dense", "router", "experts"
SPLIT, HEADS, INSIDE = "dense, split over tp", "norms of heads", "inside MoE layers"

_CLASSES = (
    WeightClass(name=DENSE, sharded=("dp_shard", "cp")),
    WeightClass(name=SPLIT, owned=("tp",), sharded=("dp_shard", "tp")),
    WeightClass(name=HEADS, split=DENSE_AXES, sharded=("dp_shard", "tp")),
    WeightClass(name=INSIDE, split=DENSE_AXES, sharded=("dp_shard", "tp")),  # shared experts, norms: tokens are cut
    WeightClass(name=ROUTER),
    WeightClass(name=EXPERTS, axes=EXPERT_AXES, split=EXPERT_AXES, owned=("ep",), sharded=("edp", "ep")),
)
_WITHOUT_TP = (DENSE, ROUTER, EXPERTS)  # the others are like `dense` then


def reductions(mesh: MeshSpec) -> tuple[Reduction, ...]:
    """The reductions of all classes of weights on `mesh`; axes of one rank are left out."""
    return tuple(_reduction(kind, mesh) for kind in _CLASSES if mesh.tp > 1 or kind.name in _WITHOUT_TP)


def _reduction(kind: WeightClass, mesh: MeshSpec) -> Reduction:
    axes = tuple(axis for axis in kind.axes if mesh.size(axis) > 1)
    return Reduction(
        parameters=kind.name,
        replicated_over=tuple(axis for axis in axes if axis not in kind.sharded),
        sharded_over=tuple(axis for axis in axes if axis in kind.sharded),
        sum_over=tuple(axis for axis in axes if axis in kind.split and axis not in kind.owned),
    )
