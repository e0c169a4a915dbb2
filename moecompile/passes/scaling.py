"""What experts made from the dense FFN are multiplied by, so that their weighted sum starts like it.

The routed weights of a token sum to W. With whole virtual groups (R experts, one per slice) chosen and equal scores
within a group, each slice gets W / R in total, so a factor of R / W makes the sum of the slices the dense FFN.

    exact      W = scale, which holds where the router normalises
    expected   W is the mean that the fresh router gives tokens of unit variance, as a norm before the FFN makes them
    nvidia     W = scale * top_k * (1 / E after a softmax, 1 / 2 after a sigmoid): what a router gives whose logits are
               all alike; where it normalises, W = scale. The factor is spread over all projections (arXiv 2410.07524)

Legend: T tokens, D model dim, F expert width, E experts.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch

from moecompile.nn import Experts, Router
from moecompile.plan import LayerPlan, RoutingPlan

_TOKENS = 512  # for the expected W: its standard error is then below one percent


@dataclass(frozen=True)
class Factors:
    """What weights are multiplied by: those before the activation, down, and the bias of down."""

    ins: float
    down: float
    down_bias: float


def sums_to_scale(routing: RoutingPlan) -> bool:
    """Whether the routing weights of every token sum to `routing.scale`."""
    return routing.normalize or routing.score == "softmax_after_topk"


def factors(router: Router, experts: Experts, layer: LayerPlan, generator: torch.Generator) -> Factors:
    """The factors of a layer whose router has its first weights. `generator` draws the tokens of the expected W."""
    scaling = layer.experts.weight_scaling
    if scaling == "none":
        return Factors(1.0, 1.0, 1.0)
    factor = layer.experts.virtual_group / _weight_sum(router, layer, generator)
    return _spread(experts, factor) if scaling == "nvidia" else Factors(1.0, factor, factor)


def _weight_sum(router: Router, layer: LayerPlan, generator: torch.Generator) -> float:
    """W."""
    routing, scaling = layer.routing, layer.experts.weight_scaling
    if scaling == "exact" or sums_to_scale(routing):
        return routing.scale
    if scaling == "nvidia":
        each = 0.5 if routing.score == "sigmoid" else 1 / layer.experts.num_routed
        return routing.scale * routing.top_k * each
    x_TD = torch.randn(_TOKENS, layer.site.d_model, generator=generator)
    fresh = copy.deepcopy(router).eval()
    weights, _ = fresh(x_TD.to(router.weight))
    return float(weights.sum(-1).mean())


def _spread(experts: Experts, factor: float) -> Factors:
    """`factor` on the output of an expert, evenly over its projections.

    The hidden units are a function of degree d in the projections before them, so all projections together one of
    degree d + 1: its root is each one's share (a cube root where d = 2).
    """
    degree = _degree(experts)
    share = factor ** (1 / (degree + 1))
    return Factors(share if degree else 1.0, share, factor)


def _degree(experts: Experts) -> int:
    """The power of its input with which the activation grows: gelu 1, squared relu 2, silu(gate) * up 2, tanh 0."""
    activation = copy.deepcopy(experts.activation).eval()
    like, num_ins = experts.down_proj, 2 if experts.gated else 1
    small, large = (
        float(activation(*[like.new_full((1, experts.d_expert), value)] * num_ins).double().mean())
        for value in (3.0, 6.0)
    )
    return round(math.log2(large / small))
