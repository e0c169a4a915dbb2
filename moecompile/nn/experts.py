"""Routed experts with stacked weights, and the shared expert, which gets every token.

Legend: R rows in expert order, V rows of an input that they are gathered from, D model dim, F expert width, E experts
on this rank, S slots: as many counts as experts, or more (moecompile.ops.grouped).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile import ops  # noqa: F401  (registers the ops)
from moecompile.errors import MoecompileError
from moecompile.ops.backend import experts_by
from moecompile.ops.expert_ffn import RaggedRows
from moecompile.torch_private import local_part


class Mode(NamedTuple):
    """How experts compute, if not just rows with their own weights: the keywords of their call in a graph.

    Attributes:
        source_R, weights_R: of `fuse`. The first argument is an input (V, D), source_R the row of each assignment,
            weights_R its routing weight. The result has the weighted sums, (V, D). Only for SwiGLU without biases.
        backend, max_per_token: of `fuse`. `module:name` of what computes these sums, and the most of the local experts
            that a row has.
        borrowed: of `lend`. The weights of experts of other ranks, in the order of `names`.
        grad_token: of `collect`. From the method `grad_token`: its backward computes the weight gradients.
    """

    source_R: Tensor | None = None
    weights_R: Tensor | None = None
    backend: str | None = None
    max_per_token: int | None = None
    borrowed: Sequence[Tensor] | None = None
    grad_token: Tensor | None = None

    def check(self) -> None:
        """Raises MoecompileError if no experts compute so."""
        if sum(each is not None for each in (self.backend, self.borrowed, self.grad_token)) > 1:
            raise MoecompileError("experts: backend, borrowed and grad_token exclude each other")
        is_fused, is_other = self.source_R is not None, self.backend is not None
        if is_fused != (self.weights_R is not None) or is_other != (self.max_per_token is not None):
            raise MoecompileError("experts: source_R goes with weights_R, and backend with max_per_token")
        if is_other and not is_fused:
            raise MoecompileError("experts: a backend computes fused experts: give source_R and weights_R")


class ExpertWeights(NamedTuple):
    """The weights of one call, of own experts and, if some may be, of borrowed ones.

    Attributes:
        stacks: name -> (E, d_out, d_in) of each.
        biases: name -> (E, d_out) of each.
        grad_token: as in `Mode`; the stacks are detached.
    """

    stacks: dict[str, list[Tensor]]
    biases: dict[str, list[Tensor]]
    grad_token: Tensor | None

    def product(self, rows: Tensor, counts_S: Tensor, name: str) -> Tensor:
        """Rows times the matrices of their experts, (R, d_out)."""
        index = list(self.stacks).index(name)
        out: Tensor = torch.ops.moecompile.grouped_mm(rows, self.stacks[name], counts_S, self.grad_token, index)
        return out

    def with_bias(self, out_RF: Tensor, counts_S: Tensor, name: str, rows: Tensor) -> Tensor:
        """out_RF plus each row's expert bias, if there is one; `rows` only gives the number of rows."""
        if name not in self.biases:
            return out_RF
        bias_EF = torch.cat(self.biases[name]) if len(self.biases[name]) > 1 else self.biases[name][0]
        counts_E = counts_S[: bias_EF.shape[0]]  # slots that are not in use have no rows
        # Under autocast the product is narrower than the bias, and the sum must keep the dtype of the product.
        bias_RF: Tensor = torch.ops.moecompile.expert_bias(bias_EF.to(out_RF.dtype), counts_E, rows)
        return out_RF + bias_RF


class RowExperts(nn.Module):
    """Experts on rows in expert order. What they are made of is `views`, and how they use it `compute`.

    Attributes:
        num_experts: over all ranks.
        names: of the weights, in the order in which they are given.
        adapter_scale: of adapters, `lora_A.NAME` (E, r, d_in) and `lora_B.NAME` (E, d_out, r) of the weight NAME:
            expert e computes with W_e + scale B_e A_e, but this sum is never in memory.
    """

    num_experts: int
    names: tuple[str, ...]
    adapter_scale: float | None = None

    def forward(self, rows: Tensor, counts_S: Tensor, *given: Tensor, **mode: Any) -> Tensor:
        """Rows (R, D) in expert order, counts_S of each local expert, its weights -> (R, D); (V, D) -> (V, D) if fused.

        Args:
            given: weights of the local experts, by `names`; none: those of the module.
            mode: `Mode`. With borrowed experts, counts_S has their rows after those of the own ones.
        """
        how = Mode(**mode)
        how.check()
        weights = self._weights(given, how)
        if how.source_R is None or how.weights_R is None:
            return self.compute(rows, lambda x, name: self._project(x, counts_S, name, weights))
        ragged = RaggedRows(rows, how.source_R, how.weights_R, counts_S)
        gate_ups, downs = weights.stacks["gate_up_proj"], weights.stacks["down_proj"]
        if how.backend is not None and how.max_per_token is not None:
            return experts_by(how.backend, how.max_per_token, ragged, gate_ups[0], downs[0])
        out: Tensor = torch.ops.moecompile.expert_ffn(*ragged, gate_ups, downs, weights.grad_token)[0]
        return out

    def grad_token(self, *given: Tensor) -> Tensor:
        """A token for calls: these compute no weight gradients; its backward computes them for all calls at once."""
        stacks = self._weights(given, Mode()).stacks.values()
        made: Tensor = torch.ops.moecompile.collect_gradients([own for (own,) in stacks])
        return made

    def views(self, weights: dict[str, Tensor], whole: Sequence[Tensor]) -> dict[str, Tensor]:
        """The weights of some experts, those of projections as (E, d_out, d_in). whole: those of all experts."""
        return weights

    def compute(self, rows_RD: Tensor, project: Callable[[Tensor, str], Tensor]) -> Tensor:
        """(R, D) -> (R, D). project: (rows, name of a weight) -> their product, with adapters and bias."""
        raise NotImplementedError

    def _weights(self, given: Sequence[Tensor], how: Mode) -> ExpertWeights:
        whole = given or [getattr(self, name) for name in self.names]
        own_and_borrowed = [[local_part(weight) for weight in whole], *([] if how.borrowed is None else [how.borrowed])]
        views = [self.views(dict(zip(self.names, each, strict=True)), whole) for each in own_and_borrowed]
        by_name = {name: [view[name] for view in views] for name in self.names}
        biases = {name: tensors for name, tensors in by_name.items() if name.endswith("_bias")}
        stacks = {name: tensors for name, tensors in by_name.items() if name not in biases}
        if how.grad_token is not None:
            stacks = {name: [own.detach()] for name, (own,) in stacks.items()}
        return ExpertWeights(stacks, biases, how.grad_token)

    def _project(self, rows: Tensor, counts_S: Tensor, name: str, weights: ExpertWeights) -> Tensor:
        out = weights.product(rows, counts_S, name)
        if self.adapter_scale is not None and (factor := f"lora_A.{name}") in weights.stacks:
            low_Rr = weights.product(rows.to(weights.stacks[factor][0].dtype), counts_S, factor)
            delta = weights.product(low_Rr, counts_S, f"lora_B.{name}")
            out = out + (self.adapter_scale * delta).to(out.dtype)
        return weights.with_bias(out, counts_S, f"{name}_bias", rows)


class Experts(RowExperts):
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
        self.names = tuple(name for name, _ in self.named_parameters(recurse=False))
        self.activation = activation

    def compute(self, rows_RD: Tensor, project: Callable[[Tensor, str], Tensor]) -> Tensor:
        """Up, activation, down."""
        hidden = project(rows_RD, self.in_name)
        if self.gated:
            gate_RF, up_RF = hidden.chunk(2, dim=-1)
            hidden_RF = self.activation(gate_RF, up_RF)
        else:
            hidden_RF = self.activation(hidden)
        return project(hidden_RF, "down_proj")

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
