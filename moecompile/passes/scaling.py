"""The factors that scale upcycled experts, so that their weighted sum starts equal to the dense FFN.

The routing weights of a token sum to W. If whole virtual groups (R experts, one per slice) are chosen and scores within
a group are equal, each slice gets W / R in total, so a factor of R / W makes the sum of the slices the dense FFN.

    exact      W = scale, which holds if the router normalises
    expected   W is the mean over tokens of unit variance, as after a norm, routed by the newly initialized router
    nvidia     W = scale * top_k * (1 / E after a softmax, 1 / 2 after a sigmoid, sqrt(ln 2) after sqrt_softplus), as
               for a router whose logits are 0; if it normalises, W = scale. The factor is spread over all projections
               (arXiv 2410.07524)

Legend: T tokens, D model dim, F expert width, E experts.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch

from moecompile.nn import Experts, Router
from moecompile.plan import LayerPlan
from moecompile.routing.scores import SCORES

_TOKENS = 512  # to estimate the expected W with a standard error below one percent


@dataclass(frozen=True)
class Factors:
    """Factors of the weights before the activation, of down, and of the bias of down."""

    ins: float
    down: float
    down_bias: float


def factors(router: Router, experts: Experts, layer: LayerPlan, generator: torch.Generator) -> Factors:
    """The factors of a layer whose router is initialized. `generator` draws the tokens for the expected W."""
    scaling = layer.experts.weight_scaling
    if scaling == "none":
        return Factors(1.0, 1.0, 1.0)
    factor = layer.experts.virtual_group / _weight_sum(router, layer, generator)
    return _spread(experts, factor) if scaling == "nvidia" else Factors(1.0, factor, factor)


def _weight_sum(router: Router, layer: LayerPlan, generator: torch.Generator) -> float:
    """W."""
    routing, scaling = layer.routing, layer.experts.weight_scaling
    rest = 1 - shared_part(layer) / routing.scale
    if scaling == "exact" or (routing.sums_to_scale and not layer.experts.shared_routed):
        return routing.scale * rest
    if scaling == "nvidia":
        each = SCORES[routing.score].at_zero(layer.experts.num_routed)
        return routing.scale * (rest if routing.normalize else routing.top_k * each)
    x_TD = torch.randn(_TOKENS, layer.site.d_model, generator=generator)
    fresh = copy.deepcopy(router).eval()
    tokens = (None, torch.arange(_TOKENS, device=router.weight.device)) if routing.choice == "hash" else ()
    return float(fresh(x_TD.to(router.weight), *tokens)[0].sum(-1).mean())


def shared_part(layer: LayerPlan) -> float:
    """What the slices of a shared expert get of the routing weights of a token, as long as all scores are alike."""
    shared = layer.experts.num_shared * layer.experts.shared_routed
    return layer.routing.scale * shared / (layer.routing.top_k + shared)


def _spread(experts: Experts, factor: float) -> Factors:
    """Spreads a `factor` on the output of an expert evenly over its projections.

    The hidden units are a function of degree d in the projections before them, so the output has degree d + 1 in all
    projections: each gets the root of that degree (a cube root if d = 2).
    """
    degree = _degree(experts)
    share = factor ** (1 / (degree + 1))
    return Factors(share if degree else 1.0, share, factor)


def _degree(experts: Experts) -> int:
    """The degree at which the activation grows with its input: gelu 1, squared relu 2, silu(gate) * up 2, tanh 0."""
    activation = copy.deepcopy(experts.activation).eval()
    like, num_ins = experts.down_proj, 2 if experts.gated else 1
    small, large = (
        float(activation(*[like.new_full((1, experts.d_expert), value)] * num_ins).double().mean())
        for value in (3.0, 6.0)
    )
    return round(math.log2(large / small))
