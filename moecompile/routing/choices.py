"""Enums of the router and of its load balancing."""

from __future__ import annotations

from enum import Enum


class Choice(str, Enum):
    """Who chooses: each token its experts, or each expert its tokens (Zhou et al. 2022, arXiv 2202.09368)."""

    token = "token"
    expert = "expert"
    hash = "hash"  # a hash of the token id (Roller et al. 2021, arXiv 2106.04426; DeepSeek-V4's first layers)


class DropPolicy(str, Enum):
    """Which tokens an expert keeps when more tokens choose it than its capacity."""

    position = "position"  # the first ones
    score = "score"  # those with the largest routing weights


class Workload(str, Enum):
    """Routing that ignores the router's choice, for benchmarks."""

    none = "none"
    balanced = "balanced"  # every expert gets the same number of tokens
    zipf = "zipf"  # expert i is drawn with probability ~ 1 / (i + 1) ** skew
    hot = "hot"  # half of the tokens choose expert 0
    drift = "drift"  # zipf, but the most loaded expert changes at every step
    hot_block = "hot_block"  # three quarters of the choices go to the first `hot_experts` experts
    hot_spread = "hot_spread"  # the same, with these experts spread evenly over all
    ragged = "ragged"  # another hot block in every micro-batch, and so on every rank
    cold_block = "cold_block"  # the last `hot_experts` experts get nothing
    rotating = "rotating"  # a hot block that moves by its size at every step
    burst = "burst"  # a hot block at every fourth step, else uniform

    @property
    def has_hot_experts(self) -> bool:
        """Whether it reads `hot_experts`."""
        return self not in (Workload.none, Workload.balanced, Workload.zipf, Workload.hot, Workload.drift)


class GroupScore(str, Enum):
    """How group-limited routing scores a group of experts."""

    max = "max"  # DeepSeek-V2: the best expert
    top2 = "top2"  # DeepSeek-V3 as transformers computes it: sum of the two best
    topk_over_m = "topk_over_m"  # DeepSeek-V3 report: sum of the top_k / top_groups best


class BalanceRule(str, Enum):
    """How the load of the experts is balanced."""

    auto = "auto"  # a model's own loss; of routers that are made here Switch's, where tokens choose by scores
    none = "none"
    bias = "bias"  # DeepSeek-V3: a correction bias that depends on the load, no auxiliary loss
    quantile = "quantile"  # Kimi K3: a correction bias that is solved from the scores of the global batch


class BiasUpdate(str, Enum):
    """How the correction bias is updated, once per optimizer step."""

    sign = "sign"  # DeepSeek-V3: += rate * sign(mean load - load)
    proportional = "proportional"  # += rate * (mean load - load) / mean load
