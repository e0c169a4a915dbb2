"""Row movement of the `allgather` dispatch: each rank gets the tokens of its EP group and computes its own experts.

Legend: T tokens, N of them with an expert, D model dim, K top-k, r EP ranks, M the most of any rank's N,
G = r * M rows gathered, B assignments to experts of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moecompile.ops import sizes
from moecompile.ops.host import finish_read
from moecompile.ops.layout import by_assignment
from moecompile.ops.tokens import expert_counts

_PADDING = -1  # expert id of padding, which no rank has


@torch.library.custom_op("moecompile::count_gathered", mutates_args=())
def count_gathered(ids_TK: Tensor, num_experts: int, num_ranks: int) -> Tensor:
    """Counts to send to each rank, counts_r3 int64: tokens with an expert, assignments to the other, its first expert.

    Every rank sends the same third number, so that the graph need not know the rank that runs it.
    """
    per_rank = num_experts // num_ranks
    rank_TK = torch.div(ids_TK, per_rank, rounding_mode="floor")  # dropped: num_ranks
    assigned_r = expert_counts(rank_TK, num_ranks + 1)[:num_ranks]
    first_r = torch.arange(num_ranks, device=ids_TK.device) * per_rank
    return torch.stack((_has_expert(ids_TK, num_experts).sum().expand_as(first_r), assigned_r, first_r), dim=1)


@count_gathered.register_fake
def _(ids_TK: Tensor, num_experts: int, num_ranks: int) -> Tensor:
    return ids_TK.new_empty(num_ranks, 3)


@torch.library.custom_op("moecompile::own_tokens", mutates_args=())
def own_tokens(ids_TK: Tensor, table_2r3: Tensor, num_experts: int) -> Tensor:
    """Which tokens have an expert and so are gathered, own_N int64; padding and wholly dropped tokens have none."""
    num_own, num_tokens = int(finish_read(table_2r3)[0, 0, 0]), ids_TK.shape[0]
    if num_own == num_tokens:
        return torch.arange(num_tokens, device=ids_TK.device)
    # `nonzero` would cause a host sync, to get the size of its result.
    return torch.argsort(~_has_expert(ids_TK, num_experts), stable=True)[:num_own].clone()


@own_tokens.register_fake
def _(ids_TK: Tensor, table_2r3: Tensor, num_experts: int) -> Tensor:
    return ids_TK.new_empty(sizes.size(lambda _: ids_TK.shape[0]), dtype=torch.int64)


@torch.library.custom_op("moecompile::pad_tokens", mutates_args=())
def pad_tokens(
    x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, own_N: Tensor, table_2r3: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Takes a rank's own tokens and pads them to the most that a rank of the group has with rows without an expert.

    Returns:
        x_MD, weights_MK, ids_MK int16.
    """
    most = int(finish_read(table_2r3)[1, :, 0].max())
    ids_MK = _take_padded(ids_TK.to(torch.int16), own_N, most, _PADDING)
    return _take_padded(x_TD, own_N, most), _take_padded(weights_TK, own_N, most), ids_MK


@pad_tokens.register_fake
def _(
    x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, own_N: Tensor, table_2r3: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    size = sizes.size(lambda _: own_N.shape[0])
    return (
        x_TD.new_empty(size, x_TD.shape[1]),
        weights_TK.new_empty(size, weights_TK.shape[1]),
        ids_TK.new_empty(size, ids_TK.shape[1], dtype=torch.int16),
    )


def _pad_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.num_tokens = inputs[0].shape[0]
    ctx.save_for_backward(inputs[3])
    ctx.mark_non_differentiable(output[2])


def _pad_backward(ctx: Any, grad_x: Tensor, grad_weights: Tensor, _ids: Any) -> tuple[Any, ...]:
    (own_N,) = ctx.saved_tensors
    spread, like_T0 = torch.ops.moecompile.spread_tokens, grad_x.new_empty(ctx.num_tokens, 0)
    return spread(grad_x, own_N, like_T0), spread(grad_weights, own_N, like_T0), None, None, None


pad_tokens.register_autograd(_pad_backward, setup_context=_pad_setup)


@torch.library.custom_op("moecompile::spread_tokens", mutates_args=())
def spread_tokens(y_MD: Tensor, own_N: Tensor, like_TD: Tensor) -> Tensor:
    """The rows of a rank's own tokens, each at its place in the micro-batch, (T, D); tokens without an expert get 0.

    like_TD: gives their number.
    """
    num_own, num_tokens = own_N.shape[0], like_TD.shape[0]
    if num_own == num_tokens:  # all of them, in order
        return y_MD[:num_own].clone()
    return y_MD.new_zeros(num_tokens, y_MD.shape[1]).index_copy_(0, own_N, y_MD[:num_own])


@spread_tokens.register_fake
def _(y_MD: Tensor, own_N: Tensor, like_TD: Tensor) -> Tensor:
    return y_MD.new_empty(like_TD.shape[0], y_MD.shape[1])


def _spread_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.num_rows = inputs[0].shape[0]
    ctx.save_for_backward(inputs[1])


def _spread_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.moecompile.own_block(grad_TD, ctx.saved_tensors[0], ctx.num_rows), None, None


spread_tokens.register_autograd(_spread_backward, setup_context=_spread_setup)


@torch.library.custom_op("moecompile::own_block", mutates_args=())
def own_block(rows_TD: Tensor, own_N: Tensor, num_rows: int) -> Tensor:
    """The backward of `spread_tokens`: rows[own], then zeros, (num_rows, D)."""
    return _take_padded(rows_TD, own_N, num_rows)


@own_block.register_fake
def _(rows_TD: Tensor, own_N: Tensor, num_rows: int) -> Tensor:
    return rows_TD.new_empty(num_rows, rows_TD.shape[1])


@torch.library.custom_op("moecompile::take_local", mutates_args=())
def take_local(
    rows_GD: Tensor, weights_GK: Tensor, ids_GK: Tensor, received_r3: Tensor, table_2r3: Tensor, num_local: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Copies each gathered row once per expert of this rank that it chose and sorts the copies by local expert.

    Args:
        received_r3, table_2r3: the exchanged results of `count_gathered`.

    Returns:
        rows_BD, weights_B, source_B int64 (copy -> gathered row), order_B int64 (copy -> flat assignment), counts_e.
    """
    source_B, order_B, counts_e = local_assignments(ids_GK, received_r3, table_2r3, num_local)
    weights_B = weights_GK.reshape(-1).index_select(0, order_B)
    return rows_GD.index_select(0, source_B), weights_B, source_B, order_B, counts_e


@take_local.register_fake
def _(
    rows_GD: Tensor, weights_GK: Tensor, ids_GK: Tensor, received_r3: Tensor, table_2r3: Tensor, num_local: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_ranks = received_r3.shape[0]
    size = sizes.size(lambda load: load.computed(ids_GK.numel(), num_ranks * num_local, num_ranks))
    index = received_r3.new_empty(size)
    return (
        rows_GD.new_empty(size, rows_GD.shape[1]),
        weights_GK.new_empty(size),
        index,
        torch.empty_like(index),
        received_r3.new_empty(num_local),
    )


def _take_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2], output[3])
    ctx.num_rows, ctx.num_assignments, ctx.weights_shape = inputs[0].shape[0], inputs[1].numel(), inputs[1].shape
    ctx.mark_non_differentiable(output[2], output[3], output[4])


def _take_backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor, *_: Any) -> tuple[Any, ...]:
    source_B, order_B = ctx.saved_tensors
    grad_x = torch.ops.moecompile.sum_rows(grad_rows, source_B, ctx.num_rows)
    grad_w = by_assignment(grad_weights, order_B, ctx.num_assignments)
    return grad_x, grad_w.view(ctx.weights_shape), None, None, None, None


take_local.register_autograd(_take_backward, setup_context=_take_setup)


def local_assignments(
    ids_GK: Tensor, received_r3: Tensor, table_2r3: Tensor, num_local: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Assignments to this rank by local expert: source_B (-> gathered row), order_B (-> flat assignment), counts_e."""
    local_A = (ids_GK.to(torch.int64) - received_r3[0, 2]).reshape(-1)
    local_A = torch.where((local_A >= 0) & (local_A < num_local), local_A, num_local)  # experts of other ranks: last
    num_assigned = int(finish_read(table_2r3)[1, :, 1].sum())
    order_B = torch.argsort(local_A, stable=True)[:num_assigned].clone()
    source_B = torch.div(order_B, ids_GK.shape[1], rounding_mode="floor")
    return source_B, order_B, expert_counts(local_A, num_local + 1)[:num_local].clone()


def _has_expert(ids_TK: Tensor, num_experts: int) -> Tensor:
    return (ids_TK < num_experts).any(1)


def _take_padded(rows_TD: Tensor, own_N: Tensor, most: int, value: float = 0.0) -> Tensor:
    """rows[own], and rows of `value` up to `most`."""
    taken, missing = rows_TD.index_select(0, own_N), most - own_N.shape[0]
    return F.pad(taken, (0, 0, 0, missing), value=value) if missing else taken
