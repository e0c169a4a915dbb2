"""What a router computes of its input before it chooses, and of the scores: one row of `FUNCTIONS` a score.

Legend: D model dim, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moecompile.routing.choices import Score

_EPS = 1e-6  # Gemma 4's rms_norm_eps


def normed(x: Tensor, scale_D: Tensor) -> Tensor:
    """x (..., D) over its root mean square, times scale_D / sqrt(D) (Gemma 4); x is fp32 or wider."""
    out: Tensor = x * (x.square().mean(-1, keepdim=True) + _EPS).rsqrt() * (scale_D * x.shape[-1] ** -0.5)
    return out


def sqrt_softplus(logits: Tensor) -> Tensor:
    """sqrt(log(1 + exp(logit))) (DeepSeek-V4).

    Where exp(logit) underflows, the derivative of the root would be infinite, and its product with 0 NaN: it is 0 here.
    """
    return F.softplus(logits).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()


@dataclass(frozen=True, kw_only=True)
class ScoreFunctions:
    """The functions of one score, of logits of any shape, over the last dim.

    score: of all logits; experts are chosen by it. weigh: of the scores of the chosen experts, their weights before
    `normalize` and `scale`. distribute: of (logits, scores), shares of all experts, which sum to 1, for losses.
    """

    score: Callable[[Tensor], Tensor]
    weigh: Callable[[Tensor], Tensor]
    distribute: Callable[[Tensor, Tensor], Tensor]


def _same(values: Tensor) -> Tensor:
    return values


def _softmax(values: Tensor) -> Tensor:
    return values.softmax(-1)


def _shares(scores: Tensor) -> Tensor:
    return scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)


FUNCTIONS: dict[str, ScoreFunctions] = {
    Score.softmax.value: ScoreFunctions(score=_softmax, weigh=_same, distribute=lambda logits, scores: scores),
    Score.sigmoid.value: ScoreFunctions(
        score=torch.sigmoid, weigh=_same, distribute=lambda logits, scores: _shares(scores)
    ),
    Score.softmax_after_topk.value: ScoreFunctions(
        score=_same, weigh=_softmax, distribute=lambda logits, scores: logits.softmax(-1)
    ),
    Score.sqrt_softplus.value: ScoreFunctions(
        score=sqrt_softplus, weigh=_same, distribute=lambda logits, scores: _shares(scores)
    ),
    Score.sigmoid_after_topk.value: ScoreFunctions(
        score=_same, weigh=torch.sigmoid, distribute=lambda logits, scores: _shares(logits.sigmoid())
    ),
}
"""By `routing.score`; a score that is not here raises."""
