"""Fills router, experts and shared experts from the dense FFN (docs/understand/upcycling.md).

Legend: D model dim, L latent dim, F width of one slice = d_ff / granularity, E routed experts, S shared slices, R
routed slices.

The dense FFN is the sum of its G = S + R slices, because it is a sum over hidden units:
    ffn(x) = sum_s down[:, s] act(gate[s] x, up[s] x) + bias.
A shared expert's gate starts at 0.5, so its `down` is multiplied by 2. Routed experts are multiplied by the factor that
compensates for their routing weights (`scaling.py`).

In a latent width L, experts are made from the FFN that reads only a subspace of x and writes only into it:
    ffn(x) ~ V^T inner(V x),    inner(z) = V down act(gate V^T z, up V^T z).
V (L, D) has orthonormal rows: the directions in which the FFN's weights are largest, which are the leading eigenvectors
of gate^T gate + up^T up + down down^T. With L = D nothing is lost. V and V^T are the projections down and up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from moecompile.match.ffn import FFNMatch
from moecompile.nn import Experts, Latent, Router, SharedExperts
from moecompile.passes.scaling import Factors, factors, shared_part
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

    def within(self, basis_LD: Tensor) -> DenseWeights:
        """The FFN that reads the coordinates of x in a basis, and returns those of its output."""
        wide = basis_LD.to(self.down_DF.dtype)
        bias = None if self.down_bias is None else wide @ self.down_bias
        return DenseWeights(tuple(weight @ wide.T for weight in self.ins), self.in_biases, wide @ self.down_DF, bias)

    def basis(self, size: int) -> Tensor:
        """The `size` orthonormal directions of x and of the output in which the weights are largest, (L, D), fp64."""
        gram_DD = sum(weight.double().T @ weight.double() for weight in (*self.ins, self.down_DF.T))
        assert isinstance(gram_DD, Tensor)
        vectors = torch.linalg.eigh(gram_DD).eigenvectors.flip(1)[:, :size].T
        # The sign of an eigenvector is free: its largest entry is made positive.
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        basis_LD: Tensor = vectors * largest.sign()
        return basis_LD


@torch.no_grad()
def fill(
    router: Router,
    experts: Experts,
    shared: SharedExperts | None,
    dense: DenseWeights,
    layer: LayerPlan,
    generator: torch.Generator,
    expert_ids: Sequence[int] | None = None,
    latent: Latent | None = None,
) -> None:
    """Sets every weight in place; does nothing on the meta device.

    Args:
        expert_ids: global ids of the experts in `experts`; None: all.
    """
    if dense.down_DF.is_meta:
        return
    plan = layer.experts
    expert_ids = range(plan.num_routed) if expert_ids is None else expert_ids
    routed_slices = plan.virtual_group
    rows = torch.randn(plan.num_routed // routed_slices, layer.site.d_model, generator=generator) * _ROUTER_STD
    router.weight[: plan.num_routed].copy_(rows[[layer.copy_of(expert) for expert in range(plan.num_routed)]])
    if plan.num_identity:
        own = torch.randn(plan.num_identity, layer.site.d_model, generator=generator) * _ROUTER_STD
        router.weight[plan.num_routed :].copy_(own)
    if router.shared_weight is not None:
        drawn = torch.randn(plan.num_shared, layer.site.d_model, generator=generator) * _ROUTER_STD
        router.shared_weight.copy_(drawn)
    if router.bias is not None:
        router.bias.zero_()
    for ones in (router.norm_scale, router.expert_scale):
        if ones is not None:
            ones.fill_(1.0)
    inner = dense if latent is None else _fill_latent(latent, dense)
    if plan.init == "random":
        _fill_random(experts, shared, dense, generator.initial_seed(), expert_ids)
        return
    silent = not plan.is_sliced  # beside whole copies, the shared expert starts with an output of zero
    first = plan.num_shared if plan.is_sliced else 0
    scale = factors(router, experts, layer, generator)
    slices = {expert: layer.slice_of(expert) for expert in expert_ids}
    _fill_experts(experts, inner, slices, first, scale, bears_bias=silent or not shared)
    if plan.init == "drop":
        _redraw(experts, plan.drop_ratio, generator.initial_seed(), expert_ids)
    if shared is not None:
        _fill_shared(shared, dense, silent=silent, share=shared_part(layer) / plan.num_shared)


def _fill_latent(latent: Latent, dense: DenseWeights) -> DenseWeights:
    """Fills both projections; returns the FFN in the latent width."""
    basis_LD = dense.basis(latent.down.weight.shape[0])
    latent.down.weight.copy_(basis_LD)
    latent.up.weight.copy_(basis_LD.T)
    if latent.up.norm_weight is not None:
        latent.up.norm_weight.fill_(1.0)
    return dense.within(basis_LD)


def step0_reason(layer: LayerPlan) -> str | None:
    """Why step 0 need not equal the dense model; None if equality is promised.

    Jitter is not a reason: step 0 is measured in evaluation mode, where it is off.
    """
    plan, routing = layer.experts, layer.routing
    unscaled = plan.virtual_group == routing.scale  # the factor is 1
    reasons = (
        (plan.init == "random", "experts are random"),
        (plan.num_identity > 0, "tokens may choose experts that return their input"),
        (plan.shared_routed, "the router weighs the shared expert beside the chosen ones"),
        (plan.latent_norm, "the sum of the experts is normed"),
        (_is_narrow(layer), f"experts work in {plan.latent_size} of {layer.site.d_model} dimensions"),
        (plan.init == "drop", f"every expert reinitializes {plan.drop_ratio:g} of its hidden units"),
        (routing.choice == "expert", "experts choose tokens, so a token may have any number of them"),
        (routing.choice == "hash" and plan.virtual_group > 1, "a hash chooses experts, not whole virtual groups"),
        (routing.workload != "none", "the workload chooses the experts, not the router"),
        (not routing.sums_to_scale, "the routing weights of a token do not sum to a constant"),
        (routing.capacity_factor is not None, "experts drop the tokens beyond their capacity"),
        (plan.weight_scaling == "none" and not unscaled, "nothing makes up for the routing weights"),
        (plan.weight_scaling == "nvidia" and not unscaled, "the inputs of the activation are scaled too"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def _is_narrow(layer: LayerPlan) -> bool:
    """Whether routed experts see less than x."""
    return layer.row_site.d_model < layer.site.d_model


def _fill_experts(
    experts: Experts,
    dense: DenseWeights,
    slices: Mapping[int, int],
    first: int,
    scale: Factors,
    *,
    bears_bias: bool,
) -> None:
    """slices: expert id -> s, for the dense FFN's slice first + s; in the order of the experts' stacks.

    The bias of down is added once: by slice 0 if `bears_bias`, else by the shared expert.
    """
    width = experts.d_expert
    in_proj = getattr(experts, experts.in_name)
    in_bias = getattr(experts, f"{experts.in_name}_bias")
    for i, number in enumerate(slices.values()):
        piece = slice((first + number) * width, (first + number + 1) * width)
        in_proj[i].copy_(torch.cat([weight[piece] for weight in dense.ins]) * scale.ins)
        experts.down_proj[i].copy_(dense.down_DF[:, piece] * scale.down)
        if in_bias is not None:
            biases = [_bias(b, w)[piece] for b, w in zip(dense.in_biases, dense.ins, strict=True)]
            in_bias[i].copy_(torch.cat(biases) * scale.ins)
        if experts.down_proj_bias is not None and dense.down_bias is not None:
            share = scale.down_bias if bears_bias and number == 0 else 0.0
            experts.down_proj_bias[i].copy_(dense.down_bias * share)


def _redraw(experts: Experts, ratio: float, seed: int, expert_ids: Sequence[int]) -> None:
    """Drop-upcycling (arXiv 2502.19261): each expert reinitializes a part `ratio` of its hidden units.

    New entries are normal, with the mean and standard deviation of the entries that they replace, per projection. The
    units and their values depend on the seed and the expert's global id.
    """
    width, num_ins = experts.d_expert, 2 if experts.gated else 1
    in_bias = getattr(experts, f"{experts.in_name}_bias")
    for i, expert in enumerate(expert_ids):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + expert + 1) % 2**63)
        units = torch.randperm(width, generator=generator)[: max(1, round(ratio * width))].sort().values
        down_FD = experts.down_proj[i].T
        for j in range(num_ins):
            rows = units + j * width
            _redraw_rows(getattr(experts, experts.in_name)[i], rows, generator)
            if in_bias is not None:
                _redraw_rows(in_bias[i], rows, generator)
        _redraw_rows(down_FD, units, generator)


def _redraw_rows(tensor: Tensor, rows: Tensor, generator: torch.Generator) -> None:
    rows = rows.to(tensor.device)
    old = tensor[rows].double()
    drawn = torch.randn(old.shape, generator=generator, dtype=torch.float64).to(tensor.device)
    tensor[rows] = (drawn * old.std(correction=0) + old.mean()).to(tensor.dtype)


def _fill_shared(shared: SharedExperts, dense: DenseWeights, *, silent: bool, share: float) -> None:
    """The first slices and the whole bias of down; if `silent` (beside whole copies), down_proj starts at zero.

    share: the routing weight of each slice at first; 0: it has none.
    """
    width = shared.up_proj.out_features
    linears = (shared.up_proj,) if shared.gate_proj is None else (shared.gate_proj, shared.up_proj)
    for linear, weight, bias in zip(linears, dense.ins, dense.in_biases, strict=True):
        index = torch.arange(width) % weight.shape[0]
        linear.weight.copy_(weight[index])
        if linear.bias is not None:
            linear.bias.copy_(_bias(bias, weight)[index])
    factor = 0.0 if silent else 1.0 if shared.gate_weight is None else 2.0
    down_factor = factor / share if share else factor  # the bias of down is not weighed
    if silent:
        shared.down_proj.weight.zero_()
    else:
        shared.down_proj.weight.copy_(dense.down_DF[:, :width] * down_factor)
    if shared.down_proj.bias is not None and dense.down_bias is not None:
        shared.down_proj.bias.copy_(dense.down_bias * factor)


def _fill_random(
    experts: Experts, shared: SharedExperts | None, dense: DenseWeights, seed: int, expert_ids: Sequence[int]
) -> None:
    """Normal weights with the standard deviation of the dense ones; biases are zero.

    The weights of an expert depend on the seed and its global id, so that a rank can draw only its own experts.
    """
    std_in, std_down = float(dense.ins[0].float().std()), float(dense.down_DF.float().std())

    def draw(name: str, out: Tensor, generator: torch.Generator) -> None:
        if name.endswith("bias") or name == "gate_weight":
            out.zero_()
        else:
            std = std_down if name.startswith("down_proj") else std_in
            out.copy_(torch.randn(out.shape, generator=generator) * std)

    for i, expert in enumerate(expert_ids):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + expert + 1) % 2**63)
        for name, stack in experts.named_parameters(recurse=False):
            draw(name, stack[i], generator)
    generator = torch.Generator().manual_seed((seed * 1_000_003) % 2**63)
    for name, parameter in shared.named_parameters() if shared is not None else ():
        draw(name, parameter, generator)


def _bias(bias: Tensor | None, weight: Tensor) -> Tensor:
    """The bias of a linear, zeros if it has none."""
    return weight.new_zeros(weight.shape[0]) if bias is None else bias
