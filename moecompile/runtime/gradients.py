"""Sums, divides and clips gradients between backward and the optimizer step, for weights on several meshes.

FSDP2 has already summed the gradients of sharded weights (divide factor 1). Replicated weights (routers, and those
outside the compiled model) are summed here; then all are divided once and clipped by one global norm. Groups are those
of `moecompile.runtime.groups`.

Gradients of a window are finished together: the micro-batches of an optimizer step with automatic optimization, one
backward with manual optimization. Gradients from before the window are finished already; they are set aside, so that
nothing is summed or divided twice, and added afterwards:

    mean   grad = old + new
    sum    grad = (old * tokens_old + new * tokens) / (tokens_old + tokens): a mean over all tokens since it was zeroed
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moecompile.ops.lookups import row_gradients
from moecompile.torch_private import device_of, local_part, version_of


@torch.no_grad()
def sum_replicated(parameters: Iterable[nn.Parameter], tokens: dist.ProcessGroup) -> None:
    """Sums the gradients of plain (not DTensor) weights over ranks with different tokens, in place, in fp32 or wider.

    A weight without a gradient on this rank contributes zeros, so that all ranks send the same sizes. A weight without
    a gradient on any rank keeps None, as in one process: with zeros, an optimizer would decay it. Of one rank, nothing
    is summed, and nothing is copied.

    Args:
        tokens: `Groups.tokens`. Ranks that share tokens compute the same gradient.
    """
    if dist.get_world_size(tokens) == 1:
        return
    plain = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    for wide in dict.fromkeys(_wide(p.dtype) for p in plain):
        of_dtype = [p for p in plain if _wide(p.dtype) == wide]
        # Flags for the existence of gradients are sent after the gradients.
        flags = torch.tensor([p.grad is not None for p in of_dtype], dtype=wide, device=of_dtype[0].device)
        grads = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in of_dtype]
        flat = torch.cat([*(grad.reshape(-1).to(wide) for grad in grads), flags])
        dist.all_reduce(flat, group=tokens)
        *sums, holders = flat.split([*(grad.numel() for grad in grads), len(grads)])
        for grad, summed in zip(grads, sums, strict=True):
            grad.copy_(summed.view_as(grad))
        if lacking := [i for i, p in enumerate(of_dtype) if p.grad is None]:  # else there is no host sync
            for i, has_grad in zip(lacking, holders[lacking].tolist(), strict=True):
                of_dtype[i].grad = grads[i] if has_grad else None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients of this dtype are summed."""
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def divide(parameters: Iterable[nn.Parameter], divisor: float | Tensor) -> None:
    """Divides all gradients, in place."""
    for _, grad in local_grads(parameters):
        grad.div_(divisor)


@torch.no_grad()
def all_finite(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Whether all gradients of this rank are finite, as a tensor, without a host sync."""
    # The largest entries: squares of large ones would overflow.
    largest = [torch.linalg.vector_norm(g, torch.inf).double() for _, g in local_grads(parameters) if g.numel()]
    return torch.stack(largest).isfinite().all() if largest else torch.tensor(True)


@torch.no_grad()
def clip_by_global_norm(
    parameters: Iterable[nn.Parameter], max_norm: float, every: dist.ProcessGroup, *, stages: int = 1,
    uncounted: Collection[nn.Parameter] = (),
) -> Tensor:  # fmt: skip
    """Clips by one L2 norm over all weights of all meshes, as `torch.nn.utils.clip_grad_norm_` does in one process.

    Each entry counts once: the squares of a shard are divided by the number of ranks that hold the same shard, then
    summed over all ranks.

    Args:
        every: `Groups.every`, the ranks that together hold all shards.
        stages: ranks along pp, which hold different weights.
        uncounted: weights that are also on another stage, where they count.

    Returns:
        the norm before clipping, float64, equal on all ranks.
    """
    graded = local_grads(parameters)
    world = dist.get_world_size(every)
    holders = world // stages
    total = torch.zeros((), dtype=torch.float64, device=graded[0][1].device if graded else device_of(every))
    for parameter, grad in graded:
        if grad.numel() and parameter not in uncounted:
            norm = torch.linalg.vector_norm(grad, dtype=torch.float64)  # one copy at most, not two
            total += norm.square() * (_num_shards(parameter) / holders)
    if world > 1:
        dist.all_reduce(total, group=every)
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for _, grad in graded:
        grad.mul_(scale.to(grad.dtype))
    return norm


@torch.no_grad()
def clip_by_value(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Clips each entry to [-limit, limit]; torch's own clipping cannot mix DTensors with plain tensors."""
    for _, grad in local_grads(parameters):
        grad.clamp_(-limit, limit)


def _num_shards(parameter: Tensor) -> int:
    """Number of different shards of a weight; ranks of its stage / this is the number of ranks with the same shard."""
    if not isinstance(parameter, DTensor):
        return 1
    sizes = parameter.device_mesh.shape
    return prod(
        size for size, placement in zip(sizes, parameter.placements, strict=True) if not placement.is_replicate()
    )


def local_grads(parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
    """Weights with a gradient, each with this rank's part of it; of a table by rows, with those of the rows."""
    graded = list[tuple[nn.Parameter, Tensor]]()
    for parameter in parameters:
        if (rows := row_gradients(parameter)) is not None and rows.exist:
            graded.append((parameter, rows.summed_VD))
        elif parameter.grad is not None:
            graded.append((parameter, local_part(parameter.grad)))
    return graded


def forget(parameters: Iterable[nn.Parameter]) -> None:
    """Removes all gradients."""
    for parameter in parameters:
        parameter.grad = None
        if (rows := row_gradients(parameter)) is not None:
            rows.clear()


def set_aside(parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """Removes all gradients; what is returned gives them back."""
    grads, of_rows = dict[nn.Parameter, Tensor](), list[Callable[[], object]]()
    for parameter in parameters:
        if parameter.grad is not None:
            grads[parameter], parameter.grad = parameter.grad, None
        if (rows := row_gradients(parameter)) is not None:
            of_rows.append(partial(rows.exchange, rows.exchange([])))

    def give_back() -> None:
        for parameter, grad in grads.items():
            parameter.grad = grad
        for give in of_rows:
            give()

    return give_back


@torch.no_grad()
def gradient_of(parameter: nn.Parameter) -> Tensor | None:
    """The gradient of a weight, of a table that of all rows; None: it has none."""
    rows = row_gradients(parameter)
    return rows.whole(parameter) if rows is not None and rows.exist else parameter.grad


class WideSums:
    """Sums over micro-batches, in fp32, of reduced gradients of weights that are narrower: of bf16 weights each sum of
    two gradients would be rounded to bf16.
    """

    def __init__(self) -> None:
        self._sums: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds the gradients of sharded narrow weights to the sums, and removes them."""
        for parameter in parameters:
            grad = parameter.grad
            if isinstance(grad, DTensor) and _wide(grad.dtype) != grad.dtype:
                local = local_part(grad)
                if parameter in self._sums:
                    self._sums[parameter] += local
                else:
                    self._sums[parameter] = local.to(_wide(grad.dtype))
                parameter.grad = None

    @torch.no_grad()
    def give(self) -> None:
        """Makes the gradients the sums with what they are now, rounded once."""
        for parameter, summed in self._sums.items():
            if parameter.grad is None:
                assert isinstance(parameter, DTensor)
                parameter.grad = torch.zeros_like(parameter)
            local = local_part(parameter.grad)
            local.copy_(summed.add_(local))
        self._sums = {}


@dataclass(frozen=True)
class _Mean:
    """A gradient that is a mean over `tokens`. number: of the last count in it. version: of the tensor at that time."""

    tokens: Tensor
    number: int
    version: int


class FinishGradients:
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
    return version_of(grad) + version_of(local_part(grad))
