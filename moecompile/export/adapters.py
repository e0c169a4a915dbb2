"""Adapters in the format of peft, alone or merged into the model.

Algorithm:
  1. Give the model as it was before training (transformers' own, not compiled) the same adapters by peft.
  2. Copy the trained adapters, and routers if they were trained, into it.
  3. Copy what else training has changed, which peft can merge and not write.
  4. Let peft write them, or merge them.

peft stores the adapters of a stacked weight in two dims, and orders them differently:

    ours  A (E, r, d_in)    peft  (E r, d_in): row e r + k               all ranks of expert 0, then of expert 1, ...
    ours  B (E, d_out, r)   peft  (d_out, r E): column k E + e           all experts of rank 0, then of rank 1, ...

It takes weights (E, d_in, d_out) of a class that does not say so (Llama 4) for (E, d_out, d_in): its A is then the
transpose of our B, and its B that of our A.

Legend: E experts, r rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moecompile import hub_kernels
from moecompile.errors import PlanError
from moecompile.nn.existing import ExistingExperts
from moecompile.passes.adapters import routers_to_train
from moecompile.plan import Plan


def with_adapters(base: nn.Module, trained: nn.Module, plan: Plan, *, alone: bool) -> Any:
    """peft's model: `base` with the adapters of `trained` (steps 1 to 3).

    Args:
        base: the model before training, of transformers. trained: compiled by `plan`, on one device. alone: whether
            peft will write the adapters, not merge them.

    Raises:
        PlanError: a trained adapter has no place in peft's model, or another shape there; or adapters alone would lack
            what else training has changed.
    """
    from peft import get_peft_model

    for model in (base, trained):
        hub_kernels.take_off(model)
    before, weights = dict(base.state_dict()), dict(trained.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads a property that transformers has renamed
        adapted: Any = get_peft_model(base, _config(base, trained, plan))
    used: set[str] = set()
    for path, module in adapted.get_base_model().named_modules():
        if type(module).__name__ == "ParamWrapper":
            _fill_stacked(module, path, trained, weights, used)
        elif hasattr(module, "lora_A"):
            _fill(module, path, weights, used)
    routers = _saved_routers(adapted, trained, plan)
    for name, saved in routers.items():
        _copy(name, weights[name], saved)
    for name, value in _changed(before, weights).items():  # Step 3
        if alone and name not in routers:
            rule = "was changed by training, and peft writes adapters and routers alone"
            raise PlanError("adapters", name, rule, "Use export.adapters=merged")
        _copy(name, value, before[name])
    if unused := [name for name in weights if (".lora_A." in name or ".lora_B." in name) and name not in used]:
        raise PlanError("adapters", unused[0], "was trained, and peft's model has no such adapter", "Report this")
    return adapted


def load_adapters(base: nn.Module, folder: Path) -> nn.Module:
    """The model `base` with the adapters in a folder, loaded by peft alone."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        loaded: nn.Module = PeftModel.from_pretrained(base, str(folder))
    return loaded


def _config(base: nn.Module, trained: nn.Module, plan: Plan) -> Any:
    from peft import LoraConfig

    adapters = plan.adapters
    assert adapters is not None
    stacked = [f"{x.site.fqn}.{name}" for x in plan.layers if x.adapters for name in x.adapters.weights]
    parameters = [*stacked, *(f"{path}.weight" for path in adapters.as_parameters)]
    routers = [path for path, _ in routers_to_train(trained, plan)]  # the base does not say where its logits come from
    kind: Any = LoraConfig  # its alpha is declared as an integer
    return kind(
        r=adapters.rank,
        lora_alpha=adapters.alpha,
        lora_dropout=adapters.dropout,
        target_modules=[path for path in adapters.linears if path not in adapters.as_parameters],
        target_parameters=parameters or None,
        modules_to_save=routers or None,
        task_type="CAUSAL_LM" if hasattr(base, "generate") and not _is_encoder_decoder(base) else None,
    )


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _fill_stacked(wrapper: Any, path: str, trained: nn.Module, weights: Mapping[str, Tensor], used: set[str]) -> None:
    """The adapter of one parameter; wrappers of several parameters of a module are nested."""
    owner = path.replace(".base_layer", "")
    if f"{owner}.lora_A.default.weight" in weights:  # a linear that is adapted by its parameter
        _fill(wrapper, owner, weights, used)
        return
    names = [f"{owner}.lora_{side}.{wrapper.parameter_name}" for side in "AB"]
    a_EID, b_EOI = (weights[name] for name in names)
    if _is_transposed(trained.get_submodule(owner)) and not getattr(wrapper.get_base_layer(), "is_transposed", False):
        a_EID, b_EOI = b_EOI.mT, a_EID.mT
    _copy(names[0], a_EID.flatten(0, 1), wrapper.lora_A["default"].weight)
    _copy(names[1], b_EOI.permute(1, 2, 0).flatten(1), wrapper.lora_B["default"].weight)
    used.update(names)


def _is_transposed(experts: nn.Module) -> bool:
    """Whether the weights of compiled experts are (E, d_in, d_out)."""
    return any(each.transposed for each in experts.modules() if isinstance(each, ExistingExperts))


def _fill(module: Any, path: str, weights: Mapping[str, Tensor], used: set[str]) -> None:
    for side, linears in (("A", module.lora_A), ("B", module.lora_B)):
        name = f"{path}.lora_{side}.default.weight"
        _copy(name, weights[name], linears["default"].weight)
        used.add(name)


def _saved_routers(model: Any, trained: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Name in the trained model -> the tensor of peft's copy of a router, also for its buffers."""
    found: dict[str, Tensor] = {}
    for path, _ in routers_to_train(trained, plan):
        copied = model.get_base_model().get_submodule(path).modules_to_save["default"]
        found |= {f"{path}.{name}": tensor for name, tensor in copied.state_dict().items()}
    return found


def _changed(before: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name before training -> the trained value, if it differs: of a router, and of a correction bias beside it
    (MiniMax-M2). Not of experts whose unused rows are gone.
    """
    now = {name.replace(".base_layer.", "."): value for name, value in weights.items()}  # peft's name of a linear
    return {
        name: now[name]
        for name, value in before.items()
        if name in now and now[name].shape == value.shape and not torch.equal(now[name].to(value.dtype), value)
    }


@torch.no_grad()
def _copy(name: str, value: Tensor, target: Tensor) -> None:
    if value.shape != target.shape:
        rule = f"is {list(value.shape)} as trained and {list(target.shape)} in peft"
        raise PlanError("adapters", name, rule, "Export with export.format=native")
    target.copy_(value)
