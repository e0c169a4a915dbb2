"""Tokens cut over the ranks of a TP group and joined again, and the sums between split linears.

What ranks of a TP group share is *replicated*: the same values on each of them, and the same, whole gradient. Inside
an MoE layer rank i has the tokens from ceil(T / n) i to ceil(T / n) (i + 1), so that experts compute each token once.

    cut_tokens    replicated -> slices      backward: slices of the gradient are gathered
    join_tokens   slices -> replicated      backward: each rank takes its slice of the gradient, which is whole
    sum_ranks     parts -> their sum        backward: the gradient as it is, which is the gradient of each part
    spread        replicated -> itself      backward: each rank's use gives a part of the gradient; they are summed
    join_columns  columns -> replicated     backward: each rank takes its columns
    cut_columns   replicated -> columns     backward: columns of the gradient are gathered

Legend: T tokens, t tokens of this rank, n ranks of the group, D model dim, K top-k.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moecompile.ops import sizes
from moecompile.ops.exchange import group_of
from moecompile.torch_private import all_gather_single


@torch.library.custom_op("moecompile::cut_tokens", mutates_args=())
def cut_tokens(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, axis: str) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's slice of tokens, routing weights and expert ids; empty if there are fewer tokens than ranks."""
    group = group_of(axis)
    return _rows(x_TD, group), _rows(weights_TK, group), _rows(ids_TK, group)


@cut_tokens.register_fake
def _(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, axis: str) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens = sizes.size(lambda _: _slice_of(x_TD.shape[0], group_of(axis))[1])
    x_tD, weights_tK, ids_tK = (tensor.new_empty(num_tokens, tensor.shape[1]) for tensor in (x_TD, weights_TK, ids_TK))
    return x_tD, weights_tK, ids_tK


def _cut_tokens_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.num_tokens, ctx.axis = inputs[0].shape[0], inputs[-1]
    ctx.mark_non_differentiable(output[2])


def _cut_tokens_backward(ctx: Any, grad_x: Tensor, grad_weights: Tensor, _ids: Tensor) -> tuple[Any, ...]:
    join = torch.ops.moecompile.gather_slices
    return join(grad_x, ctx.num_tokens, ctx.axis), join(grad_weights, ctx.num_tokens, ctx.axis), None, None


cut_tokens.register_autograd(_cut_tokens_backward, setup_context=_cut_tokens_setup)


@torch.library.custom_op("moecompile::join_tokens", mutates_args=())
def join_tokens(y_tD: Tensor, like_TD: Tensor, axis: str) -> Tensor:
    """The slices of all ranks in order, (T, D); `like` has the tokens that were cut."""
    return _gathered(y_tD, like_TD.shape[0], group_of(axis))


@join_tokens.register_fake
def _(y_tD: Tensor, like_TD: Tensor, axis: str) -> Tensor:
    return y_tD.new_empty(like_TD.shape[0], y_tD.shape[1])


def _join_tokens_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.num_tokens, ctx.axis = inputs[0].shape[0], inputs[-1]


def _join_tokens_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.moecompile.take_slice(grad_TD, ctx.num_tokens, ctx.axis), None, None


join_tokens.register_autograd(_join_tokens_backward, setup_context=_join_tokens_setup)


@torch.library.custom_op("moecompile::gather_slices", mutates_args=())
def gather_slices(y_tD: Tensor, num_tokens: int, axis: str) -> Tensor:
    """The slices of all ranks in order, `num_tokens` rows."""
    return _gathered(y_tD, num_tokens, group_of(axis))


@gather_slices.register_fake
def _(y_tD: Tensor, num_tokens: int, axis: str) -> Tensor:
    return y_tD.new_empty(num_tokens, y_tD.shape[1])


@torch.library.custom_op("moecompile::take_slice", mutates_args=())
def take_slice(x_TD: Tensor, num_rows: int, axis: str) -> Tensor:
    """This rank's slice, which has `num_rows` rows."""
    return _rows(x_TD, group_of(axis))


@take_slice.register_fake
def _(x_TD: Tensor, num_rows: int, axis: str) -> Tensor:
    return x_TD.new_empty(num_rows, x_TD.shape[1])


@torch.library.custom_op("moecompile::sum_ranks", mutates_args=())
def sum_ranks(x: Tensor, axis: str) -> Tensor:
    """The sum over the ranks of the axis, on each of them."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group_of(axis))
    return total


@sum_ranks.register_fake
def _(x: Tensor, axis: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _axis_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.axis = inputs[-1]


def _sum_ranks_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


sum_ranks.register_autograd(_sum_ranks_backward, setup_context=_axis_setup)


@torch.library.custom_op("moecompile::join_columns", mutates_args=())
def join_columns(y: Tensor, axis: str) -> Tensor:
    """The columns of all ranks side by side, (..., F / n) -> (..., F)."""
    group = group_of(axis)
    blocks = y.new_empty(group.size() * y.numel())
    if y.numel():
        all_gather_single(blocks, y.reshape(-1), group)
    columns = blocks.view(group.size(), *y.shape).movedim(0, -2).reshape(*y.shape[:-1], -1)
    return columns.clone() if group.size() == 1 else columns


@join_columns.register_fake
def _(y: Tensor, axis: str) -> Tensor:
    return y.new_empty(*y.shape[:-1], y.shape[-1] * group_of(axis).size())


@torch.library.custom_op("moecompile::cut_columns", mutates_args=())
def cut_columns(x: Tensor, axis: str) -> Tensor:
    """This rank's columns, (..., F) -> (..., F / n)."""
    group = group_of(axis)
    width = x.shape[-1] // group.size()
    return x.narrow(-1, width * dist.get_rank(group), width).clone(memory_format=torch.contiguous_format)


@cut_columns.register_fake
def _(x: Tensor, axis: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // group_of(axis).size())


def _join_columns_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.moecompile.cut_columns(grad, ctx.axis), None


def _cut_columns_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.moecompile.join_columns(grad, ctx.axis), None


join_columns.register_autograd(_join_columns_backward, setup_context=_axis_setup)
cut_columns.register_autograd(_cut_columns_backward, setup_context=_axis_setup)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.ops.moecompile.sum_ranks(grad, ctx.axis), None


def spread(x: Tensor, axis: str) -> Tensor:
    """x, which each rank uses for a part of the result; not an op, because its result is its input."""
    out: Tensor = _Spread.apply(x, axis)  # type: ignore[no-untyped-call]
    return out


def _slice_size(num_tokens: int, group: dist.ProcessGroup) -> int:
    return -(-num_tokens // group.size())


def _slice_of(num_tokens: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """(first token, number) of this rank's slice."""
    size = _slice_size(num_tokens, group)
    start = min(size * dist.get_rank(group), num_tokens)
    return start, min(size, num_tokens - start)


def _rows(x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    start, size = _slice_of(x_TD.shape[0], group)
    return x_TD[start : start + size].clone(memory_format=torch.contiguous_format)


def _gathered(y_tD: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    """The last slices may be short: they are sent padded, and the padding is at the end of the result."""
    size = _slice_size(num_tokens, group)
    padded, blocks = y_tD, y_tD.new_empty(size * group.size(), y_tD.shape[1])
    if y_tD.shape[0] < size:
        padded = y_tD.new_zeros(size, y_tD.shape[1])
        padded[: y_tD.shape[0]] = y_tD
    if blocks.numel():  # all ranks agree on this
        all_gather_single(blocks, padded.contiguous(), group)
    return blocks[:num_tokens].clone() if num_tokens < blocks.shape[0] else blocks
