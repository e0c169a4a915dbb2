"""Lets every model that a test builds be a rewritten one: its constructor ends with a compilation.

Dense FFNs become copies of themselves, so that outputs stay; experts that the model has stay the model's own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moecompile.pipeline import compile_with_report
from moecompile.schema import Config

num_rewritten: dict[str, int] = {}  # class -> FFNs or experts of its last model


def patch(classes: Sequence[type[nn.Module]], config: Config) -> None:
    """Changes the constructors of `classes`; of nested models the outermost is compiled, once."""
    depth = [0]
    for kind in classes:
        original = kind.__init__

        @functools.wraps(original)
        def build(self: nn.Module, *args: Any, _original: Any = original, **kwargs: Any) -> None:
            depth[0] += 1
            try:
                _original(self, *args, **kwargs)
            finally:
                depth[0] -= 1
            if depth[0] == 0:
                _compile(self, config)

        kind.__init__ = build  # type: ignore[method-assign]


def _compile(model: Any, config: Config) -> None:
    """The base model is compiled: heads for several choices take other inputs, and hold no FFN."""
    device = next(model.parameters()).device
    with _plain():
        example = {"input_ids": torch.ones(1, 4, dtype=torch.int64, device=device)}
        compiled = compile_with_report(model.base_model, config, example=example)
    num_rewritten[type(model).__name__] = len(compiled.plan.layers)


@contextmanager
def _plain() -> Any:
    """from_pretrained builds under modes of its own, in which initialisation is skipped or goes to the meta device."""
    with torch.random.fork_rng(devices=[]):
        yield
