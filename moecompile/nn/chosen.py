"""Limits of a router's choice: groups that are open to a token, a capacity, and a choice that is replayed.

Legend: T tokens, E experts, K top-k, G groups of e experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecompile.errors import MoecompileError
from moecompile.routing import RouterConfig


def open_experts(choice_TE: Tensor, config: RouterConfig, num_experts: int) -> Tensor:
    """Which experts are in the `top_groups` best groups of a token, (T, E) bool."""
    per_group = num_experts // config.groups
    by_group_TGe = choice_TE.view(-1, config.groups, per_group)
    num_best = {"max": 1, "top2": 2, "topk_over_m": max(1, config.top_k // config.top_groups)}[config.group_score]
    group_scores_TG = by_group_TGe.topk(min(num_best, per_group), dim=-1).values.sum(-1)
    best = group_scores_TG.topk(config.top_groups, dim=-1, sorted=False).indices
    open_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter_(1, best, True)
    return open_TG.repeat_interleave(per_group, dim=1)


def best_of_each_group(choice_TE: Tensor, config: RouterConfig) -> Tensor:
    """Ids of the top_k / groups best experts of every group, (T, K) int64, group by group."""
    by_group_TGe = choice_TE.unflatten(1, (config.groups, -1))
    within_TGk = by_group_TGe.topk(config.top_k // config.groups, dim=-1, sorted=False).indices
    first_G1 = torch.arange(config.groups, device=choice_TE.device).unsqueeze(1) * by_group_TGe.shape[2]
    ids_TK: Tensor = (within_TGk + first_G1).flatten(1)
    return ids_TK


def kept_within(
    ids_TK: Tensor, weights_TK: Tensor, num_experts: int, factor: float, drop: str, real_T: Tensor | None
) -> tuple[Tensor, Tensor]:
    """ids, `num_experts` for an assignment beyond the capacity, and weights, 0 for one and unchanged for others."""
    kept_TK = torch.ops.moecompile.within_capacity(ids_TK, weights_TK.detach(), num_experts, factor, drop, real_T)
    return ids_TK.masked_fill(~kept_TK, num_experts), weights_TK.masked_fill(~kept_TK, 0.0)


def replayed_or_live(ids_TK: Tensor, live_TK: Tensor, num_experts: int) -> Tensor:
    """The ids to replay, (T, K) or (B, at least S, K), and the live choice for tokens that have none.

    Raises:
        MoecompileError: they belong to another number of tokens.
    """
    if ids_TK.dim() == 3:
        ids_TK = ids_TK[:, : live_TK.shape[0] // max(1, ids_TK.shape[0])].flatten(0, 1)
    if ids_TK.shape[0] != live_TK.shape[0]:
        raise MoecompileError(f"routes of {ids_TK.shape[0]} tokens are replayed, but {live_TK.shape[0]} are routed")
    ids_TK = ids_TK.to(live_TK)
    known_T1 = ((ids_TK >= 0) & (ids_TK < num_experts)).all(1, keepdim=True)
    return torch.where(known_T1, ids_TK, live_TK)


def in_words(config: RouterConfig, num_experts: int) -> str:
    """The router in one line."""
    limit = f", {config.top_groups} of {config.groups} groups by {config.group_score}" if config.groups > 1 else ""
    limit = f", as many of each of {config.groups} groups" if config.even_groups else limit
    words = [f"{num_experts} experts, {config.score} top-{config.top_k}{limit}, scale={config.scale}"]
    words += {"token": [], "expert": ["experts choose"], "hash": ["a hash of the token id chooses"]}[config.choice]
    if config.capacity_factor is not None:
        words.append(f"capacity {config.capacity_factor} by {config.drop}")
    if config.workload != "none":
        words.append(f"workload {config.workload}")
    return ", ".join(words)
