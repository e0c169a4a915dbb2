"""Row movement on one device: tokens to expert order and back.

Legend: T tokens, D model dim, E experts, e local experts, r EP ranks, K top-k, R rows = (token, expert) pairs.

NOTE on the permutations, once for all ops here:
  1. An assignment is a (token, slot) pair; its flat index is a = token * K + slot.
  2. `order_R[i]` is the assignment that stands at row i after the stable sort by expert.
  3. The inverse, `argsort(order_R)[a]`, is the row at which assignment a stands.
  4. Every scatter is written as a gather through the inverse, so results do not depend on the order of atomics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moecompile.ops.tokens import expert_counts


@torch.library.custom_op("moecompile::permute", mutates_args=())
def permute(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Copies each token once per chosen expert and sorts the copies by expert.

    Returns:
        rows_RD (R = T * K), order_R int64 (see the note above), counts_E int64.
    """
    order_R = torch.argsort(ids_TK.reshape(-1), stable=True)
    rows_RD = x_TD.index_select(0, order_R // ids_TK.shape[1])
    return rows_RD, order_R, expert_counts(ids_TK, num_experts)


@permute.register_fake
def _(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = ids_TK.numel()
    return x_TD.new_empty(num_rows, x_TD.shape[1]), ids_TK.new_empty(num_rows), ids_TK.new_empty(num_experts)


def _permute_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.top_k = inputs[1].shape[1]
    ctx.mark_non_differentiable(output[1], output[2])


def _permute_backward(ctx: Any, grad_rows: Tensor, _order: Tensor, _counts: Tensor) -> tuple[Tensor, None, None]:
    (order_R,) = ctx.saved_tensors
    return torch.ops.moecompile.sum_slots(grad_rows, order_R, ctx.top_k), None, None


permute.register_autograd(_permute_backward, setup_context=_permute_setup)


@torch.library.custom_op("moecompile::sum_slots", mutates_args=())
def sum_slots(rows_RD: Tensor, order_R: Tensor, top_k: int) -> Tensor:
    """Sums the K rows of each token, (T, D): the gradient of `permute`."""
    by_slot = rows_RD.index_select(0, torch.argsort(order_R))
    return by_slot.view(-1, top_k, rows_RD.shape[1]).sum(1)


@sum_slots.register_fake
def _(rows_RD: Tensor, order_R: Tensor, top_k: int) -> Tensor:
    return rows_RD.new_empty(rows_RD.shape[0] // top_k, rows_RD.shape[1])


@torch.library.custom_op("moecompile::unpermute", mutates_args=())
def unpermute(rows_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum of the K expert outputs of each token, (T, D), summed in the weights' precision."""
    num_tokens, top_k = weights_TK.shape
    by_slot = rows_RD.index_select(0, torch.argsort(order_R)).view(num_tokens, top_k, rows_RD.shape[1])
    # Into a tensor of its own: a view (of which einsum makes one) cannot be added to in place under autograd.
    out_TD = weights_TK.new_empty(num_tokens, rows_RD.shape[1])
    torch.bmm(weights_TK.unsqueeze(1), by_slot.to(weights_TK.dtype), out=out_TD.unsqueeze(1))
    return out_TD.to(rows_RD.dtype)


@unpermute.register_fake
def _(rows_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> Tensor:
    return rows_RD.new_empty(weights_TK.shape[0], rows_RD.shape[1])


def _unpermute_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _unpermute_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, Tensor]:
    rows_RD, order_R, weights_TK = ctx.saved_tensors
    grad_rows, grad_weights = torch.ops.moecompile.unpermute_backward(grad_TD, rows_RD, order_R, weights_TK)
    return grad_rows, None, grad_weights


unpermute.register_autograd(_unpermute_backward, setup_context=_unpermute_setup)


@torch.library.custom_op("moecompile::unpermute_backward", mutates_args=())
def unpermute_backward(grad_TD: Tensor, rows_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `unpermute`: grad_rows_RD[i] = w[a] * grad[token], grad_w[a] = <row of a, grad[token]>."""
    wide = grad_TD.to(weights_TK.dtype).index_select(0, order_R // weights_TK.shape[1])
    weights_R = weights_TK.reshape(-1).index_select(0, order_R)
    grad_rows = (wide * weights_R.unsqueeze(1)).to(rows_RD.dtype)
    grad_weights_R = (rows_RD.to(weights_TK.dtype) * wide).sum(1)
    return grad_rows, grad_weights_R.index_select(0, torch.argsort(order_R)).view_as(weights_TK)


@unpermute_backward.register_fake
def _(grad_TD: Tensor, rows_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows_RD), torch.empty_like(weights_TK)


@torch.library.custom_op("moecompile::regroup", mutates_args=())
def regroup(rows_RD: Tensor, counts_re: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Received rows, which stand by (source rank, local expert), to (local expert, source rank) order.

    Args:
        rows_RD: received rows. counts_re: rows from each rank for each local expert, int64.

    Returns:
        rows_RD in expert order, order_R int64 (row -> received row), counts_e int64.
    """
    num_ranks, num_local = counts_re.shape
    experts = torch.arange(num_local, device=counts_re.device).repeat(num_ranks)
    expert_R = experts.repeat_interleave(counts_re.reshape(-1), output_size=rows_RD.shape[0])
    order_R = torch.argsort(expert_R, stable=True)
    return rows_RD.index_select(0, order_R), order_R, counts_re.sum(0)


@regroup.register_fake
def _(rows_RD: Tensor, counts_re: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    order_R = counts_re.new_empty(rows_RD.shape[0])
    return torch.empty_like(rows_RD), order_R, counts_re.new_empty(counts_re.shape[1])


def _regroup_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1], output[2])


def _regroup_backward(ctx: Any, grad_rows: Tensor, _order: Tensor, _counts: Tensor) -> tuple[Tensor, None]:
    (order_R,) = ctx.saved_tensors
    return torch.ops.moecompile.ungroup(grad_rows, order_R), None


regroup.register_autograd(_regroup_backward, setup_context=_regroup_setup)


@torch.library.custom_op("moecompile::ungroup", mutates_args=())
def ungroup(rows_RD: Tensor, order_R: Tensor) -> Tensor:
    """The inverse of `regroup`: rows back to the order in which they were received."""
    return rows_RD.index_select(0, torch.argsort(order_R))


@ungroup.register_fake
def _(rows_RD: Tensor, order_R: Tensor) -> Tensor:
    return torch.empty_like(rows_RD)


def _ungroup_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _ungroup_backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None]:
    (order_R,) = ctx.saved_tensors
    return grad_rows.index_select(0, order_R), None


ungroup.register_autograd(_ungroup_backward, setup_context=_ungroup_setup)
