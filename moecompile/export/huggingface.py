"""Writes an upcycled model, or one that was MoE before, as a Hugging Face checkpoint, and loads it again.

Algorithm:
  1. The family: the model's own if no FFN of it was upcycled, else by the table of families.
  2. Its config: the dense model's, with what the family's own settings say of experts and routing.
  3. Its model on the meta device, filled with the trained tensors themselves (no copies), which transformers writes.
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

from moecompile.errors import ConfigError
from moecompile.export.beside import own_fields
from moecompile.export.families import Family, choose_family, families_of, no_pair
from moecompile.export.form import MoEForm, form_of
from moecompile.export.names import family_weights
from moecompile.models.build import class_of, empty_of, no_progress_bars
from moecompile.models.loading import refuse_incomplete
from moecompile.plan import ExpertsSite, Plan

# Keys of a config that are its class's or the file's, not the model's.
_NOT_CARRIED = ("model_type", "architectures", "transformers_version", "_name_or_path")


@dataclass(frozen=True)
class Target:
    """What is written. family, form: None for a model that stays what it was. config: of transformers."""

    family: Family | None
    form: MoEForm | None
    config: Any


def find_target(model: nn.Module, plan: Plan, wanted: str | None) -> Target:
    """The family and its config (steps 1 and 2).

    Args:
        model: rewritten by `plan`.
        wanted: a family's name, or None for the first that fits.

    Raises:
        ConfigError: no family computes what was trained.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise no_pair(wanted, f"{type(model).__name__} is not a model of transformers")
    existing = [isinstance(layer.site, ExpertsSite) for layer in plan.layers]
    if all(existing):
        return Target(None, None, _own_config(config, plan, wanted))
    if any(existing):
        raise no_pair(wanted, "some experts were the model's own and some are upcycled, which no family holds together")
    families, form = families_of(config, wanted), form_of(plan, int(config.num_hidden_layers))
    if isinstance(form, str):
        raise no_pair(wanted, form)
    family = choose_family(families, form, config, wanted)
    return Target(family, form, _family_config(family, form, config))


def write(model: nn.Module, target: Target, folder: Path) -> str:
    """Writes config and weights (step 3) and returns the class's name.

    Raises:
        ConfigError: weights that the family has no place for, or that it misses.
    """
    weights = dict(model.state_dict())
    if target.family is not None and target.form is not None:
        weights = family_weights(weights, target.form, target.family)
    written: Any = empty_of(target.config)
    if target.family is None:
        weights |= dict(_filled_up(weights, written.state_dict()))
    _check(weights, written.state_dict(), target.config.model_type)
    written.load_state_dict(weights, strict=True, assign=True)
    written.tie_weights()
    with no_progress_bars():
        written.save_pretrained(folder)
    return type(written).__name__


def reload(folder: Path) -> nn.Module:
    """The checkpoint in `folder` as anyone would load it, in fp32, its experts in transformers' plain loop.

    Raises:
        ConfigError: transformers does not find exactly the weights that it looks for.
    """
    from transformers import AutoConfig

    kind = class_of(AutoConfig.from_pretrained(folder))
    with no_progress_bars():
        loaded, info = kind.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    refuse_incomplete(info, "export.path", folder, "Report this")
    model: nn.Module = loaded
    return model


def write_tokenizer(tokenizer: Path, folder: Path, model: Path | None = None) -> None:
    """Writes a tokenizer so that `AutoTokenizer.from_pretrained` finds it.

    Args:
        tokenizer: a `tokenizer.json`. model: folder of the pretrained model that it came with, if it did, which says
            what tokens are special, and how chats are written.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if model is not None and (model / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(model, trust_remote_code=False).save_pretrained(folder)
    else:
        PreTrainedTokenizerFast(tokenizer_file=str(tokenizer)).save_pretrained(folder)


def _own_config(config: Any, plan: Plan, wanted: str | None) -> Any:
    family = str(config.model_type)
    if wanted not in (None, family):
        rule = f"the model had its experts before and stays {family}"
        raise ConfigError("export.family", wanted, rule, f"Use {family}")
    for layer in plan.layers:
        if isinstance(layer.site, ExpertsSite) and layer.site.form == "modules":
            raise no_pair(wanted, f"{layer.site.fqn} was one module an expert and is one stack now")
    own = copy.deepcopy(config)
    vars(own).pop("auto_map", None)  # code, which is not carried
    return own


def _family_config(family: Family, form: MoEForm, dense: Any) -> Any:
    """The family's config: what the dense one says, where the family knows the key too, and the family's settings."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family.name]
    settings = family.settings(form, dense)
    known = {field.name for field in dataclasses.fields(kind)}
    said = {key: value for key, value in dense.to_dict().items() if key not in _NOT_CARRIED}
    # head_dim is read by families that do not declare it.
    carried = {key: value for key, value in said.items() if key in known | {"head_dim", "layer_types", "dtype"}}
    return kind(**{**own_fields(dense), **carried, **settings})


def _filled_up(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Rows of experts that are the identity, which nothing reads and the rewrite has cut off: zeros."""
    for name, tensor in weights.items():
        more = wanted[name].shape[0] - tensor.shape[0] if name in wanted and tensor.ndim == 3 else 0
        if more > 0 and wanted[name].shape[1:] == tensor.shape[1:]:
            yield name, torch.cat((tensor, tensor.new_zeros(more, *tensor.shape[1:])))


def _check(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], family: str) -> None:
    """Exactly the family's weights, in its shapes."""
    for name, tensor in weights.items():
        if name not in wanted:
            raise no_pair(family, f"has no place for the weight {name}")
        if tensor.shape != wanted[name].shape:
            raise no_pair(family, f"{name} is {list(tensor.shape)} here and {list(wanted[name].shape)} there")
    if missing := [name for name in wanted if name not in weights]:
        raise no_pair(family, f"needs a weight {missing[0]}, which was not trained")
