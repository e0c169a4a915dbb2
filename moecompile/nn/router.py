"""The router: score -> correction bias -> group limit -> top-k -> normalise -> scale.

Legend: T tokens, D model dim, E experts, K top-k, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moecompile import ops  # noqa: F401  (registers the ops)


class Router(nn.Module):
    """Chooses `top_k` experts per token.

    weight (E, D) is at least fp32, and so is all arithmetic, under every precision. `correction_bias` (E,) shifts the
    choice but not the routing weights (DeepSeek-V3 report, section 2.1.2). `load` (E,) counts the tokens that chose
    each expert since the last balance update; it differs between ranks and is not in the state dict.

    Args:
        d_model, num_experts, top_k: sizes.
        score: `softmax` or `sigmoid`.
        normalize: the weights of a token sum to `scale`; else they are the scores times `scale`.
        groups, top_groups: contiguous expert groups, and how many of them a token may use.
        group_score: `max` (DeepSeek-V2), `top2` (DeepSeek-V3 as transformers computes it) or `topk_over_m` (sum of the
            top_k / top_groups best, as the DeepSeek-V3 report says).
    """

    correction_bias: Tensor
    load: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int,
        score: str = "softmax",
        normalize: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int = 1,
        group_score: str = "top2",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.score, self.normalize, self.scale = score, normalize, scale
        self.groups, self.top_groups, self.group_score = groups, top_groups, group_score
        wide = torch.promote_types(dtype, torch.float32)
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, device=device, dtype=wide))
        self.register_buffer("correction_bias", torch.zeros(num_experts, device=device, dtype=wide))
        self.register_buffer("load", torch.zeros(num_experts, device=device, dtype=torch.int64), persistent=False)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weights_TK (fp32 or wider) and ids_TK (int64)."""
        scores_TE = self.scores(x_TD)
        ids_TK = self.choose(scores_TE)
        if self.training:  # validation and generation say nothing about the load of training
            torch.ops.moecompile.count_load(self.load, ids_TK)
        weights_TK = scores_TE.gather(1, ids_TK)
        if self.normalize:
            # The floor keeps sigmoid scores that all underflow from dividing by zero (DeepSeek-V3 uses 1e-20).
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).clamp_min(1e-20)
        return weights_TK * self.scale, ids_TK

    def scores(self, x_TD: Tensor) -> Tensor:
        """Scores of all experts, (T, E), fp32 or wider."""
        logits_TE: Tensor = torch.ops.moecompile.router_logits(x_TD, self.weight)
        return logits_TE.sigmoid() if self.score == "sigmoid" else logits_TE.softmax(-1)

    @torch.no_grad()
    def choose(self, scores_TE: Tensor) -> Tensor:
        """Ids of the chosen experts, (T, K) int64."""
        choice_TE = scores_TE + self.correction_bias
        if self.top_groups < self.groups:
            # -inf, not 0: a closed group must lose even against negative corrected scores.
            choice_TE = choice_TE.masked_fill(~self._open_experts(choice_TE), float("-inf"))
        return choice_TE.topk(self.top_k, dim=-1, sorted=False).indices

    def _open_experts(self, choice_TE: Tensor) -> Tensor:
        per_group = self.num_experts // self.groups
        by_group_TGe = choice_TE.view(-1, self.groups, per_group)
        num_best = {"max": 1, "top2": 2, "topk_over_m": max(1, self.top_k // self.top_groups)}[self.group_score]
        group_scores_TG = by_group_TGe.topk(min(num_best, per_group), dim=-1).values.sum(-1)
        best = group_scores_TG.topk(self.top_groups, dim=-1, sorted=False).indices
        open_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter_(1, best, True)
        return open_TG.repeat_interleave(per_group, dim=1)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        limit = f", {self.top_groups} of {self.groups} groups by {self.group_score}" if self.groups > 1 else ""
        return f"{self.num_experts} experts, {self.score} top-{self.top_k}{limit}, scale={self.scale}"
