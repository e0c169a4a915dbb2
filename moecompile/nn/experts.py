"""Routed experts with stacked weights, and the shared expert, which gets every token.

Legend: R rows in expert order, D model dim, F expert width, E experts on this rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile import ops  # noqa: F401  (registers the ops)
from moecompile.ops.backend import experts_by
from moecompile.torch_private import local_part


class Experts(nn.Module):
    """`num_experts` FFNs with stacked weights: `gate_up_proj` (E, 2F, D) or `up_proj` (E, F, D), `down_proj` (E, D, F).

    Args:
        d_model, d_expert, num_experts: sizes.
        gated: whether two projections feed the activation.
        activation: module called with one (R, F) tensor per projection, gate first; returns (R, F).
        bias_up, bias_down: whether the projections have biases, (E, 2F) or (E, F), and (E, D).
    """

    def __init__(
        self,
        d_model: int,
        d_expert: int,
        num_experts: int,
        *,
        gated: bool,
        activation: nn.Module,
        bias_up: bool = False,
        bias_down: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_experts, self.d_model, self.d_expert, self.gated = num_experts, d_model, d_expert, gated
        width = d_expert * (2 if gated else 1)
        self.in_name = "gate_up_proj" if gated else "up_proj"

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.register_parameter(self.in_name, parameter(width, d_model))
        self.register_parameter(f"{self.in_name}_bias", parameter(width) if bias_up else None)
        self.down_proj = parameter(d_model, d_expert)
        self.down_proj_bias = parameter(d_model) if bias_down else None
        self.activation = activation

    def forward(
        self,
        rows_RD: Tensor | None = None,
        counts_E: Tensor | None = None,
        source_R: Tensor | None = None,
        weights_R: Tensor | None = None,
        token: Tensor | None = None,
        collect: bool = False,
        borrowed: Sequence[Tensor] | None = None,
        backend: str = "",
        most: int = 0,
    ) -> Tensor:
        """rows_RD in expert order, counts_E rows of each local expert -> (R, D).

        With source_R and weights_R, from the pass `fuse`: rows_RD is (V, D), source_R has the row of each assignment,
        and the result is the weighted sum over the experts of each row, (V, D). Only for SwiGLU without biases.

        With collect, from the pass `overlap`: a token. Calls that are given it compute no weight gradients; these are
        computed for all of them at once (moecompile.ops.collect).

        borrowed, from the pass `lend`: the parameters of experts of other ranks, in the order of `parameters()`.
        counts_E has their rows after those of the local experts. Not with a token.

        backend, from the plan: `module:name` of what computes the fused experts, at most `most` of them for a row.
        """
        names = [name for name, _ in self.named_parameters(recurse=False)]
        lent = {} if borrowed is None else dict(zip(names, borrowed, strict=True))
        weights = [local_part(getattr(self, name)) for name in (self.in_name, "down_proj")]
        if collect:
            made: Tensor = torch.ops.moecompile.collect_gradients(weights)
            return made
        assert rows_RD is not None and counts_E is not None
        if token is not None:
            weights = [weight.detach() for weight in weights]
        if source_R is not None and weights_R is not None:
            if backend:
                return experts_by(backend, most, rows_RD, source_R, weights_R, counts_E, weights[0], weights[1])
            more = [lent[name] for name in (self.in_name, "down_proj")] if lent else None
            return fused_experts(rows_RD, source_R, weights_R, counts_E, weights, more, token)
        hidden = self._project(rows_RD, counts_E, weights, 0, token, lent)
        if self.gated:
            gate_RF, up_RF = hidden.chunk(2, dim=-1)
            hidden_RF = self.activation(gate_RF, up_RF)
        else:
            hidden_RF = self.activation(hidden)
        return self._project(hidden_RF, counts_E, weights, 1, token, lent)

    def _project(
        self, rows: Tensor, counts_E: Tensor, weights: list[Tensor], index: int, token: Tensor | None,
        lent: Mapping[str, Tensor],
    ) -> Tensor:  # fmt: skip
        name = (self.in_name, "down_proj")[index]
        out = grouped_mm(rows, weights[index], counts_E, token, index, lent.get(name))
        bias = getattr(self, f"{name}_bias")
        return out if bias is None else with_bias(out, local_part(bias), counts_E, rows, lent.get(f"{name}_bias"))

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.num_experts} experts, {self.d_model} -> {self.d_expert}, {'gated' if self.gated else 'up-down'}"


def fused_experts(
    rows_VD: Tensor,
    source_R: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    weights: Sequence[Tensor],
    lent: Sequence[Tensor] | None,
    token: Tensor | None,
) -> Tensor:
    """`expert_ffn` of the local experts, and of those that are `lent` to this rank if there may be some, (V, D)."""
    arguments = (rows_VD, source_R, weights_R, counts_E, *weights)
    if lent is None:
        out: tuple[Tensor, ...] = torch.ops.moecompile.expert_ffn(*arguments, token)
    else:
        out = torch.ops.moecompile.expert_ffn_slots(*arguments, *lent)
    return out[0]


def grouped_mm(
    rows_RD: Tensor, weight_EFD: Tensor, counts_E: Tensor, token: Tensor | None, index: int, lent_nFD: Tensor | None
) -> Tensor:
    """The op, over local experts and those that are lent to this rank, (R, F)."""
    if lent_nFD is None:
        out: Tensor = torch.ops.moecompile.grouped_mm(rows_RD, weight_EFD, counts_E, token, index)
    else:
        out = torch.ops.moecompile.grouped_mm_slots(rows_RD, weight_EFD, lent_nFD, counts_E)
    return out


def with_bias(out_RF: Tensor, bias_EF: Tensor, counts_E: Tensor, rows: Tensor, lent_nF: Tensor | None) -> Tensor:
    """out_RF plus each row's expert bias."""
    if lent_nF is not None:
        bias_EF = torch.cat((bias_EF, lent_nF))
        counts_E = counts_E[: bias_EF.shape[0]]  # slots that are not in use have no rows
    # Under autocast the product is narrower than the bias, and the sum must keep the dtype of the product.
    bias_RF: Tensor = torch.ops.moecompile.expert_bias(bias_EF.to(out_RF.dtype), counts_E, rows)
    return out_RF + bias_RF


class SharedExperts(nn.Module):
    """The shared expert: a dense FFN of width `d_shared` with the activation of the site.

    Args: as for `Experts`.
        gate: the output is multiplied by sigmoid(x gate_weight^T), one number per token (Qwen2-MoE). gate_weight (1, D)
            starts at zero, where the sigmoid is 0.5.
    """

    gate_weight: Tensor | None

    def __init__(
        self,
        d_model: int,
        d_shared: int,
        *,
        gated: bool,
        activation: nn.Module,
        bias_up: bool = False,
        bias_down: bool = False,
        gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()

        def linear(d_in: int, d_out: int, bias: bool) -> nn.Linear:
            # skip_init: the weights come from the dense FFN, and drawing others would advance the global random state.
            new: nn.Linear = nn.utils.skip_init(nn.Linear, d_in, d_out, bias=bias, device=device or "cpu", dtype=dtype)
            return new

        self.gate_proj = linear(d_model, d_shared, bias_up) if gated else None
        self.up_proj = linear(d_model, d_shared, bias_up)
        self.down_proj = linear(d_shared, d_model, bias_down)
        self.register_parameter(
            "gate_weight", nn.Parameter(torch.zeros(1, d_model, device=device, dtype=dtype)) if gate else None
        )
        self.activation = activation

    def forward(self, x: Tensor, weights_TS: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., D). weights_TS: of each of S equal slices, from the router (Inkling)."""
        up = self.up_proj(x)
        hidden = self.activation(up) if self.gate_proj is None else self.activation(self.gate_proj(x), up)
        if weights_TS is not None:
            slices = hidden.unflatten(-1, (weights_TS.shape[1], -1))
            weights = weights_TS.to(hidden.dtype).view(*slices.shape[:-1], 1)
            hidden = (slices * weights).flatten(-2)
        out: Tensor = self.down_proj(hidden)
        return out if self.gate_weight is None else out * F.linear(x, self.gate_weight).sigmoid()
