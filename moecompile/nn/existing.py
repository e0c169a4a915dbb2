"""Existing experts of a model, computed on rows in expert order with their own activation.

Legend: R rows in expert order, D model dim, F expert width, E experts, T tokens, r rank of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moecompile import ops  # noqa: F401  (registers the ops)
from moecompile.errors import MoecompileError
from moecompile.nn.experts import fused_experts, grouped_mm, with_bias
from moecompile.nn.meter import LoadMeter
from moecompile.ops.backend import experts_by
from moecompile.routing import NO_BALANCE, BalanceSpec
from moecompile.torch_private import local_part

_MATRICES = 3  # dims of the stacked weights of a projection; biases have two


class _Calls(NamedTuple):
    """token: of `collect_gradients`. lent: weights of borrowed experts, by name."""

    token: Tensor | None
    lent: Mapping[str, Tensor]


class ExistingExperts(nn.Module):
    """Stacked experts without parameters: the weights belong to the parent module, which passes them at every call.

    So they keep their names, shapes and layout in the state dict.

    Args:
        num_experts: of the model, over all ranks.
        own: the model's experts module without parameters. Its `_apply_gate(gate_up)` or `act_fn` is the activation.
        names: `gate_up_proj` or `up_proj`, `down_proj`, and their `*_bias`, in the order of the arguments.
        transposed: weights are (E, d_in, d_out), else (E, d_out, d_in).
    """

    own: nn.Module
    adapter_scale: float | None = None

    def __init__(self, num_experts: int, own: nn.Module, names: tuple[str, ...], *, transposed: bool) -> None:
        super().__init__()
        self.num_experts, self.names, self.transposed = num_experts, names, transposed
        # Not a submodule: code that walks over modules and knows the class (transformers' `_init_weights`) would expect
        # its weights.
        vars(self)["own"] = own

    def adapt(self, names: Sequence[str], scale: float) -> None:
        """Takes further arguments at every call, `lora_A.NAME` (E, r, d_in) and `lora_B.NAME` (E, d_out, r).

        Expert e then computes with W_e + scale B_e A_e of the weight NAME, but this sum is never in memory.
        """
        self.names, self.adapter_scale = (*self.names, *names), scale

    def forward(
        self,
        rows_RD: Tensor | None,
        counts_E: Tensor | None,
        *weights: Tensor,
        source_R: Tensor | None = None,
        weights_R: Tensor | None = None,
        token: Tensor | None = None,
        collect: bool = False,
        borrowed: Sequence[Tensor] | None = None,
        backend: str = "",
        most: int = 0,
    ) -> Tensor:
        """rows_RD in expert order, counts_E rows of each local expert, weights of the local experts -> (R, D).

        With source_R and weights_R, token or collect (without rows), borrowed, or a backend: as in `Experts`.
        """
        local = [local_part(weight) for weight in weights]
        if counts_E is None or borrowed is not None:
            num_local = self.num_experts * local[0].shape[0] // weights[0].shape[0]
        else:
            num_local = counts_E.shape[0]
        by_name = self._matrices(dict(zip(self.names, local, strict=True)), num_local)
        if collect:
            made: Tensor = torch.ops.moecompile.collect_gradients([w for w in by_name.values() if w.dim() == _MATRICES])
            return made
        assert rows_RD is not None and counts_E is not None
        lent = {} if borrowed is None else self._matrices(dict(zip(self.names, borrowed, strict=True)), 0)
        if token is not None:
            by_name = {name: w.detach() if w.dim() == _MATRICES else w for name, w in by_name.items()}
        if source_R is not None and weights_R is not None:
            both = [[given["gate_up_proj"], given["down_proj"]] if given else None for given in (by_name, lent)]
            assert both[0] is not None
            if backend:
                return experts_by(backend, most, rows_RD, source_R, weights_R, counts_E, both[0][0], both[0][1])
            return fused_experts(rows_RD, source_R, weights_R, counts_E, both[0], both[1], token)
        return self._experts(rows_RD, counts_E, by_name, _Calls(token, lent))

    def _matrices(self, weights: dict[str, Tensor], num_local: int) -> dict[str, Tensor]:
        """The weights, those of projections as `grouped_mm` takes them, (E, d_out, d_in)."""
        if not self.transposed:
            return weights
        stacks = {name for name, w in weights.items() if w.dim() == _MATRICES and not name.startswith("lora_")}
        return {name: w.transpose(1, 2) if name in stacks else w for name, w in weights.items()}

    def _experts(self, rows_RD: Tensor, counts_E: Tensor, weights: dict[str, Tensor], calls: _Calls) -> Tensor:
        if "gate_up_proj" in weights:
            hidden_RF = self.gate(self._project(rows_RD, counts_E, "gate_up_proj", weights, calls))
        else:
            hidden_RF = self._own("act_fn", self._project(rows_RD, counts_E, "up_proj", weights, calls))
        return self._project(hidden_RF, counts_E, "down_proj", weights, calls)

    def gate(self, gate_up: Tensor) -> Tensor:
        """The activation of the model's own experts, (R, 2F) -> (R, F)."""
        if hasattr(self.own, "_apply_gate"):  # a method of transformers
            return self._own("_apply_gate", gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self._own("act_fn", gate) * up

    def _own(self, method: str, value: Tensor) -> Tensor:
        out: Tensor = getattr(self.own, method)(value)
        return out

    def _project(self, rows: Tensor, counts_E: Tensor, name: str, weights: dict[str, Tensor], calls: _Calls) -> Tensor:
        out = _product(rows, counts_E, name, weights, calls)
        if self.adapter_scale is not None and f"lora_A.{name}" in weights:
            wide = rows.to(weights[f"lora_A.{name}"].dtype)
            low_Rr = _product(wide, counts_E, f"lora_A.{name}", weights, calls)
            delta = _product(low_Rr, counts_E, f"lora_B.{name}", weights, calls)
            out = out + (self.adapter_scale * delta).to(out.dtype)
        bias = weights.get(f"{name}_bias")
        return out if bias is None else with_bias(out, bias, counts_E, rows, calls.lent.get(f"{name}_bias"))

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.num_experts} experts, weights {', '.join(self.names)}"


def _product(rows: Tensor, counts_E: Tensor, name: str, weights: dict[str, Tensor], calls: _Calls) -> Tensor:
    """`grouped_mm` with the weight `name`; its number among the matrices is that of `collect_gradients`."""
    index = [known for known, weight in weights.items() if weight.dim() == _MATRICES].index(name)
    return grouped_mm(rows, weights[name], counts_E, calls.token, index, calls.lent.get(name))


class MatrixExperts(ExistingExperts):
    """Experts whose projections are one matrix each, (E F, D): gate, up and down (DBRX).

    Args:
        num_experts, names: as above. own: the model's module with an `activation_fn`, without its parameters.
    """

    def __init__(self, num_experts: int, own: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__(num_experts, own, names, transposed=False)

    def _matrices(self, weights: dict[str, Tensor], num_local: int) -> dict[str, Tensor]:
        gate, up, down = (
            w if w.dim() == _MATRICES else w.unflatten(0, (num_local, -1)) for w in (weights[n] for n in self.names)
        )
        return dict(zip(self.names, (gate, up, down.transpose(1, 2)), strict=True))

    def _experts(self, rows_RD: Tensor, counts_E: Tensor, weights: dict[str, Tensor], calls: _Calls) -> Tensor:
        gate, up, down = self.names
        hidden_RF = self._own("activation_fn", self._project(rows_RD, counts_E, gate, weights, calls))
        hidden_RF = hidden_RF * self._project(rows_RD, counts_E, up, weights, calls)
        return self._project(hidden_RF, counts_E, down, weights, calls)


class OneHotIds(nn.Module):
    """One-hot choices (T, 1, E) -> expert ids (T, 1); the id E for a dropped token, whose choice is all zero."""

    def forward(self, chosen_T1E: Tensor) -> Tensor:
        """Returns int64 ids."""
        dropped_T1 = chosen_T1E.sum(-1) == 0
        return chosen_T1E.argmax(-1).masked_fill(dropped_T1, chosen_T1E.shape[-1])


class WideWeights(nn.Module):
    """Casts routing weights to a dtype as wide as the hidden states and at least fp32, like those of `Router`."""

    def forward(self, weights_TK: Tensor, hidden_TD: Tensor) -> Tensor:
        """Returns weights_TK."""
        wide = torch.promote_types(torch.promote_types(weights_TK.dtype, hidden_TD.dtype), torch.float32)
        return weights_TK.to(wide)


class ExistingMeter(LoadMeter):
    """Counts the load of experts behind the model's own router.

    balance: the rule of that router's correction bias, as in `Router`. top_k: experts per token.
    """

    balance: BalanceSpec = NO_BALANCE
    top_k = 0


def own_biases(model: nn.Module) -> list[tuple[ExistingMeter, Tensor]]:
    """Meters whose router (the model's own) has a correction bias that follows the load, and that bias (E,)."""
    biases = []
    for path, meter in model.named_modules():
        if isinstance(meter, ExistingMeter) and meter.balance.rate:
            experts = path.rpartition(".")[0]
            bias = correction_bias(model.get_submodule(experts.rpartition(".")[0]), meter.num_experts)
            if bias is None:
                raise MoecompileError(f"{experts}: the router's buffer e_score_correction_bias is gone")
            biases.append((meter, bias))
    return biases


def without_parameters(module: nn.Module) -> nn.Module:
    """A module of the same class with the same plain attributes and parameter-free children, to call its methods.

    Hooks, parameters and buffers are left out.
    """
    shell = type(module).__new__(type(module))
    nn.Module.__init__(shell)
    shell.training = module.training
    for name, value in vars(module).items():
        if name not in vars(shell):
            object.__setattr__(shell, name, value)
    for name, child in module.named_children():
        if not any(True for _ in child.parameters()) and not any(True for _ in child.buffers()):
            shell.add_module(name, child)
    return shell


def correction_bias(block: nn.Module, num_experts: int) -> Tensor | None:
    """The correction bias (E,) of the router in an MoE block, by its name in transformers; None if there is none."""
    for name, buffer in block.named_buffers():
        if name.rpartition(".")[2] == "e_score_correction_bias" and buffer.numel() == num_experts:
            return buffer
    return None
