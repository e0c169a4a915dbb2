"""Existing experts of a model, computed on rows in expert order with their own activation.

Legend: R rows in expert order, D model dim, F expert width, E experts, T tokens, r rank of adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moecompile.errors import MoecompileError
from moecompile.nn.experts import RowExperts
from moecompile.nn.meter import LoadMeter
from moecompile.routing import NO_BALANCE, BalanceSpec
from moecompile.torch_private import own_buffers

CORRECTION_BIAS = "e_score_correction_bias"
"""Name of a router's correction bias in transformers."""


class ExistingExperts(RowExperts):
    """Stacked experts without parameters: the weights belong to the parent module, which passes them at every call.

    So they keep their names, shapes and layout in the state dict.

    Args:
        num_experts: of the model, over all ranks.
        own: the model's experts module without parameters. Its `_apply_gate(gate_up)` or `act_fn` is the activation.
        names: `gate_up_proj` or `up_proj`, `down_proj`, and their `*_bias`, in the order of the arguments.
        transposed: weights are (E, d_in, d_out), else (E, d_out, d_in).
    """

    own: nn.Module

    def __init__(self, num_experts: int, own: nn.Module, names: tuple[str, ...], *, transposed: bool) -> None:
        super().__init__()
        self.num_experts, self.names, self.transposed = num_experts, names, transposed
        # Not a submodule: code that walks over modules and knows the class (transformers' `_init_weights`) would expect
        # its weights.
        vars(self)["own"] = own

    def adapt(self, names: Sequence[str], scale: float) -> None:
        """Takes further arguments at every call: the factors of adapters."""
        self.names, self.adapter_scale = (*self.names, *names), scale

    def views(self, weights: dict[str, Tensor], whole: Sequence[Tensor]) -> dict[str, Tensor]:
        """Transposed, but biases and factors of adapters."""
        if not self.transposed:
            return weights
        kept = {name for name in weights if name.endswith("_bias") or name.startswith("lora_")}
        return {name: w if name in kept else w.transpose(1, 2) for name, w in weights.items()}

    def compute(self, rows_RD: Tensor, project: Callable[[Tensor, str], Tensor]) -> Tensor:
        """Up, the model's activation, down."""
        if "gate_up_proj" in self.names:
            hidden_RF = self.gate(project(rows_RD, "gate_up_proj"))
        else:
            hidden_RF = self._own("act_fn", project(rows_RD, "up_proj"))
        return project(hidden_RF, "down_proj")

    def gate(self, gate_up: Tensor) -> Tensor:
        """The activation of the model's own experts, (R, 2F) -> (R, F)."""
        if hasattr(self.own, "_apply_gate"):  # a method of transformers
            return self._own("_apply_gate", gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self._own("act_fn", gate) * up

    def _own(self, method: str, value: Tensor) -> Tensor:
        out: Tensor = getattr(self.own, method)(value)
        return out

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.num_experts} experts, weights {', '.join(self.names)}"


class MatrixExperts(ExistingExperts):
    """Experts whose projections are one matrix each, (E F, D): gate, up and down (DBRX).

    Args:
        num_experts, names: as above. own: the model's module with an `activation_fn`, without its parameters.
    """

    def __init__(self, num_experts: int, own: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__(num_experts, own, names, transposed=False)

    def views(self, weights: dict[str, Tensor], whole: Sequence[Tensor]) -> dict[str, Tensor]:
        """Cut by experts, unless they are already (`local_experts`); the last one transposed."""
        width = whole[0].shape[0] // self.num_experts
        gate, up, down = (w if w.dim() == 3 else w.unflatten(0, (-1, width)) for w in weights.values())
        return dict(zip(self.names, (gate, up, down.transpose(1, 2)), strict=True))

    def compute(self, rows_RD: Tensor, project: Callable[[Tensor, str], Tensor]) -> Tensor:
        """Gate and up, the model's activation, down."""
        gate, up, down = self.names
        hidden_RF = self._own("activation_fn", project(rows_RD, gate)) * project(rows_RD, up)
        return project(hidden_RF, down)


class OneHotIds(nn.Module):
    """One-hot choices (T, 1, E) -> expert ids (T, 1); the id E for a dropped token, whose choice is all zero."""

    def forward(self, chosen_T1E: Tensor) -> Tensor:
        """Returns int64 ids."""
        dropped_T1 = chosen_T1E.sum(-1) == 0
        return chosen_T1E.argmax(-1).masked_fill(dropped_T1, chosen_T1E.shape[-1])


class SkippedIds(nn.Module):
    """Choices of a router that marks a skipped token by weight 0 (Zaya): no expert, the id `num_experts`.

    An expert that such a row reached would add nothing, and the weight has no gradient.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Returns int64 ids."""
        return ids_TK.masked_fill(weights_TK == 0, self.num_experts)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.num_experts} experts"


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
                raise MoecompileError(f"{experts}: the router's buffer {CORRECTION_BIAS} is gone")
            biases.append((meter, bias))
    return biases


def keep_biases_wide(model: nn.Module) -> None:
    """Makes the correction biases that follow the load fp32, where they are narrower, in place: of a bf16 number above
    0.5, a step of 0.001 is rounded away.
    """
    narrow = {id(bias) for _, bias in own_biases(model) if torch.promote_types(bias.dtype, torch.float32) != bias.dtype}
    for buffers in map(own_buffers, model.modules()) if narrow else ():
        buffers.update(
            {name: each.float() for name, each in buffers.items() if each is not None and id(each) in narrow}
        )


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
        if name.rpartition(".")[2] == CORRECTION_BIAS and buffer.numel() == num_experts:
            return buffer
    return None
