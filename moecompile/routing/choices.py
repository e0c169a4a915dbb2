"""The choices of a router and of its balance: enums, not booleans, where there is a choice of behaviour."""

from __future__ import annotations

from enum import Enum


class Choice(str, Enum):
    """Who chooses: each token its experts, or each expert its tokens (Zhou et al. 2022, arXiv 2202.09368)."""

    token = "token"
    expert = "expert"


class Score(str, Enum):
    """What turns router logits into scores."""

    softmax = "softmax"
    sigmoid = "sigmoid"
    softmax_after_topk = "softmax_after_topk"  # gpt-oss: over the logits of the chosen experts alone


class DropPolicy(str, Enum):
    """Which tokens an expert keeps when more choose it than its capacity."""

    position = "position"  # the first ones
    score = "score"  # those with the largest routing weights


class Workload(str, Enum):
    """Routing that ignores the router's choice, for benchmarks."""

    none = "none"
    balanced = "balanced"  # every expert gets the same number of tokens
    zipf = "zipf"  # expert i is drawn with probability ~ 1 / (i + 1) ** skew
    hot = "hot"  # half of the tokens choose expert 0
    drift = "drift"  # zipf whose most loaded expert moves on at every step


class GroupScore(str, Enum):
    """How an expert group is scored for group-limited routing."""

    max = "max"  # DeepSeek-V2: the best expert
    top2 = "top2"  # DeepSeek-V3 as transformers computes it: sum of the two best
    topk_over_m = "topk_over_m"  # DeepSeek-V3 report: sum of the top_k / top_groups best


class BalanceRule(str, Enum):
    """How the load of the experts is kept even."""

    none = "none"
    bias = "bias"  # DeepSeek-V3: a correction bias follows the load, no auxiliary loss


class BiasUpdate(str, Enum):
    """How the correction bias moves once per optimizer step."""

    sign = "sign"  # DeepSeek-V3: += rate * sign(mean load - load)
    proportional = "proportional"  # += rate * (mean load - load) / mean load
