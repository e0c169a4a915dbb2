"""The accumulation window: the micro-batches of one optimizer step, and what is random in each of them."""

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
    """What this rank has seen of the running window; the next one is a new `Window`.

    num_micro_batches: that have begun. num_tokens: of them, under automatic optimization of a sum. is_finite: whether
    their losses are; None before the first backward. arguments: of their training steps, where `on_nan` may need them.
    """

    num_micro_batches: int = 0
    num_tokens: Tensor | int = 0
    is_finite: Tensor | None = None
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def add_loss(self, loss: Tensor) -> None:
        """Looks at the loss of a micro-batch; the host does not wait for it."""
        finite = loss.detach().isfinite().all()
        self.is_finite = finite if self.is_finite is None else self.is_finite & finite


@contextmanager
def keyed_random_numbers(model: nn.Module, seed: int, step: int, number: int, device: torch.device) -> Iterator[None]:
    """What is random depends on the micro-batch's number in one process, not on the rank; dropout as well.

    Args:
        step: optimizer step. number: of the micro-batch in it, in the order of one process.
    """
    set_random_key(model, seed, step, number)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(((seed * _MIX + step) * _MIX + number) % 2**63)
        yield
