"""The table of router scores: what follows from a score for balance, scaling and the sum of the weights.

The functions themselves are in `moecompile.nn.scores`, because configs and plans work without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from moecompile.routing.choices import Score


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


SCORES: dict[str, ScoreRule] = {
    Score.softmax.value: ScoreRule(in_unit_interval=True, at_zero=lambda num_experts: 1 / num_experts),
    Score.sigmoid.value: ScoreRule(in_unit_interval=True, at_zero=lambda num_experts: 0.5),
    Score.softmax_after_topk.value: ScoreRule(
        after_topk=True, sums_to_one=True, at_zero=lambda num_experts: 1 / num_experts
    ),
    Score.sqrt_softplus.value: ScoreRule(at_zero=lambda num_experts: math.sqrt(math.log(2))),
    Score.sigmoid_after_topk.value: ScoreRule(after_topk=True, at_zero=lambda num_experts: 0.5),
}
