"""The table of router scores: what follows from a score for balance, scaling and the sum of the weights.

The functions themselves are in `moecompile.nn.scores`, because configs and plans work without torch.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ScoreRule:
    """One score.

    after_topk: whether experts are chosen by their logits, and only the chosen logits are scored.
    in_unit_interval: whether what experts are chosen by lies in [0, 1].
    sums_to_one: whether the weights of the chosen experts sum to 1 without `normalize`.
    at_zero: the weight of a chosen expert where all E logits are 0, by E.
    """

    after_topk: bool = False
    in_unit_interval: bool = False
    sums_to_one: bool = False
    at_zero: Callable[[int], float]


SCORES: OrderedDict[str, ScoreRule] = OrderedDict(
    softmax=ScoreRule(in_unit_interval=True, at_zero=lambda num_experts: 1 / num_experts),
    sigmoid=ScoreRule(in_unit_interval=True, at_zero=lambda num_experts: 0.5),
    # gpt-oss: over the logits of the chosen experts only
    softmax_after_topk=ScoreRule(after_topk=True, sums_to_one=True, at_zero=lambda num_experts: 1 / num_experts),
    # DeepSeek-V4: sqrt(log(1 + exp(logit)))
    sqrt_softplus=ScoreRule(at_zero=lambda num_experts: math.sqrt(math.log(2))),
    # Llama 4, Cohere2-MoE: of the logits of the chosen experts only
    sigmoid_after_topk=ScoreRule(after_topk=True, at_zero=lambda num_experts: 0.5),
)
"""By `routing.score`. `moecompile.register_score` adds rows; a score that is not here raises."""
NO_SUCH_SCORE = "Use one of these; one of your own is registered by a module of plugins=[MODULE]"
"""What to change where a score is not here."""
