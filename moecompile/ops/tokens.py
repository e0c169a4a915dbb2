"""Shape and counting ops around the router.

Legend: T tokens, D model dim, E experts, K top-k.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from moecompile.torch_private import in_backward, unsafe_view

_lib = torch.library.Library("moecompile", "FRAGMENT")
_lib.define("flatten_tokens(Tensor(a) x) -> Tensor(a)")
_lib.define("unflatten_tokens(Tensor y, Tensor like) -> Tensor")
_lib.define("router_logits(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")


def _flatten_tokens(x: Tensor) -> Tensor:
    """(..., D) -> (T, D): a view if the strides allow it."""
    return x.reshape(-1, x.shape[-1])


def _unflatten_tokens(y_TD: Tensor, like: Tensor) -> Tensor:
    """(T, D) -> the leading shape of `like`."""
    # As in torch's linear: y has no other user, so the result need not be a view, whose gradient FSDP could not hook.
    shaped: Tensor = unsafe_view(y_TD.contiguous(), like.shape)
    return shaped


def _router_logits(x: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """x W^T + b in at least fp32, also under autocast, (..., E)."""
    wide, device_type = torch.promote_types(weight_ED.dtype, torch.float32), x.device.type
    bias_E = None if bias_E is None else bias_E.to(wide)
    if not torch.amp.is_autocast_available(device_type):  # meta
        return F.linear(x.to(wide), weight_ED.to(wide), bias_E)
    with torch.autocast(device_type, enabled=False):
        return F.linear(x.to(wide), weight_ED.to(wide), bias_E)


# Composites: autograd and fake tensors see the torch functions inside.
_lib.impl("flatten_tokens", _flatten_tokens, "CompositeImplicitAutograd")
_lib.impl("unflatten_tokens", _unflatten_tokens, "CompositeImplicitAutograd")
_lib.impl("router_logits", _router_logits, "CompositeImplicitAutograd")


@torch.library.custom_op("moecompile::count_routing", mutates_args=("load_E", "node_tokens", "sums"))
def count_routing(
    load_E: Tensor,
    node_tokens: Tensor,
    sums: Tensor,
    chosen_TK: Tensor,
    kept_TK: Tensor,
    probs_TE: Tensor | None,
    real_T: Tensor | None = None,
    num_identity: int = 0,
) -> None:
    """Adds one forward to the counters of a `LoadMeter`, in place.

    Adds nothing in backward, so that a recomputed forward (activation checkpointing) is not counted twice.

    Args:
        load_E: assignments of each expert. node_tokens: distinct tokens that reach each node; node i has the i-th
            equal part of the experts. sums: tokens, dropped assignments, entropy in nats.
        chosen_TK, kept_TK: expert ids before and after drops; num_experts means no expert.
        probs_TE: each token's distribution over experts, for the entropy; None: not counted.
        real_T: which tokens are no padding, (T,) bool; None: all. Padding has no expert in chosen_TK.
        num_identity: the last of the experts, which are on no node.
    """
    if in_backward():
        return
    num_experts, num_nodes = load_E.numel(), node_tokens.numel()
    load_E.add_(expert_counts(chosen_TK, num_experts))
    per_node = (num_experts - num_identity) // num_nodes
    node_TK = torch.div(kept_TK, per_node, rounding_mode="floor").clamp_max_(num_nodes)  # num_nodes: on no node
    reached = torch.zeros(kept_TK.shape[0], num_nodes + 1, dtype=torch.bool, device=kept_TK.device)
    node_tokens.add_(reached.scatter_(1, node_TK, True)[:, :num_nodes].sum(0))
    sums[0] += chosen_TK.shape[0] if real_T is None else real_T.sum()
    sums[1] += (kept_TK == num_experts).sum() - (chosen_TK == num_experts).sum()
    if probs_TE is not None:
        entropy_T = torch.special.entr(probs_TE).sum(-1, dtype=sums.dtype)
        sums[2] += (entropy_T if real_T is None else entropy_T.masked_fill(~real_T, 0.0)).sum()


@count_routing.register_fake
def _(
    load_E: Tensor,
    node_tokens: Tensor,
    sums: Tensor,
    chosen_TK: Tensor,
    kept_TK: Tensor,
    probs_TE: Tensor | None,
    real_T: Tensor | None = None,
    num_identity: int = 0,
) -> None:
    return None


@torch.library.custom_op("moecompile::place_ids", mutates_args=())
def place_ids(ids_TK: Tensor, positions_E: list[int]) -> Tensor:
    """The position of each chosen expert in the order in which ranks hold them, (T, K); an id E (none) stays E."""
    return _positions(tuple(positions_E), ids_TK.device)[ids_TK]


@place_ids.register_fake
def _(ids_TK: Tensor, positions_E: list[int]) -> Tensor:
    return ids_TK.new_empty(ids_TK.shape, dtype=torch.int64)


@functools.cache  # so that a device gets each table once
def _positions(positions_E: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([*positions_E, len(positions_E)], device=device)


@torch.library.custom_op("moecompile::count_experts", mutates_args=())
def count_experts(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Assignments to each expert, (E,) int64, without dropped ones."""
    return expert_counts(ids_TK, num_experts).clone()  # an op must not return a view


@count_experts.register_fake
def _(ids_TK: Tensor, num_experts: int) -> Tensor:
    return ids_TK.new_empty(num_experts, dtype=torch.int64)


def expert_counts(ids: Tensor, num_experts: int) -> Tensor:
    """How often each expert id occurs, (E,) int64; the id num_experts (no expert) is not counted.

    `bincount` would cause a host sync, to get the size of its result.
    """
    flat = ids.reshape(-1)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]


# -- tokens in chunks, and one exchange of counts for all of them ---------------------------------------------------
#
# Legend: T tokens, r ranks on the axis, n chunks, m numbers per rank and chunk.

_lib.define("split_tokens(Tensor(a) x, int num_chunks) -> Tensor(a)[]")
_lib.define("counts_of_chunk(Tensor(a) counts, int chunk, int num_chunks) -> Tensor(a)")


def _split_tokens(x: Tensor, num_chunks: int) -> tuple[Tensor, ...]:
    """Parts of the first dim, of equal size or one apart; empty ones where there are fewer tokens than chunks.

    The gradient is one concatenation.
    """
    size = x.shape[0]
    bounds = [size * i // num_chunks for i in range(num_chunks + 1)]
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    return tuple(torch.split_with_sizes(x, sizes))


def _counts_of_chunk(counts: Tensor, chunk: int, num_chunks: int) -> Tensor:
    """One chunk's numbers of joined counts, (..., n m) -> (..., m)."""
    part: Tensor = counts.unflatten(-1, (num_chunks, counts.shape[-1] // num_chunks)).select(-2, chunk)
    return part


# Composites: autograd and fake tensors see the torch functions inside.
_lib.impl("split_tokens", _split_tokens, "CompositeImplicitAutograd")
_lib.impl("counts_of_chunk", _counts_of_chunk, "CompositeImplicitAutograd")


@torch.library.custom_op("moecompile::join_counts", mutates_args=())
def join_counts(counts: list[Tensor], num_ranks: int) -> Tensor:
    """The counts of all chunks side by side: n tensors of r * m numbers -> (r, n m)."""
    return torch.cat([each.reshape(num_ranks, -1) for each in counts], dim=1)


@join_counts.register_fake
def _(counts: list[Tensor], num_ranks: int) -> Tensor:
    return counts[0].new_empty(num_ranks, sum(each.numel() for each in counts) // num_ranks)
