"""Random numbers that depend only on a key, and synthetic routing for benchmarks.

Legend: T tokens, E experts, K top-k, G groups, M top groups.

NOTE on keys: a key is an int64 tensor on the CPU, (seed, step, micro-batch, layer). Numbers drawn with it depend on
nothing else: not on the mesh, not on the global random state, not on earlier draws.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

STEP, MICRO_BATCH = 1, 2  # index in the key
HOT_SHARE = 0.75  # of the first choice of each token


@torch.library.custom_op("moecompile::keyed_uniform", mutates_args=())
def keyed_uniform(like: Tensor, key: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) with the shape and dtype of `like`, drawn with `key` (see the note above)."""
    digest = hashlib.blake2b(repr(key.tolist()).encode(), digest_size=8).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)


@keyed_uniform.register_fake
def _(like: Tensor, key: Tensor) -> Tensor:
    return torch.empty_like(like)


@torch.library.custom_op("moecompile::workload_scores", mutates_args=())
def workload_scores(noise_TE: Tensor, key: Tensor, kind: str, skew: float, hot_experts: int = 1) -> Tensor:
    """Scores whose top-k is the choice of the workload, (T, E): Gumbel top-k, which draws without replacement.

    Args:
        noise_TE: uniform numbers. key: its step shifts `drift` and `rotating`, its micro-batch `ragged`.
        kind: `zipf`: p_i ~ (i + 1) ** -skew. `drift`: the same, with experts rotated by one at every step. `hot`: every
            other token takes expert 0 first, the others take it last; the rest is uniform. Others: moecompile.routing;
            experts of the block have `HOT_SHARE` of the probability together, those of a cold block none.
        hot_experts: size of the block.
    """
    num_experts = noise_TE.shape[1]
    gumbel_TE = -(-noise_TE.clamp_min(torch.finfo(noise_TE.dtype).tiny).log()).log()
    rank_E = torch.arange(num_experts, device=noise_TE.device)
    if kind == "hot":
        extreme = 1e6  # beyond every Gumbel number, but finite, so that sums over a group are not NaN
        gumbel_TE[::2, 0] = extreme
        gumbel_TE[1::2, 0] = -extreme
        return gumbel_TE
    if kind not in ("zipf", "drift"):
        return gumbel_TE + _block_log(rank_E, key, kind, hot_experts).to(noise_TE.dtype)
    if kind == "drift":
        rank_E = (rank_E - int(key[STEP])) % num_experts
    return gumbel_TE - skew * (rank_E + 1).to(noise_TE.dtype).log()


def _block_log(expert_E: Tensor, key: Tensor, kind: str, size: int) -> Tensor:
    """Logarithms of the probabilities of experts, up to a constant."""
    num_experts, step = expert_E.shape[0], int(key[STEP])
    if kind == "hot_spread":
        in_block_E = expert_E * size // num_experts != (expert_E - 1) * size // num_experts
    else:
        shift = {"ragged": int(key[MICRO_BATCH]), "rotating": step, "cold_block": -1}.get(kind, 0)
        in_block_E = (expert_E - shift * size) % num_experts < size
    if kind == "cold_block":
        return in_block_E * -1e6  # below every Gumbel number, but finite
    if kind == "burst" and step % 4 != 3:
        return torch.zeros_like(expert_E)
    cold = (1 - HOT_SHARE) / (num_experts - size)
    return in_block_E * math.log(HOT_SHARE / size / cold)


@workload_scores.register_fake
def _(noise_TE: Tensor, key: Tensor, kind: str, skew: float, hot_experts: int = 1) -> Tensor:
    return torch.empty_like(noise_TE)


@torch.library.custom_op("moecompile::balanced_ids", mutates_args=())
def balanced_ids(like_TE: Tensor, top_k: int, groups: int, top_groups: int) -> Tensor:
    """The balanced workload, (T, K) int64: token t uses the groups (t + j) mod G, j < M, and its slots cycle over them.

    NOTE on why it is balanced: in G consecutive tokens each group is used once in every role j, so it gets K
    assignments, which cycle over its experts. Loads are equal if G divides T and E divides T * K; with one group they
    differ by at most one.
    """
    num_tokens, num_experts = like_TE.shape
    size, device = num_experts // groups, like_TE.device
    token = torch.arange(num_tokens, device=device).unsqueeze(1)
    slot = torch.arange(top_k, device=device)
    role, nth = slot % top_groups, slot // top_groups
    # Slots of a token with smaller roles: of K slots over M roles, the first K mod M roles have one more.
    before = role * (top_k // top_groups) + role.clamp(max=top_k % top_groups)
    position = torch.div(token, groups, rounding_mode="floor") * top_k + before + nth
    return (token + role) % groups * size + position % size


@balanced_ids.register_fake
def _(like_TE: Tensor, top_k: int, groups: int, top_groups: int) -> Tensor:
    return like_TE.new_empty((like_TE.shape[0], top_k), dtype=torch.int64)
