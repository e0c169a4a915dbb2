"""Completes gradients window by window, whatever is zeroed or carried on in between.

A window is what is completed at once: the micro-batches of an optimizer step under automatic optimization, one
backward under manual optimization. Gradients that are there when a window begins are complete already; they are set
aside, so that nothing is summed or divided twice, and added afterwards:

    mean   grad = old + new
    sum    grad = (old * tokens_old + new * tokens) / (tokens_old + tokens): a mean over all tokens since it was zeroed
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moecompile.torch_private import local_part


@dataclass(frozen=True)
class _Mean:
    """Tokens that a gradient is the mean over; the number of the last count among them; what it was when we left it."""

    tokens: Tensor
    number: int
    version: int


class Completion:
    """Sets complete gradients aside while a window runs, and puts old and new ones together."""

    def __init__(self) -> None:
        self.is_open = False
        self._before: dict[nn.Parameter, Tensor] = {}
        self._means: dict[nn.Parameter, _Mean] = {}

    def open(self, parameters: Iterable[nn.Parameter]) -> None:
        """Begins a window: what `.grad` holds from now on is new."""
        self._before = {p: p.grad for p in parameters if p.grad is not None}
        for parameter in self._before:
            parameter.grad = None
        self.is_open = True

    def abandon(self) -> None:
        """Ends a window that nobody will complete; what was set aside is forgotten."""
        self._before, self._means, self.is_open = {}, {}, False

    def kept(self, parameters: Sequence[nn.Parameter]) -> list[bool]:
        """Of each weight, whether a gradient was set aside that, on this rank, nobody has zeroed in place."""
        return [p in self._before and not self._zeroed(p) for p in parameters]

    @torch.no_grad()
    def close(self, parameters: Sequence[nn.Parameter], tokens: Tensor | None, kept: Tensor, number: int) -> None:
        """Ends the window; `.grad` holds what is new, summed over all ranks and divided.

        Args:
            tokens: of all ranks, that sums have been divided by; None: they are means over ranks.
            kept: `kept()` summed over all ranks, (parameters,).
            number: of the count of tokens; several windows over the same tokens have the same number.
        """
        counted = None if tokens is None else tokens.double()
        was_kept = kept.tolist() if tokens is not None and self._before else [True] * len(parameters)
        for parameter, keep in zip(parameters, was_kept, strict=True):
            old, new = self._before.get(parameter), parameter.grad
            if new is None:
                parameter.grad = old
                continue
            if counted is None:
                parameter.grad = new if old is None else old.add_(new)
                continue
            mean = self._means.get(parameter) if old is not None and keep else None
            total = counted
            if old is not None and mean is not None:
                total = mean.tokens + (0 if mean.number == number else total)
                local_part(old).mul_(mean.tokens / total.clamp_min(1))
                local_part(new).mul_(counted.clamp_min(1) / total.clamp_min(1))
            parameter.grad = new if old is None else old.add_(new)
            self._means[parameter] = _Mean(total, number, _version(parameter.grad))
        self._before, self.is_open = {}, False

    @torch.no_grad()
    def _zeroed(self, parameter: nn.Parameter) -> bool:
        grad, mean = self._before[parameter], self._means.get(parameter)
        if mean is None or mean.version == _version(grad):
            return False
        return not local_part(grad).any()


@torch.no_grad()
def _version(grad: Tensor) -> int:
    """Grows whenever a value is written in place, through the DTensor or through its shard."""
    return grad._version + local_part(grad)._version
