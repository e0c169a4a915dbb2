"""Random numbers that depend on a key alone, and routing for benchmarks.

Legend: T tokens, E experts, K top-k, G groups, M open groups.

NOTE on keys: a key is an int64 tensor on the CPU, (seed, step, micro-batch, layer). What is drawn from it depends on
nothing else: not on the mesh, not on the global random state, not on what was drawn before.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

STEP = 1  # place in the key


@torch.library.custom_op("moecompile::keyed_uniform", mutates_args=())
def keyed_uniform(like: Tensor, key: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) in the shape and dtype of `like`, from `key` (see the note above)."""
    digest = hashlib.blake2b(repr(key.tolist()).encode(), digest_size=8).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)


@keyed_uniform.register_fake
def _(like: Tensor, key: Tensor) -> Tensor:
    return torch.empty_like(like)


@torch.library.custom_op("moecompile::workload_scores", mutates_args=())
def workload_scores(noise_TE: Tensor, key: Tensor, kind: str, skew: float) -> Tensor:
    """Scores whose top-k are the workload's choice, (T, E): Gumbel top-k, which draws without replacement.

    Args:
        noise_TE: uniform numbers. key: its step moves `drift`.
        kind: `zipf`: p_i ~ (i + 1) ** -skew. `drift`: the same, with the experts' order moved on by one at every step.
            `hot`: every other token takes expert 0, the others take it last; the rest is uniform.
    """
    num_experts = noise_TE.shape[1]
    gumbel_TE = -(-noise_TE.clamp_min(torch.finfo(noise_TE.dtype).tiny).log()).log()
    rank_E = torch.arange(num_experts, device=noise_TE.device)
    if kind == "hot":
        far = 1e6  # beyond every Gumbel number, and finite so that sums over a group stay numbers
        gumbel_TE[::2, 0] = far
        gumbel_TE[1::2, 0] = -far
        return gumbel_TE
    if kind == "drift":
        rank_E = (rank_E - int(key[STEP])) % num_experts
    return gumbel_TE - skew * (rank_E + 1).to(noise_TE.dtype).log()


@workload_scores.register_fake
def _(noise_TE: Tensor, key: Tensor, kind: str, skew: float) -> Tensor:
    return torch.empty_like(noise_TE)


@torch.library.custom_op("moecompile::balanced_ids", mutates_args=())
def balanced_ids(like_TE: Tensor, top_k: int, groups: int, top_groups: int) -> Tensor:
    """The even workload, (T, K) int64: token t opens the groups (t + j) mod G, j < M, and its slots go round them.

    NOTE on why it is even: within G tokens in a row each group is open once in every role j, so it gets K assignments,
    which go round its experts. Loads are equal where G divides T and E divides T * K; without a group limit they differ
    by one at most.
    """
    num_tokens, num_experts = like_TE.shape
    if top_groups == groups:
        groups = top_groups = 1
    size, device = num_experts // groups, like_TE.device
    token = torch.arange(num_tokens, device=device).unsqueeze(1)
    slot = torch.arange(top_k, device=device)
    role, nth = slot % top_groups, slot // top_groups
    # Slots that roles before this one have of a token: with K slots over M roles, the first K mod M have one more.
    before = role * (top_k // top_groups) + role.clamp(max=top_k % top_groups)
    place = torch.div(token, groups, rounding_mode="floor") * top_k + before + nth
    return (token + role) % groups * size + place % size


@balanced_ids.register_fake
def _(like_TE: Tensor, top_k: int, groups: int, top_groups: int) -> Tensor:
    return like_TE.new_empty((like_TE.shape[0], top_k), dtype=torch.int64)
