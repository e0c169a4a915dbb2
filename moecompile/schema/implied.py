"""Settings that follow from the choice of a model, if the caller has not set them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from moecompile.errors import ConfigError
from moecompile.schema.config import Config
from moecompile.schema.enums import DataKind, ModelDevice, TokenizerSource

SOURCES = ("architecture", "pretrained", "package", "factory")
"""Keys of `model` with the source of a model."""


def with_implied(config: Config, groups: Collection[str]) -> Config:
    """Changes `config`: a `pretrained`, `package` or `factory` that the caller set replaces the model group's source.

    A pretrained model implies its own tokenizer and vocabulary.

    Args:
        groups: groups of which the caller selected an option.

    Raises:
        ConfigError: `model.config` is set too.
    """
    model, given = config.model, config.given
    chosen = [name for name in SOURCES if f"model.{name}" in given and getattr(model, name)]
    if len(chosen) != 1 or chosen == ["architecture"] or "model" in groups:
        return config
    source, value = chosen[0], str(getattr(model, chosen[0]))
    if key := next((key for key in given if key.startswith("model.config.")), None):
        raise ConfigError(
            key, model.config[key.split(".")[2]], f"model.{source}={value} has a config of its own",
            "Leave it out, or build a model with model.architecture",
        )  # fmt: skip
    for name in SOURCES:
        if name != source:
            setattr(model, name, None)
    model.config, model.published = {}, None
    if model.pretrained and Path(model.pretrained).is_dir():  # export and chat read it from any directory
        model.pretrained = value = str(Path(model.pretrained).absolute())
    if "model.name" not in given:
        model.name = Path(value).resolve().name if source == "pretrained" else value
    if "model.device" not in given:
        model.device = ModelDevice.cpu
    # A corpus has no tokenizer of its own: the group that was selected leaves the choice to the model.
    selected = "data" in groups and config.data.kind is not DataKind.corpus
    own_data = selected or {"data.tokenizer", "data.vocab_size"} & set(given)
    if source != "factory" and not own_data:
        config.data.tokenizer, config.data.vocab_size = TokenizerSource.model, None
    return config


def has_experts(config: Config) -> bool:
    """Whether the model's config mentions experts, which is all that is known before the model is built."""
    model = config.model
    if model.pretrained:
        file = Path(model.pretrained, "config.json")
        return file.is_file() and "experts" in file.read_text(encoding="utf-8", errors="replace")
    return model.published is not None or any("experts" in key for key in model.config)
