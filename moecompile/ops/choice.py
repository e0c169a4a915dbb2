"""Which tokens are assigned to which experts: capacity and expert choice. Index ops without gradients.

Legend: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def capacity(factor: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    """Tokens that one expert takes of a micro-batch: ceil(factor * T * K / E), computed exactly."""
    return math.ceil(Fraction(str(factor)) * num_tokens * top_k / num_experts)


def _capacity_of(real_T: Tensor, factor: float, top_k: int, num_experts: int) -> Tensor:
    """`capacity` for the real tokens, int64 on their device: the host need not know how many there are."""
    exact = Fraction(str(factor)) * top_k / num_experts
    return -(-real_T.sum() * exact.numerator // exact.denominator)


@torch.library.custom_op("moecompile::within_capacity", mutates_args=())
def within_capacity(
    ids_TK: Tensor, weights_TK: Tensor, num_experts: int, factor: float, policy: str, real_T: Tensor | None = None
) -> Tensor:
    """Which assignments are kept if each expert takes at most `capacity` of them, (T, K) bool.

    Args:
        ids_TK: num_experts for padding.
        policy: `position`: the first ones by the token's position in the micro-batch, in any slot (Switch,
            arXiv 2101.03961). `score`: those with the largest weights; among equal weights, the first.
        real_T: which tokens are no padding, (T,) bool, and count for the capacity; None: all.
    """
    num_tokens, top_k = ids_TK.shape
    flat = ids_TK.reshape(-1)
    if policy == "score":
        by_weight = torch.sort(weights_TK.reshape(-1), descending=True, stable=True).indices
        order = by_weight.index_select(0, torch.argsort(flat.index_select(0, by_weight), stable=True))
    else:
        order = torch.argsort(flat, stable=True)
    # Assignments are sorted by expert now, preferred ones first. Their rank is the offset from the expert's first one.
    expert = flat.index_select(0, order)
    position = torch.arange(flat.numel(), device=flat.device)
    rank = position - torch.searchsorted(expert, expert)
    kept = torch.empty_like(flat, dtype=torch.bool)
    if real_T is None:
        kept[order] = rank < capacity(factor, num_tokens, top_k, num_experts)
    else:
        kept[order] = rank < _capacity_of(real_T, factor, top_k, num_experts)
    return kept.view(num_tokens, top_k)


@within_capacity.register_fake
def _(
    ids_TK: Tensor, weights_TK: Tensor, num_experts: int, factor: float, policy: str, real_T: Tensor | None = None
) -> Tensor:
    return torch.empty_like(ids_TK, dtype=torch.bool)


@torch.library.custom_op("moecompile::expert_choice", mutates_args=())
def expert_choice(scores_TE: Tensor, top_k: int, factor: float, real_T: Tensor | None = None) -> Tensor:
    """Each expert takes the `capacity` tokens with the highest scores (Zhou et al. 2022, arXiv 2202.09368).

    Args:
        real_T: which tokens are no padding, (T,) bool; only they are taken, and count for the capacity. None: all.

    Returns:
        (T, E) int64: e in column e where expert e took the token, else E.
    """
    num_tokens, num_experts = scores_TE.shape
    taken = min(capacity(factor, num_tokens, top_k, num_experts), num_tokens)
    no_expert = torch.full(scores_TE.shape, num_experts, dtype=torch.int64, device=scores_TE.device)
    experts = torch.arange(num_experts, device=scores_TE.device).expand(taken, num_experts)
    if real_T is None:
        return no_expert.scatter_(0, scores_TE.topk(taken, dim=0, sorted=False).indices, experts)
    scores_TE = scores_TE.masked_fill(~real_T.unsqueeze(1), float("-inf"))
    most = torch.minimum(_capacity_of(real_T, factor, top_k, num_experts), real_T.sum())
    beyond = torch.arange(taken, device=scores_TE.device).unsqueeze(1) >= most
    best = scores_TE.topk(taken, dim=0).indices
    return no_expert.scatter_(0, best, experts.masked_fill(beyond, num_experts))


@expert_choice.register_fake
def _(scores_TE: Tensor, top_k: int, factor: float, real_T: Tensor | None = None) -> Tensor:
    return torch.empty_like(scores_TE, dtype=torch.int64)


# -- hash routing: the experts of a token follow from its id alone --------------------------------------------------
#
#     choice of token id v in a layer, without a table (Floyd's way to draw K of E without replacement):
#         for j = E - K ... E - 1:   t = h(v, layer, j) mod (j + 1);   take t, or j if t is taken
#
# Every set of K experts is equally likely over ids. h is the finalizer of splitmix64 (Steele et al. 2014), in 64-bit
# arithmetic that wraps around, so the choice is the same on every machine.
#
# Legend: T tokens, E experts, K top-k.

# Odd multipliers of splitmix64 as signed 64-bit integers, and the shifts between them.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


@torch.library.custom_op("moecompile::hashed_ids", mutates_args=())
def hashed_ids(tokens_T: Tensor, num_experts: int, top_k: int, layer: int) -> Tensor:
    """Experts of each token, (T, K) int64, all different.

    Args:
        tokens_T: token ids, any integer type. layer: layers with different numbers choose independently.
    """
    start_T = _mixed(tokens_T.to(torch.int64) + _mixed(tokens_T.new_full((), layer + 1, dtype=torch.int64)))
    chosen: list[Tensor] = []
    for last in range(num_experts - top_k, num_experts):
        drawn_T = (_mixed(start_T + last) & (2**63 - 1)) % (last + 1)
        taken_T = torch.zeros_like(drawn_T, dtype=torch.bool)
        for earlier_T in chosen:
            taken_T |= earlier_T == drawn_T
        chosen.append(drawn_T.masked_fill(taken_T, last))
    return torch.stack(chosen, dim=1)


@hashed_ids.register_fake
def _(tokens_T: Tensor, num_experts: int, top_k: int, layer: int) -> Tensor:
    return tokens_T.new_empty((tokens_T.shape[0], top_k), dtype=torch.int64)


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's finalizer of x + its increment; int64 stands for 64 bits."""
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    mixed: Tensor = x ^ _shifted(x, 31)
    return mixed


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right: int64's own keeps the sign."""
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted
