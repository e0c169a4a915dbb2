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

from moecompile.mesh import MeshSpec, Part, axes_that_split, dense_axes, expert_axes
from moecompile.plan.plan import Reduction


@dataclass(frozen=True, kw_only=True)
class WeightClass:
    """A class of weights on the mesh. Parts stand for the axes that split them.

    split: where tokens (or heads) are split at it. owned: where ranks own different parts of it. stored: over what it
    is stored in parts besides. experts: which factorization of the ranks places it. only_with: it is `dense` on a mesh
    that does not split this.
    """

    name: str
    split: tuple[Part, ...] = (Part.BATCH, Part.SEQUENCE)
    owned: tuple[Part, ...] = (Part.LAYERS,)
    stored: tuple[Part, ...] = ()
    experts: bool = False
    only_with: Part | None = None


DENSE, ROUTER, EXPERTS = "dense", "router", "experts"
SPLIT, HEADS, INSIDE = f"dense, split over {axes_that_split(Part.WEIGHTS)[0]}", "norms of heads", "inside MoE layers"

_TOKENS = (Part.BATCH, Part.SEQUENCE)
_CLASSES = (
    WeightClass(name=DENSE, stored=(Part.STORED,)),
    WeightClass(name=SPLIT, owned=(Part.LAYERS, Part.WEIGHTS), stored=(Part.STORED,), only_with=Part.WEIGHTS),
    WeightClass(
        name=HEADS, split=(*_TOKENS, Part.HEADS), stored=(Part.STORED, Part.HEADS), only_with=Part.WEIGHTS
    ),
    WeightClass(  # shared experts, norms: tokens are cut
        name=INSIDE, split=(*_TOKENS, Part.TOKENS), stored=(Part.STORED, Part.TOKENS), only_with=Part.TOKENS
    ),
    WeightClass(name=ROUTER),
    WeightClass(
        name=EXPERTS, split=(*_TOKENS, Part.STORED_EXPERTS), owned=(Part.LAYERS, Part.EXPERTS),
        stored=(Part.STORED_EXPERTS,), experts=True,
    ),
)  # fmt: skip


def reductions(mesh: MeshSpec) -> tuple[Reduction, ...]:
    """The reductions of all classes of weights on `mesh`; axes of one rank are left out."""
    return tuple(_reduction(each, mesh) for each in _CLASSES if each.only_with is None or mesh.axes(each.only_with))


def _reduction(kind: WeightClass, mesh: MeshSpec) -> Reduction:
    axes = mesh.axes(*(expert_axes() if kind.experts else dense_axes()))
    owned, sharded = mesh.axes(*kind.owned), mesh.axes(*kind.owned, *kind.stored)
    return Reduction(
        parameters=kind.name,
        replicated_over=tuple(axis for axis in axes if axis not in sharded),
        sharded_over=tuple(axis for axis in axes if axis in sharded),
        sum_over=tuple(axis for axis in axes if axis in mesh.axes(*kind.split) and axis not in owned),
    )
