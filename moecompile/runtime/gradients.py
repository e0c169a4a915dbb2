"""Sums, divides and clips gradients between backward and the optimizer step, for weights on several meshes.

FSDP2 has already summed the gradients of sharded weights (divide factor 1). Replicated weights (routers, and those
outside the compiled model) are summed here; then all are divided once and clipped by one global norm. Groups are those
of `moecompile.runtime.groups`.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moecompile.torch_private import local_part


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
    for grad in _local_grads(parameters):
        grad.div_(divisor)


@torch.no_grad()
def all_finite(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Whether all gradients of this rank are finite, as a tensor, without a host sync."""
    norms = [grad.norm().double() for grad in _local_grads(parameters)]
    return torch.stack(norms).isfinite().all() if norms else torch.tensor(True)


@torch.no_grad()
def clip_by_global_norm(parameters: Iterable[nn.Parameter], max_norm: float, every: dist.ProcessGroup) -> Tensor:
    """Clips by one L2 norm over all weights of all meshes, as `torch.nn.utils.clip_grad_norm_` does in one process.

    Each entry counts once: the squares of a shard are divided by the number of ranks that hold the same shard, then
    summed over all ranks.

    Args:
        every: `Groups.every`, the ranks that together hold all shards.

    Returns:
        the norm before clipping, float64, equal on all ranks.
    """
    parameters = [p for p in parameters if p.grad is not None]
    world = dist.get_world_size(every)
    total = torch.zeros((), dtype=torch.float64, device=parameters[0].device if parameters else None)
    for parameter, grad in zip(parameters, _local_grads(parameters), strict=True):
        if grad.numel():
            norm = torch.linalg.vector_norm(grad, dtype=torch.float64)  # one copy at most, not two
            total += norm.square() * (_num_shards(parameter) / world)
    if world > 1:
        dist.all_reduce(total, group=every)
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in _local_grads(parameters):
        grad.mul_(scale.to(grad.dtype))
    return norm


@torch.no_grad()
def clip_by_value(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Clips each entry to [-limit, limit]; torch's own clipping cannot mix DTensors with plain tensors."""
    for grad in _local_grads(parameters):
        grad.clamp_(-limit, limit)


def _num_shards(parameter: Tensor) -> int:
    """Number of different shards of a weight; world size / this is the number of ranks with the same shard."""
    if not isinstance(parameter, DTensor):
        return 1
    sizes = parameter.device_mesh.shape
    return prod(
        size for size, placement in zip(sizes, parameter.placements, strict=True) if not placement.is_replicate()
    )


def _local_grads(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [local_part(p.grad) for p in parameters if p.grad is not None]
