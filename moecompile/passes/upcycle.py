"""Fills router, experts and shared experts from the dense FFN (docs/upcycling.md).

Legend: D model dim, F width of one slice = d_ff / granularity, E routed experts, S shared slices, R routed slices.

The dense FFN is the sum of its G = S + R slices, because it is a sum over hidden units:
    ffn(x) = sum_s down[:, s] act(gate[s] x, up[s] x) + bias.
A shared expert with a gate starts with a gate of 0.5, so its `down` is multiplied by 2.
Routed weights of a token sum to `scale`. With whole virtual groups (R experts, one per slice) chosen and equal scores
within a group, each slice gets scale / R in total, so `down` is multiplied by R / scale: step 0 is the dense FFN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from moecompile.nn import Experts, Router, SharedExperts
from moecompile.passes.match import FFNMatch
from moecompile.plan import LayerPlan

_ROUTER_STD = 0.02


@dataclass(frozen=True)
class DenseWeights:
    """The dense FFN. ins: (d_ff, D) per input linear, gate first; down_DF (D, d_ff); biases or None."""

    ins: tuple[Tensor, ...]
    in_biases: tuple[Tensor | None, ...]
    down_DF: Tensor
    down_bias: Tensor | None

    @classmethod
    def of(cls, root: fx.GraphModule, match: FFNMatch) -> DenseWeights:
        """Reads the weights of a match."""
        ins = tuple(linear.weight_of(root) for linear in match.ins)
        biases = tuple(linear.bias_of(root) for linear in match.ins)
        return cls(ins, biases, match.down.weight_of(root), match.down.bias_of(root))


@torch.no_grad()
def fill(
    router: Router,
    experts: Experts,
    shared: SharedExperts | None,
    dense: DenseWeights,
    layer: LayerPlan,
    generator: torch.Generator,
) -> None:
    """Sets every weight in place; nothing happens on the meta device."""
    if dense.down_DF.is_meta:
        return
    plan = layer.experts
    routed_slices = plan.virtual_group
    rows = torch.randn(plan.num_routed // routed_slices, layer.site.d_model, generator=generator) * _ROUTER_STD
    router.weight.copy_(rows.repeat_interleave(routed_slices, 0))
    if router.bias is not None:
        router.bias.zero_()
    if plan.init == "random":
        _fill_random(experts, shared, dense, generator)
        return
    factor = routed_slices / layer.routing.scale
    silent = plan.init == "copy"  # beside whole copies the shared expert starts with no say
    _fill_experts(
        experts, dense, plan.granularity - routed_slices, routed_slices, factor, bears_bias=silent or not shared
    )
    if shared is not None:
        _fill_shared(shared, dense, silent=silent)


def step0_reason(layer: LayerPlan) -> str | None:
    """Why step 0 need not equal the dense model, or None where it is promised.

    Jitter is no reason: step 0 is measured in evaluation mode, without it.
    """
    routing = layer.routing
    if layer.experts.init == "random":
        return "experts are random"
    if routing.choice == "expert":
        return "experts choose tokens, so a token may have any number of them"
    if routing.workload != "none":
        return "the workload chooses the experts, not the router"
    if not routing.normalize and routing.score != "softmax_after_topk":
        return "the routing weights of a token do not sum to a constant"
    if routing.capacity_factor is not None:
        return "experts drop the tokens beyond their capacity"
    return None


def _fill_experts(
    experts: Experts, dense: DenseWeights, first: int, slices: int, factor: float, *, bears_bias: bool
) -> None:
    """Expert id = copy * slices + slice; slice s is the dense FFN's slice first + s.

    The down bias is added once: by slice 0 if the routed experts bear it, else by the shared expert.
    """
    width = experts.d_expert
    in_proj = getattr(experts, experts.in_name)
    in_bias = getattr(experts, f"{experts.in_name}_bias")
    for expert in range(experts.num_experts):
        piece = slice((first + expert % slices) * width, (first + expert % slices + 1) * width)
        in_proj[expert].copy_(torch.cat([weight[piece] for weight in dense.ins]))
        experts.down_proj[expert].copy_(dense.down_DF[:, piece] * factor)
        if in_bias is not None:
            in_bias[expert].copy_(
                torch.cat([_bias(b, w)[piece] for b, w in zip(dense.in_biases, dense.ins, strict=True)])
            )
        if experts.down_proj_bias is not None and dense.down_bias is not None:
            share = factor if bears_bias and expert % slices == 0 else 0.0
            experts.down_proj_bias[expert].copy_(dense.down_bias * share)


def _fill_shared(shared: SharedExperts, dense: DenseWeights, *, silent: bool) -> None:
    """The first slices, whole down bias included; `silent` (beside whole copies) starts with a zero down_proj."""
    width = shared.up_proj.out_features
    linears = (shared.up_proj,) if shared.gate_proj is None else (shared.gate_proj, shared.up_proj)
    for linear, weight, bias in zip(linears, dense.ins, dense.in_biases, strict=True):
        index = torch.arange(width) % weight.shape[0]
        linear.weight.copy_(weight[index])
        if linear.bias is not None:
            linear.bias.copy_(_bias(bias, weight)[index])
    factor = 0.0 if silent else 1.0 if shared.gate_weight is None else 2.0
    if silent:
        shared.down_proj.weight.zero_()
    else:
        shared.down_proj.weight.copy_(dense.down_DF[:, :width] * factor)
    if shared.down_proj.bias is not None and dense.down_bias is not None:
        shared.down_proj.bias.copy_(dense.down_bias * factor)


def _fill_random(
    experts: Experts, shared: SharedExperts | None, dense: DenseWeights, generator: torch.Generator
) -> None:
    """Normal weights with the standard deviation of the dense ones; biases zero."""
    std_in, std_down = float(dense.ins[0].float().std()), float(dense.down_DF.float().std())
    modules = [experts] if shared is None else [experts, shared]
    for module in modules:
        for name, parameter in module.named_parameters():
            if name.endswith("bias") or name == "gate_weight":
                parameter.zero_()
            else:
                std = std_down if name.startswith("down_proj") else std_in
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def _bias(bias: Tensor | None, weight: Tensor) -> Tensor:
    """A linear without a bias has a bias of zero."""
    return weight.new_zeros(weight.shape[0]) if bias is None else bias
