"""Context parallelism: positions that are split over the ranks of a CP group, exchanged against heads (Ulysses).

Rank i of n has positions S / n i to S / n (i + 1) of every sequence. Attention needs all positions, but each head by
itself, so around it (Jacobs et al. 2023, arXiv 2309.14509)

    exchange_dims    q, k, v   (B, H, s, d) -> (B, H / n, S, d)      before
                     output    (B, S, H / n, d) -> (B, s, H, d)      after
    join_positions   (B, s, N) -> (B, S, N), the same on every rank: what losses over whole sequences are computed from

Backward of an exchange is the exchange back. Backward of a join takes this rank's part of the gradient, which is whole:
every rank computes the same loss.

Legend: B sequences, S positions of a sequence, s of them on this rank, H heads, d head dim, n ranks of the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moecompile.ops.exchange import group_of
from moecompile.ops.traffic import context_traffic
from moecompile.torch_private import all_gather_single


@torch.library.custom_op("moecompile::exchange_dims", mutates_args=())
def exchange_dims(x: Tensor, split: int, join: int, axis: str) -> Tensor:
    """Splits dim `split` into equal parts, sends part i to rank i, and joins the received parts along dim `join`."""
    group = group_of(axis)
    parts = torch.stack(x.chunk(group.size(), split))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    context_traffic.add(group, [parts.element_size() * parts[0].numel()] * group.size())
    return torch.cat(received.unbind(), join)


@exchange_dims.register_fake
def _(x: Tensor, split: int, join: int, axis: str) -> Tensor:
    shape, size = list(x.shape), group_of(axis).size()
    shape[split], shape[join] = shape[split] // size, shape[join] * size
    return x.new_empty(shape)


def _exchange_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.split, ctx.join, ctx.axis = inputs


def _exchange_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.moecompile.exchange_dims(grad, ctx.join, ctx.split, ctx.axis), None, None, None


exchange_dims.register_autograd(_exchange_backward, setup_context=_exchange_setup)


@torch.library.custom_op("moecompile::join_positions", mutates_args=())
def join_positions(x: Tensor, axis: str) -> Tensor:
    """The positions of all ranks in order, (..., s, N) -> (..., S, N)."""
    group = group_of(axis)
    parts = x.new_empty(group.size() * x.numel())
    all_gather_single(parts, x.reshape(-1), group)
    return torch.cat(parts.view(group.size(), *x.shape).unbind(), -2)


@join_positions.register_fake
def _(x: Tensor, axis: str) -> Tensor:
    return x.new_empty(*x.shape[:-2], x.shape[-2] * group_of(axis).size(), x.shape[-1])


@torch.library.custom_op("moecompile::own_positions", mutates_args=())
def own_positions(x: Tensor, axis: str) -> Tensor:
    """This rank's positions, (..., S, N) -> (..., s, N)."""
    group = group_of(axis)
    return x.chunk(group.size(), -2)[dist.get_rank(group)].clone(memory_format=torch.contiguous_format)


@own_positions.register_fake
def _(x: Tensor, axis: str) -> Tensor:
    return x.new_empty(*x.shape[:-2], x.shape[-2] // group_of(axis).size(), x.shape[-1])


def _join_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.axis = inputs[-1]


def _join_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.moecompile.own_positions(grad, ctx.axis), None


join_positions.register_autograd(_join_backward, setup_context=_join_setup)
