"""What a router computes of its input before it chooses, and of the scores: one row of `FUNCTIONS` a score.

Legend: D model dim, E experts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from moecompile.errors import ConfigError
from moecompile.routing.scores import SCORES, ScoreRule

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


FUNCTIONS: OrderedDict[str, ScoreFunctions] = OrderedDict(
    softmax=ScoreFunctions(score=_softmax, weigh=_same, distribute=lambda logits, scores: scores),
    sigmoid=ScoreFunctions(score=torch.sigmoid, weigh=_same, distribute=lambda logits, scores: _shares(scores)),
    softmax_after_topk=ScoreFunctions(
        score=_same, weigh=_softmax, distribute=lambda logits, scores: logits.softmax(-1)
    ),
    sqrt_softplus=ScoreFunctions(score=sqrt_softplus, weigh=_same, distribute=lambda logits, scores: _shares(scores)),
    sigmoid_after_topk=ScoreFunctions(
        score=_same, weigh=torch.sigmoid, distribute=lambda logits, scores: _shares(logits.sigmoid())
    ),
)
"""By `routing.score`; a score that is not here raises."""


def register_score(
    name: str,
    score: Callable[[Tensor], Tensor],
    *,
    weigh: Callable[[Tensor], Tensor] = _same,
    distribute: Callable[[Tensor, Tensor], Tensor] = lambda logits, scores: _shares(scores),
    in_unit_interval: bool = False,
) -> RemovableHandle:
    """Makes `routing.score=name` known to configs, plans and routers of this process.

    Args:
        score: of router logits of any shape, over the last dim, differentiable; experts are chosen by the result, and
            for the weights of the chosen ones to be positive it is, too.
        weigh: of the scores of the chosen experts, (..., K), their weights before `normalize` and `scale`.
        distribute: of (logits, scores), shares of all experts, which sum to 1, for auxiliary losses.
        in_unit_interval: whether scores lie in [0, 1], which `balance.rule=quantile` needs.

    Returns:
        A handle, as from `register_pattern`.

    Raises:
        ConfigError: the name is taken, or on sample logits the functions do not do what is said above.
    """
    if name in SCORES or name == "own":
        raise ConfigError("name", name, "there is such a score already", "Give another name")
    logits = torch.linspace(-8, 8, 48, dtype=torch.float64).view(6, 8)
    scores = score(logits)
    weights, shares = weigh(scores[:, :3]), distribute(logits, scores)
    for where, values, shape in (("score", scores, (6, 8)), ("weigh", weights, (6, 3)), ("distribute", shares, (6, 8))):
        if values.shape != shape or not values.isfinite().all():
            rule = "must return finite values, one for each that it is given"
            raise ConfigError(f"{name}.{where}", list(values.shape), rule, "Correct the function")
    ones, inside = torch.ones(6, dtype=torch.float64), bool(((scores >= 0) & (scores <= 1)).all())
    if not torch.allclose(shares.sum(-1), ones):
        raise ConfigError(f"{name}.distribute", shares.sum(-1).tolist(), "shares must sum to 1", "Correct the function")
    if in_unit_interval and not inside:
        rule = f"scores of logits in [-8, 8] lie in [{float(scores.min()):.3g}, {float(scores.max()):.3g}]"
        raise ConfigError(f"{name}.in_unit_interval", True, rule, "Use False")
    SCORES[name] = ScoreRule(
        after_topk=torch.equal(scores, logits),
        in_unit_interval=in_unit_interval,
        sums_to_one=torch.allclose(weights.sum(-1), ones),
        at_zero=lambda num_experts: float(weigh(score(torch.zeros(num_experts)))[0]),
    )
    FUNCTIONS[name] = ScoreFunctions(score=score, weigh=weigh, distribute=distribute)
    handle = RemovableHandle(FUNCTIONS, extra_dict=SCORES)
    handle.id = name  # type: ignore[assignment]  # both tables are by name
    return handle
