"""Row movement on one device: tokens to expert order and back.

Legend: T tokens, D model dim, E experts, e local experts, r EP ranks, K top-k, R rows = kept (token, expert) pairs.

NOTE on the permutations, for all ops here:
  1. An assignment is a (token, slot) pair; its flat index is a = token * K + slot.
  2. `order_R` (the permuted indices): `order_R[i]` is the assignment in row i after the stable sort by expert.
  3. The inverse: `argsort(order_R)[a]` is the row of assignment a.
  4. Every scatter is written as a gather through the inverse, so results do not depend on the order of atomics.
  5. A dropped assignment has the id num_experts. It sorts after all others, has no row, and adds exactly zero to every
     sum. If assignments may be dropped (`dropless=False`), R is the number of rows sent according to the table of the
     exchange, or is read from the device if there is no exchange. Else R = T * K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moecompile.ops import sizes
from moecompile.ops.host import finish_read
from moecompile.ops.tokens import expert_counts


@torch.library.custom_op("moecompile::permute", mutates_args=())
def permute(
    x_TD: Tensor, ids_TK: Tensor, num_experts: int, dropless: bool = True, table_2rn: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Copies each token once per chosen expert and sorts the copies by expert.

    Returns:
        rows_RD, order_R int64 (the permuted indices, see above), counts_E int64.
    """
    order_R, counts_E = sorted_assignments(ids_TK, num_experts, dropless, table_2rn)
    return x_TD.index_select(0, order_R // ids_TK.shape[1]), order_R, counts_E


@permute.register_fake
def _(
    x_TD: Tensor, ids_TK: Tensor, num_experts: int, dropless: bool = True, table_2rn: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = ids_TK.numel() if dropless else sizes.size(lambda load: load.kept(ids_TK.numel(), num_experts))
    return x_TD.new_empty(num_rows, x_TD.shape[1]), ids_TK.new_empty(num_rows), ids_TK.new_empty(num_experts)


def _permute_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.num_tokens, ctx.top_k = inputs[1].shape
    ctx.mark_non_differentiable(output[1], output[2])


def _permute_backward(ctx: Any, grad_rows: Tensor, _order: Tensor, _counts: Tensor) -> tuple[Any, ...]:
    (order_R,) = ctx.saved_tensors
    return torch.ops.moecompile.sum_slots(grad_rows, order_R, ctx.num_tokens, ctx.top_k), None, None, None, None


permute.register_autograd(_permute_backward, setup_context=_permute_setup)


@torch.library.custom_op("moecompile::sum_slots", mutates_args=())
def sum_slots(rows_RD: Tensor, order_R: Tensor, num_tokens: int, top_k: int) -> Tensor:
    """Sums the rows of each token, (T, D): the gradient of `permute`."""
    if order_R.shape[0] < num_tokens * top_k:
        wide = torch.promote_types(rows_RD.dtype, torch.float32)
        return _sum_kept(rows_RD.to(wide), order_R, num_tokens, top_k).to(rows_RD.dtype)
    by_slot = rows_RD.index_select(0, torch.argsort(order_R))
    return by_slot.view(num_tokens, top_k, rows_RD.shape[1]).sum(1)


@sum_slots.register_fake
def _(rows_RD: Tensor, order_R: Tensor, num_tokens: int, top_k: int) -> Tensor:
    return rows_RD.new_empty(num_tokens, rows_RD.shape[1])


@torch.library.custom_op("moecompile::unpermute", mutates_args=())
def unpermute(rows_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum of the expert outputs of each token, (T, D), summed in the weights' precision."""
    num_tokens, top_k = weights_TK.shape
    if order_R.shape[0] < weights_TK.numel():
        weights_R = weights_TK.reshape(-1).index_select(0, order_R)
        out_TD = _sum_kept(rows_RD.to(weights_TK.dtype), order_R, num_tokens, top_k, weights_R)
        return out_TD.to(rows_RD.dtype)
    by_slot = rows_RD.index_select(0, torch.argsort(order_R)).view(num_tokens, top_k, rows_RD.shape[1])
    # Into a new tensor: einsum returns a view, and autograd does not allow in-place additions to views of custom ops.
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
    return grad_rows, by_assignment(grad_weights_R, order_R, weights_TK.numel()).view_as(weights_TK)


@unpermute_backward.register_fake
def _(grad_TD: Tensor, rows_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows_RD), torch.empty_like(weights_TK)


def sorted_assignments(
    ids_TK: Tensor, num_experts: int, dropless: bool, table_2rn: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """order_R and counts_E (see the note above)."""
    order_R = torch.argsort(ids_TK.reshape(-1), stable=True)
    counts_E = expert_counts(ids_TK, num_experts)
    if not dropless:
        num_rows = counts_E.sum() if table_2rn is None else finish_read(table_2rn)[0].sum()
        order_R = order_R[: int(num_rows)].clone()
    return order_R, counts_E


def by_assignment(values_R: Tensor, order_R: Tensor, num_assignments: int) -> Tensor:
    """One number per row -> one per assignment, zero for a dropped one. No element is written twice."""
    return values_R.new_zeros(num_assignments).index_copy_(0, order_R, values_R)


def sum_by(rows_RD: Tensor, index_R: Tensor, num_out: int, place_R: Tensor | None = None) -> Tensor:
    """Sum of the rows of each index, (num_out, D), in the order of R, in at least fp32 and rounded once.

    It is an embedding bag, a gather: fast, and independent of the order of atomics.

    Args:
        place_R: position of each row in `rows_RD`; None: 0 .. R - 1.
    """
    if index_R.shape[0] == 0:
        return rows_RD.new_zeros(num_out, rows_RD.shape[1])
    order_R = torch.argsort(index_R, stable=True)
    if place_R is not None:
        order_R = place_R.index_select(0, order_R)
    lengths = expert_counts(index_R, num_out)
    starts = lengths.cumsum(0) - lengths
    return F.embedding_bag(order_R.to(torch.int32), rows_RD, starts.to(torch.int32), mode="sum")


def _sum_kept(rows_RD: Tensor, order_R: Tensor, num_tokens: int, top_k: int, weights_R: Tensor | None = None) -> Tensor:
    """(Weighted) sum of the kept rows of each token in slot order, (T, D).

    It is an embedding bag, a gather that needs no memory for missing rows (with expert choice, most of T * E).
    """
    if order_R.shape[0] == 0:
        return rows_RD.new_zeros(num_tokens, rows_RD.shape[1])
    assignment_R, row_R = order_R.sort()
    lengths_T = expert_counts(assignment_R // top_k, num_tokens)
    weights_R = None if weights_R is None else weights_R.index_select(0, row_R)
    starts_T = lengths_T.cumsum(0) - lengths_T
    return F.embedding_bag(row_R, rows_RD, starts_T, mode="sum", per_sample_weights=weights_R)


@torch.library.custom_op("moecompile::regroup", mutates_args=())
def regroup(rows_RD: Tensor, counts_re: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Permutes received rows from (source rank, local expert) order to (local expert, source rank) order.

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
