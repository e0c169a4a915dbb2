"""Builds or loads the model that a config describes. transformers is imported here alone, inside functions."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moecompile.errors import ConfigError, MoecompileError
from moecompile.schema import ModelConfig


def build_model(model: ModelConfig, seed: int) -> nn.Module:
    """The dense model. Random weights depend on `seed` alone, so all ranks build the same.

    Raises:
        ConfigError: an unknown architecture, config keys that it does not have, or a model that cannot be loaded.
    """
    # Nothing is ever downloaded: a model is built from its config or loaded from a local folder.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model.factory:
            return _from_factory(model.factory)
        if model.pretrained:
            return _from_pretrained(model.pretrained)
        return _from_architecture(model)


def example_inputs(model: nn.Module, seq_len: int) -> dict[str, Tensor]:
    """One short batch of token ids for a language model; `use_cache` is left out of what is recorded."""
    vocab_size = int(getattr(getattr(model, "config", None), "vocab_size", 2))
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(0, vocab_size, (1, seq_len), generator=generator)}


def _from_architecture(model: ModelConfig) -> nn.Module:
    architecture = str(model.architecture)
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model.architecture not in CONFIG_MAPPING:
        raise ConfigError(
            "model.architecture", model.architecture, "is not a model type of the installed transformers",
            "Use a model type such as llama or deepseek_v3",
        )  # fmt: skip
    config_class = CONFIG_MAPPING[architecture]
    known = {*inspect.signature(config_class.__init__).parameters, *config_class.attribute_map}
    if unknown := [key for key in model.config if key not in known]:  # transformers itself takes any key silently
        close = difflib.get_close_matches(unknown[0], known, 1)
        raise ConfigError(
            f"model.config.{unknown[0]}", model.config[unknown[0]], f"is not a setting of {model.architecture}",
            f"Did you mean {close[0]}" if close else "Remove it, or correct its name",
        )  # fmt: skip
    try:
        config = AutoConfig.for_model(architecture, **model.config)
        built: nn.Module = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ConfigError(
            "model.config", model.name, f"transformers cannot build a {model.architecture} from it: {error}", "Mend it"
        ) from error
    return built


def _from_pretrained(folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    if not Path(folder, "config.json").is_file():
        raise ConfigError(
            "model.pretrained", folder, "is not a folder with a config.json", "Give a folder that save_pretrained wrote"
        )
    try:
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, dtype="auto"
        )
    except (OSError, ValueError) as error:
        raise ConfigError("model.pretrained", folder, f"cannot be loaded: {error}", "Check the folder") from error
    return loaded


def _from_factory(path: str) -> nn.Module:
    module, _, name = path.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            "model.factory", path, f"cannot be imported: {error}", "Give it as package.module:function"
        ) from error
    built = function()
    if not isinstance(built, nn.Module):
        raise MoecompileError(f"model.factory={path} returned a {type(built).__name__}, not a torch.nn.Module")
    return built
