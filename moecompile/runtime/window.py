"""The accumulation window: the micro-batches of one optimizer step, and their random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moecompile.nn import set_random_key

_MIX = 0x9E3779B97F4A7C15  # odd and large: neighbouring keys are far apart


@dataclass
class Window:
    """The current window on this rank so far; each window is a new object.

    num_micro_batches: those that have begun. num_tokens: their tokens, with automatic optimization of a sum. is_finite:
    whether their losses are finite; None before the first backward. arguments: of their training steps, with `on_nan`.
    """

    num_micro_batches: int = 0
    num_tokens: Tensor | int = 0
    is_finite: Tensor | None = None
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def add_loss(self, loss: Tensor) -> None:
        """Records whether the loss of a micro-batch is finite, without a host sync."""
        finite = loss.detach().isfinite().all()
        self.is_finite = finite if self.is_finite is None else self.is_finite & finite


@contextmanager
def keyed_random_numbers(model: nn.Module, seed: int, step: int, number: int, device: torch.device) -> Iterator[None]:
    """Makes random numbers (routers, dropout) depend on the micro-batch's index in one process, not on the rank.

    Args:
        step: optimizer step. number: index of the micro-batch in the step, in the order of one process.
    """
    set_random_key(model, seed, step, number)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(((seed * _MIX + step) * _MIX + number) % 2**63)
        yield
