"""Completes gradients window by window, also if gradients are zeroed or kept between windows.

The gradients of a window are completed together: the micro-batches of an optimizer step with automatic optimization,
one backward with manual optimization. Gradients from before the window are complete already; they are set aside, so
that nothing is summed or divided twice, and added afterwards:

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
    """A gradient that is a mean over `tokens`. number: of the last count in it. version: of the tensor at that time."""

    tokens: Tensor
    number: int
    version: int


class Completion:
    """Sets complete gradients aside during a window, and combines old and new gradients afterwards."""

    def __init__(self) -> None:
        self.is_open = False
        self._before: dict[nn.Parameter, Tensor] = {}
        self._means: dict[nn.Parameter, _Mean] = {}

    def open(self, parameters: Iterable[nn.Parameter]) -> None:
        """Begins a window: `.grad` has only new gradients from now on."""
        self._before = {p: p.grad for p in parameters if p.grad is not None}
        for parameter in self._before:
            parameter.grad = None
        self.is_open = True

    def abandon(self) -> None:
        """Ends a window without completing it; gradients that were set aside are dropped."""
        self._before, self._means, self.is_open = {}, {}, False

    def kept(self, parameters: Sequence[nn.Parameter]) -> list[bool]:
        """For each weight, whether a gradient was set aside that has not been zeroed in place on this rank."""
        return [p in self._before and not self._zeroed(p) for p in parameters]

    @torch.no_grad()
    def close(self, parameters: Sequence[nn.Parameter], tokens: Tensor | None, kept: Tensor, number: int) -> None:
        """Ends the window; `.grad` has the new gradients, summed over all ranks and divided.

        Args:
            tokens: of all ranks, by which sums have been divided; None: gradients are means over ranks.
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
    """A version that grows with every in-place write, to the DTensor or to its shard."""
    return grad._version + local_part(grad)._version
