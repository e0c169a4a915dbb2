"""Builds or loads the model that a config describes. transformers is imported inside functions."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moecompile.errors import ConfigError
from moecompile.models.initial import MOST_REPLAYED, Keyed, Replayed, fill_whole
from moecompile.models.loading import UNREADABLE, dequantized, refuse_incomplete, unconverted_weights, unreadable
from moecompile.models.packages import check_package, package_folder
from moecompile.models.recorded import NotRecorded
from moecompile.named_code import FACTORY, imported
from moecompile.schema import ModelAttention, ModelConfig, ModelDevice, ModelInit

_OF_ATTENTION = re.compile(r"attention implementation|flash ?attention|flex attention", re.IGNORECASE)
# Before the rewrite, transformers' plain loop computes existing experts: it supports every precision.
_EXPERTS = "eager"
LONGEST_EXAMPLE = 512
"""Longest sequence, in tokens, on which models are recorded and compared."""


def build_model(model: ModelConfig, seed: int) -> nn.Module:
    """Builds or loads the model. Random weights depend only on `seed`, so all ranks build the same; on `meta`, none.

    Raises:
        ConfigError: the architecture or a config key is unknown, or the model cannot be loaded.
    """
    # Nothing is ever downloaded: a model is built from its config or loaded from a local folder.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with torch.random.fork_rng(devices=[]), torch.device("meta") if model.device is ModelDevice.meta else nullcontext():
        torch.manual_seed(seed)
        if model.factory:
            return _from_factory(model.factory)
        if (folder := pretrained_folder(model)) is not None:
            return _from_pretrained(folder, model)
        if model.device is ModelDevice.cpu and (keyed := _keyed(model, seed)) is not None:
            return keyed
        return _from_architecture(model)


def first_weights(model: ModelConfig, seed: int, structure: nn.Module) -> Replayed | Keyed:
    """The initial weights of a model from a config, as `model.init` says.

    Args:
        structure: the model on the meta device.

    Raises:
        NotRecorded: they cannot be made one by one. ConfigError: the same, where there is no other way.
    """

    def build() -> nn.Module:
        return _from_architecture(model)

    if not _is_keyed(model, structure):
        return Replayed(build, seed)
    try:
        return Keyed(build, seed)
    except NotRecorded as error:
        raise ConfigError("model.init", "keyed", str(error), "Use model.init=replay") from error


def _is_keyed(model: ModelConfig, structure: nn.Module) -> bool:
    if model.init is not ModelInit.auto:
        return model.init is ModelInit.keyed
    return sum(parameter.numel() for parameter in structure.parameters()) > MOST_REPLAYED


def _keyed(model: ModelConfig, seed: int) -> nn.Module | None:
    """The model, if `model.init` draws each block of its rows from a key of its own."""
    if model.init is ModelInit.replay:
        return None
    try:
        structure = build_model(replace(model, device=ModelDevice.meta), seed)
    except ConfigError:  # it needs values, or cannot be built at all
        if model.init is ModelInit.auto:
            return None
        raise
    if not _is_keyed(model, structure):
        return None
    weights = first_weights(model, seed, structure)
    assert isinstance(weights, Keyed)
    return fill_whole(structure, weights)


def pretrained_folder(model: ModelConfig) -> Path | None:
    """The folder with the pretrained weights and the tokenizer; None if the model has neither.

    Raises:
        ConfigError: there is no such folder or package.
    """
    if model.package:
        return package_folder(model.package)
    if model.pretrained and not Path(model.pretrained, "config.json").is_file():
        raise ConfigError(
            "model.pretrained", model.pretrained, "is not a folder with a config.json",
            "Give a folder that save_pretrained wrote; nothing is downloaded",
        )  # fmt: skip
    return Path(model.pretrained) if model.pretrained else None


def config_of(model: ModelConfig) -> Any | None:
    """transformers' config of the model, without loading weights; None if it cannot be known without loading.

    Raises:
        ConfigError: as `build_model`.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if model.architecture:
        return _config_from_keys(model)
    folder = Path(model.pretrained) if model.pretrained else check_package(model.package) if model.package else None
    if folder is None:
        return None
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the code of the config may raise anything
        raise unreadable(error, "model.pretrained", folder) from error
    return _with_own_attention(config, "model.pretrained", folder)


def check_buildable(model: ModelConfig) -> None:
    """Checks that the model can be built: on the meta device, and on a real device only if that fails.

    Raises:
        ConfigError: it cannot be built.
    """
    try:
        build_model(replace(model, device=ModelDevice.meta), 0)
    except ConfigError:
        build_model(model, 0)


def build_empty(model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """The structure of the model in the folder `model.pretrained`, on the meta device.

    Args:
        dtype: of the weights, if the folder's config does not name one.
    """
    from transformers import AutoConfig

    folder = pretrained_folder(model)
    assert folder is not None
    try:
        config = _with_own_attention(
            AutoConfig.from_pretrained(folder, trust_remote_code=False), "model.pretrained", folder
        )
        dequantized(config, "model.pretrained", folder)
        with _attention_checked(model):
            empty = empty_of(config, dtype=config.dtype or dtype, **_implementations(model))
    except UNREADABLE as error:
        raise unreadable(error, "model.pretrained", folder) from error
    _keep_in_fp32(empty, config.dtype or dtype)
    return empty


def _keep_in_fp32(model: Any, dtype: torch.dtype) -> None:
    """Gives the weights their dtype that `from_pretrained` keeps in fp32 in a model of half precision."""
    kept = "|".join(pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype))
    for name, tensor in model.state_dict(keep_vars=True).items() if kept else ():
        if re.search(kept, name):
            tensor.data = tensor.data.float()


def empty_of(config: Any, **options: Any) -> nn.Module:
    """The model of a transformers config, on the meta device."""
    kind = class_of(config)
    build = getattr(kind, "from_config", None) or kind._from_config  # an auto class, or a model's own
    with torch.device("meta"):
        empty: nn.Module = build(config, **options)
    return empty


def example_inputs(model: nn.Module, seq_len: int, *, longest: int = LONGEST_EXAMPLE) -> dict[str, Tensor]:
    """One short batch of token ids for a language model, on its device.

    The sequence is at most `longest`: attention is quadratic in time and memory, and neither a graph nor a plan depends
    on the length.
    """
    seq_len = min(seq_len, longest)
    config = getattr(model, "config", None)
    vocab_size = int(getattr(config, "vocab_size", 2))
    generator = torch.Generator().manual_seed(0)
    device = next((parameter.device for parameter in model.parameters()), "cpu")
    names = ["input_ids"] + ["decoder_input_ids"] * bool(getattr(config, "is_encoder_decoder", False))
    return {name: torch.randint(0, vocab_size, (1, seq_len), generator=generator).to(device) for name in names}


def _from_architecture(model: ModelConfig) -> nn.Module:
    config = _config_from_keys(model)
    try:
        with _attention_checked(model):
            built: nn.Module = auto_class(str(model.architecture)).from_config(config, **_implementations(model))
    except ConfigError:
        raise
    except Exception as error:
        raise _not_buildable(model, error) from error
    return built


def _implementations(model: ModelConfig) -> dict[str, str]:
    """Which of transformers' implementations the model uses."""
    found = {"experts_implementation": _EXPERTS}
    if model.attention is not ModelAttention.auto:
        found["attn_implementation"] = model.attention.value
    return found


@contextmanager
def _attention_checked(model: ModelConfig) -> Iterator[None]:
    """Raises ConfigError if transformers refuses the attention that is asked for."""
    try:
        yield
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        if model.attention is ModelAttention.auto or not _OF_ATTENTION.search(reason):
            raise
        rule, fix = f"transformers refuses it: {reason}", "Use model.attention=auto"
        if isinstance(error, ImportError):
            fix = "Install that; a plan may have model.attention=sdpa or flex_attention, which keep as much"
        raise ConfigError("model.attention", model.attention.value, rule, fix) from error


def _config_from_keys(model: ModelConfig) -> Any:
    architecture = str(model.architecture)
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model.architecture not in CONFIG_MAPPING:
        close = difflib.get_close_matches(architecture, list(CONFIG_MAPPING), 2)
        raise ConfigError(
            "model.architecture", model.architecture, "is not a model type of the installed transformers",
            f"Did you mean {' or '.join(close)}" if close else "Use a model type such as llama or deepseek_v3",
        )  # fmt: skip
    config_class = CONFIG_MAPPING[architecture]
    keys = {*inspect.signature(config_class.__init__).parameters, *config_class.attribute_map}
    # transformers accepts any key silently, and its models read a few keys that their configs do not declare.
    if unknown := [key for key in model.config if key not in keys and not _reads(config_class, key)]:
        close = difflib.get_close_matches(unknown[0], keys, 1)
        raise ConfigError(
            f"model.config.{unknown[0]}", model.config[unknown[0]], f"is not a setting of {model.architecture}",
            f"{f'Did you mean {close[0]}? If not, remove' if close else 'Remove'} it: ~model.config.{unknown[0]}",
        )  # fmt: skip
    if model.config.get("vocab_size", 1) == 0:
        raise ConfigError("model.config.vocab_size", 0, "must be at least 1", "Use 1 or more")
    try:
        config = AutoConfig.for_model(architecture, **model.config)
    except Exception as error:
        raise _not_buildable(model, error) from error
    return _with_own_attention(config, "model.config", model.name)


def _with_own_attention(config: Any, path: str, value: Any) -> Any:
    """The config, unless it names attention of a hub (`OWNER/REPOSITORY`), which transformers would load and run.

    Raises:
        ConfigError: it does.
    """
    for each in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        name = getattr(each, "_attn_implementation", None)
        if isinstance(name, str) and "/" in name:
            rule = f"names code of a hub to run, attn_implementation={name}"
            raise ConfigError(path, value, rule, "Remove it there: attention is computed by transformers itself")
    return config


def _not_buildable(model: ModelConfig, error: Exception) -> ConfigError:
    """The error for anything that a model's code raises for unexpected values."""
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    rule = f"transformers cannot build a {model.architecture} from it: {reason}"
    return ConfigError("model.config", model.name, rule, "Correct what was set there")


def _reads(config_class: type, key: str) -> bool:
    """Whether the architecture's code reads `config.key`, or `getattr(config, "key", ...)`."""
    spec = importlib.util.find_spec(config_class.__module__.replace(".configuration_", ".modeling_"))
    if spec is None or spec.origin is None:
        return False
    code = Path(spec.origin).read_text(encoding="utf-8")
    return re.search(rf"""config(\.{re.escape(key)}\b|, ["']{re.escape(key)}["'])""", code) is not None


def _from_pretrained(folder: Path, model: ModelConfig) -> nn.Module:
    from transformers import AutoConfig

    path = "model.package" if model.package else "model.pretrained"
    value, unconverted = model.package or str(folder), list[str]()
    try:
        config = _with_own_attention(AutoConfig.from_pretrained(folder, trust_remote_code=False), path, value)
        with no_progress_bars(), unconverted_weights() as unconverted, _attention_checked(model):
            loaded: nn.Module
            kind = class_of(config)
            loaded, info = kind.from_pretrained(
                folder, **config_for(kind, config), trust_remote_code=False, use_safetensors=True, dtype="auto",
                output_loading_info=True, ignore_mismatched_sizes=True, **dequantized(config, path, value),
                **_implementations(model),
            )  # fmt: skip
    except UNREADABLE as error:
        raise unreadable(error, path, value, unconverted) from error
    refuse_incomplete(info, path, value)
    return loaded.train()  # like a built model; in evaluation mode it would train without dropout and counters


def class_of(config: Any) -> Any:
    """The class that saved the checkpoint (`BertModel`: an encoder without a head), else an auto class."""
    import transformers

    saved_from = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(saved_from, type) and issubclass(saved_from, transformers.PreTrainedModel):
        return saved_from
    return auto_class(config.model_type)


def config_for(kind: Any, config: Any) -> dict[str, Any]:
    """Options of `kind.from_pretrained`: the folder's config, where `kind` would read it as that of another family
    (Param2-MoE is a `Glm4MoeForCausalLM`, whose config has other defaults).
    """
    own = getattr(kind, "config_class", None)
    return {"config": config} if isinstance(own, type) and not isinstance(config, own) else {}


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Turns off transformers' progress bars, which would fill the logs of the ranks."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def auto_class(architecture: str) -> Any:
    """The auto class of a causal model, or of an encoder-decoder model without a causal form (T5)."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto import modeling_auto

    is_causal = architecture in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    is_seq2seq = architecture in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForSeq2SeqLM if is_seq2seq and not is_causal else AutoModelForCausalLM


def _from_factory(path: str) -> nn.Module:
    try:
        function: Any = imported(FACTORY, path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            "model.factory", path, f"cannot be imported: {error}", "Give it as package.module:function"
        ) from error
    built = function()
    if not isinstance(built, nn.Module):
        raise ConfigError(
            "model.factory", path, f"returned a {type(built).__name__}, not a torch.nn.Module", "Name another function"
        )
    return built
