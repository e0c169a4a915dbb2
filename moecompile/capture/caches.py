"""Key-value caches and other states of transformers' models, which their configs switch on and off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


def cache_configs(model: nn.Module) -> list[Any]:
    """The configs inside `model` that switch caches on and off."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    return [config for config in configs.values() if isinstance(getattr(config, "use_cache", None), bool)]


@contextlib.contextmanager
def caches(model: nn.Module, *, on: bool) -> Iterator[None]:
    """Switches caches on or off in the configs. Off while a model is recorded: replayed calls would fill them."""
    before = [(config, config.use_cache) for config in cache_configs(model)]
    for config, _ in before:
        config.use_cache = on
    try:
        yield
    finally:
        for config, use_cache in before:
            config.use_cache = use_cache
