"""Routed experts with stacked weights, and the shared expert, which gets every token.

Legend: R rows in expert order, D model dim, F expert width, E experts on this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile import ops  # noqa: F401  (registers the ops)
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
    ) -> Tensor:
        """rows_RD in expert order, counts_E rows of each local expert -> (R, D).

        With source_R and weights_R, from the pass `fuse`: rows_RD is (V, D), source_R has the row of each assignment,
        and the result is the weighted sum over the experts of each row, (V, D). Only for SwiGLU without biases.

        With collect, from the pass `overlap`: a token. Calls that are given it compute no weight gradients; these are
        computed for all of them at once (moecompile.ops.collect).
        """
        weights = [local_part(getattr(self, name)) for name in (self.in_name, "down_proj")]
        if collect:
            made: Tensor = torch.ops.moecompile.collect_gradients(weights)
            return made
        assert rows_RD is not None and counts_E is not None
        if token is not None:
            weights = [weight.detach() for weight in weights]
        if source_R is not None and weights_R is not None:
            fused = torch.ops.moecompile.expert_ffn(rows_RD, source_R, weights_R, counts_E, *weights, token)
            out_VD: Tensor = fused[0]
            return out_VD
        hidden = self._project(rows_RD, counts_E, weights, 0, token)
        if self.gated:
            gate_RF, up_RF = hidden.chunk(2, dim=-1)
            hidden_RF = self.activation(gate_RF, up_RF)
        else:
            hidden_RF = self.activation(hidden)
        return self._project(hidden_RF, counts_E, weights, 1, token)

    def _project(
        self, rows: Tensor, counts_E: Tensor, weights: list[Tensor], index: int, token: Tensor | None
    ) -> Tensor:
        out: Tensor = torch.ops.moecompile.grouped_mm(rows, weights[index], counts_E, token, index)
        bias = getattr(self, f"{(self.in_name, 'down_proj')[index]}_bias")
        if bias is not None:
            # Under autocast the product is narrower than the bias, and the sum must keep the dtype of the product.
            out = out + torch.ops.moecompile.expert_bias(local_part(bias).to(out.dtype), counts_E, rows)
        return out

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.num_experts} experts, {self.d_model} -> {self.d_expert}, {'gated' if self.gated else 'up-down'}"


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

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        up = self.up_proj(x)
        hidden = self.activation(up) if self.gate_proj is None else self.activation(self.gate_proj(x), up)
        out: Tensor = self.down_proj(hidden)
        return out if self.gate_weight is None else out * F.linear(x, self.gate_weight).sigmoid()
