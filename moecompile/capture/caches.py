"""Caches of keys and values, or other states, of transformers' models: their configs switch them on and off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


def switches(model: nn.Module) -> list[Any]:
    """The configs inside `model` that switch caches of keys and values, or other states, on and off."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    return [config for config in configs.values() if isinstance(getattr(config, "use_cache", None), bool)]


@contextlib.contextmanager
def caches(model: nn.Module, *, on: bool) -> Iterator[None]:
    """Switches caches, by the configs' own switch. While a model is recorded they are off: replayed calls fill them."""
    before = [(config, config.use_cache) for config in switches(model)]
    for config, _ in before:
        config.use_cache = on
    try:
        yield
    finally:
        for config, switch in before:
            config.use_cache = switch
