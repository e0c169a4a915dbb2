"""Writes an upcycled model, or one with existing experts, as a Hugging Face checkpoint, and loads it again.

Algorithm:
  1. Choose the family: the model's own if no FFN was upcycled, else from the table of families.
  2. Build its config from the dense model's and the family's settings for experts and routing.
  3. Build its model on the meta device, assign the trained tensors by the family's names (no copies), and let
     transformers write it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moecompile import hub_kernels
from moecompile.errors import ConfigError
from moecompile.export.beside import own_fields
from moecompile.export.families import (
    Family,
    MoEForm,
    Names,
    choose_family,
    families_of,
    form_of,
    no_pair,
    refuse_drops,
)
from moecompile.models.build import class_of, config_for, empty_of, no_progress_bars
from moecompile.models.chat import load_tokenizer
from moecompile.models.loading import refuse_incomplete
from moecompile.models.without_hub_code import load, read_config
from moecompile.nn.own_router import own_routers
from moecompile.plan import ExpertsSite, Plan
from moecompile.schema import AdapterKind, Config

# Config keys that describe the class or the file, not the model.
_NOT_COPIED = ("model_type", "architectures", "transformers_version", "_name_or_path")


@dataclass(frozen=True)
class Target:
    """The format of an export. family, form: None if the model keeps its own family. config: of transformers."""

    family: Family | None
    form: MoEForm | None
    config: Any


def find_target(model: nn.Module, plan: Plan, requested: str | None) -> Target:
    """The family and its config (steps 1 and 2).

    Args:
        model: rewritten by `plan`.
        requested: name of a family; None: the first suitable one.

    Raises:
        ConfigError: no family computes the trained model.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise no_pair(requested, f"{type(model).__name__} is not a model of transformers")
    existing = [isinstance(layer.site, ExpertsSite) for layer in plan.layers]
    if all(existing):
        return Target(None, None, _own_config(config, plan, requested))
    if any(existing):
        raise no_pair(
            requested, "some experts were the model's own and some are upcycled, which no family holds together"
        )
    families, form = families_of(config, requested), form_of(plan, int(config.num_hidden_layers))
    if isinstance(form, str):
        raise no_pair(requested, form)
    family = choose_family(families, form, config, requested)
    return Target(family, form, _family_config(family, form, config))


def export_notes(model: nn.Module, plan: Plan, config: Config) -> list[str]:
    """A note before training, if what is made of a model of transformers will be none.

    Args:
        model: before or after it is rewritten by `plan`.
    """
    is_theirs = config.model.pretrained or config.model.package
    if not is_theirs or config.adapters.kind is not AdapterKind.none or not plan.layers:
        return []
    try:
        find_target(model, plan, None)
    except ConfigError as error:
        return [f"task=export cannot make a model of transformers of it, export.format=native can: {error.rule}"]
    return []


def write(model: nn.Module, target: Target, folder: Path) -> str:
    """Writes config and weights (step 3) and returns the name of the class.

    Raises:
        ConfigError: the family has no such weight, or lacks one.
    """
    hub_kernels.take_off(model)
    weights = dict(model.state_dict())
    if target.family is not None and target.form is not None:
        weights = family_weights(weights, target.form, target.family)
    exported: Any = empty_of(target.config)
    if target.family is None:
        for path, _ in own_routers(model):  # what a loss over the global batch remembers is not the model's
            weights.pop(f"{path}.global_load", None)
        weights |= dict(_padded(weights, exported.state_dict()))
    _check(weights, exported.state_dict(), target.config.model_type)
    exported.load_state_dict(weights, strict=True, assign=True)
    exported.tie_weights()
    with no_progress_bars():
        exported.save_pretrained(folder)
    return type(exported).__name__


def reload(folder: Path) -> nn.Module:
    """Loads the checkpoint in `folder` with transformers, in fp32, with its plain loop over experts.

    Raises:
        ConfigError: the weights are not exactly those that transformers expects.
    """
    config = read_config(folder, "export.path", folder)
    kind = class_of(config)
    with no_progress_bars():
        loaded, info = load(
            kind, folder, **config_for(kind, config), dtype=torch.float32, experts_implementation="eager",
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    refuse_incomplete(info, "export.path", folder, "Report this")
    model: nn.Module = loaded
    return model


def write_tokenizer(tokenizer: Path, folder: Path, model: Path | None = None) -> None:
    """Writes a tokenizer so that `AutoTokenizer.from_pretrained` finds it.

    Args:
        tokenizer: a `tokenizer.json`. model: folder of the pretrained model that it belongs to, if any, with its
            special tokens and chat template.

    Raises:
        ConfigError: transformers cannot read that of the folder.
    """
    from transformers import PreTrainedTokenizerFast

    if model is not None and (model / "tokenizer_config.json").is_file():
        load_tokenizer(model).save_pretrained(folder)
    else:
        PreTrainedTokenizerFast(tokenizer_file=str(tokenizer)).save_pretrained(folder)


def _own_config(config: Any, plan: Plan, requested: str | None) -> Any:
    family = str(config.model_type)
    if requested not in (None, family):
        rule = f"the model had its experts before and stays {family}"
        raise ConfigError("export.family", requested, rule, f"Use {family}")
    refuse_drops(plan, requested)
    for layer in plan.layers:
        if isinstance(layer.site, ExpertsSite) and layer.site.form == "modules":
            raise no_pair(requested, f"{layer.site.fqn} had one module per expert and is one stack now")
    own = copy.deepcopy(config)
    vars(own).pop("auto_map", None)  # refers to code, which is not copied
    return own


def _family_config(family: Family, form: MoEForm, dense: Any) -> Any:
    """The family's config: values of the dense config for keys that the family has too, and the family's settings."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family.name]
    settings = family.settings(form, dense)
    declared = {field.name for field in dataclasses.fields(kind)}
    values = {key: value for key, value in dense.to_dict().items() if key not in _NOT_COPIED}
    # Some families read head_dim without declaring it.
    shared = {key: value for key, value in values.items() if key in declared | {"head_dim", "layer_types", "dtype"}}
    return kind(**{**own_fields(dense), **shared, **settings})


def _padded(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Weights without the rows of identity experts, which are unused and the rewrite has removed, padded with zeros."""
    for name, tensor in weights.items():
        missing = expected[name].shape[0] - tensor.shape[0] if name in expected and tensor.ndim == 3 else 0
        if missing > 0 and expected[name].shape[1:] == tensor.shape[1:]:
            yield name, torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:])))


def _check(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], family: str) -> None:
    """Checks that names and shapes are exactly those of the family."""
    for name, tensor in weights.items():
        if name not in expected:
            raise no_pair(family, f"has no weight {name}")
        if tensor.shape != expected[name].shape:
            raise no_pair(family, f"{name} is {list(tensor.shape)} here and {list(expected[name].shape)} there")
    if missing := [name for name in expected if name not in weights]:
        raise no_pair(family, f"needs a weight {missing[0]}, which was not trained")


_ROUTER, _EXPERTS, _SHARED = "router", "experts", "shared_experts"
_LATENT_DOWN = "latent_down.weight"


def family_weights(weights: Mapping[str, Tensor], form: MoEForm, family: Family) -> dict[str, Tensor]:
    """Name -> tensor in the family. Tensors that need no change are not copied."""
    blocks = {form.block(layer, form.name) + ".": form.block(layer, family.names.block) + "." for layer in form.layers}
    out = {name: tensor for name, tensor in weights.items() if not name.startswith(tuple(blocks))}
    for ours, theirs in blocks.items():
        inside = {name.removeprefix(ours): tensor for name, tensor in weights.items() if name.startswith(ours)}
        out |= {theirs + name: tensor for name, tensor in _block(inside, form, family.names)}
    return out


def _block(ours: Mapping[str, Tensor], form: MoEForm, names: Names) -> Iterator[tuple[str, Tensor]]:
    yield names.router, ours[f"{_ROUTER}.weight"]
    if names.bias:
        bias_E = ours[f"{_ROUTER}.correction_bias"]
        yield names.bias, bias_E.unsqueeze(0) if names.bias_row else bias_E
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        if (stacked := ours.get(f"{_EXPERTS}.{name}")) is not None:
            yield f"{_EXPERTS}.{name}", stacked
    if names.latent is not None and form.experts.latent_size is not None:
        yield from zip(names.latent, (ours[_LATENT_DOWN], ours["latent_up.weight"]), strict=True)
    if names.shared and form.experts.num_shared:
        yield from _shared(ours, names, gated=form.experts.shared_gate)
    elif names.shared and names.shared_always:
        yield from _silent(ours, names)


def _shared(ours: Mapping[str, Tensor], names: Names, *, gated: bool) -> Iterator[tuple[str, Tensor]]:
    """The shared expert. If the family has a gate but the plan has none, the gate is 0.5 and down_proj is doubled."""
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = ours.get(f"{_SHARED}.{name}.weight")
        if weight is None:  # no gate
            continue
        doubled = name == "down_proj" and names.gate is not None and not gated
        yield f"{names.shared}.{name}.weight", weight * 2 if doubled else weight
    if names.gate is not None:
        down_DF = ours[f"{_SHARED}.down_proj.weight"]
        yield names.gate, ours[f"{_SHARED}.gate_weight"] if gated else down_DF.new_zeros(1, down_DF.shape[0])


def _silent(ours: Mapping[str, Tensor], names: Names) -> Iterator[tuple[str, Tensor]]:
    """A shared expert with an output of zero: a zero down_proj, but projections of expert 0, so that it can learn."""
    stacked = ours.get(f"{_EXPERTS}.gate_up_proj")
    if stacked is not None:
        gate_FD, up_FD = stacked[0].chunk(2)
        yield f"{names.shared}.gate_proj.weight", gate_FD.clone()
    else:
        up_FD = ours[f"{_EXPERTS}.up_proj"][0]
    if _LATENT_DOWN in ours:  # a shared expert reads x, not its projection
        up_FD = up_FD @ ours[_LATENT_DOWN]
    yield f"{names.shared}.up_proj.weight", up_FD.clone()
    yield f"{names.shared}.down_proj.weight", up_FD.new_zeros(up_FD.shape[::-1])
    if names.gate is not None:
        yield names.gate, up_FD.new_zeros(1, up_FD.shape[1])
