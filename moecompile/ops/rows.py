"""Row movement of the `dedup` dispatch: one row per (token, destination rank), partial sums back.

Legend: T tokens, D model dim, K top-k, r EP ranks, e local experts, U rows sent, V rows received,
A assignments sent (those that are kept), B assignments received.

NOTE on the wire format:
  1. Rows stand by (destination rank, token); `tokens_U` names each row's token on the sender.
  2. Assignments stand by (destination rank, token, slot), so those of one row are neighbours.
  3. An assignment's int16 code is 2 * local expert + (1 if it is the first of its row). The receiver finds the row of
     an assignment as the running sum of the first-of-row bits: no row numbers travel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moecompile.ops.layout import by_assignment
from moecompile.ops.tokens import expert_counts


@torch.library.custom_op("moecompile::pack_rows", mutates_args=())
def pack_rows(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, num_ranks: int, dropless: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Builds what each rank is sent (see the note above). The id num_experts is a dropped assignment: it is not sent.

    Args:
        dropless: no assignment is dropped, so that A = T * K is known without reading it from the device.

    Returns:
        rows_UD, tokens_U int64, weights_A, codes_A int16, order_A int64 (place -> flat assignment),
        counts_r2 int64 (rows and assignments per destination rank).
    """
    num_tokens, top_k = ids_TK.shape
    per_rank = num_experts // num_ranks
    rank_A = torch.div(ids_TK, per_rank, rounding_mode="floor").reshape(-1)  # num_ranks for a dropped assignment
    token_A = torch.arange(num_tokens, device=ids_TK.device).repeat_interleave(top_k)
    key_A, order_A = torch.sort(rank_A * num_tokens + token_A, stable=True)
    first_A = torch.ones_like(key_A, dtype=torch.bool)
    first_A[1:] = key_A[1:] != key_A[:-1]
    if dropless:
        key_U = key_A[first_A]
    else:
        kept_A = key_A < num_ranks * num_tokens
        first_A &= kept_A
        num_rows, num_kept = torch.stack((first_A.sum(), kept_A.sum())).tolist()
        key_U = key_A.index_select(0, torch.nonzero_static(first_A, size=num_rows).squeeze(1))
        order_A, first_A = order_A[:num_kept].clone(), first_A[:num_kept]
    tokens_U = key_U % num_tokens
    local_A = (ids_TK % per_rank).reshape(-1).index_select(0, order_A)
    codes_A = (2 * local_A + first_A).to(torch.int16)
    counts_r2 = torch.stack(
        (
            expert_counts(torch.div(key_U, num_tokens, rounding_mode="floor"), num_ranks),
            expert_counts(rank_A, num_ranks),
        ),
        dim=1,
    )
    weights_A = weights_TK.reshape(-1).index_select(0, order_A)
    return x_TD.index_select(0, tokens_U), tokens_U, weights_A, codes_A, order_A, counts_r2


@pack_rows.register_fake
def _(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, num_ranks: int, dropless: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    ctx = torch.library.get_ctx()
    num_rows, num_assignments = ctx.new_dynamic_size(), ids_TK.numel() if dropless else ctx.new_dynamic_size()
    return (
        x_TD.new_empty(num_rows, x_TD.shape[1]),
        ids_TK.new_empty(num_rows),
        weights_TK.new_empty(num_assignments),
        ids_TK.new_empty(num_assignments, dtype=torch.int16),
        ids_TK.new_empty(num_assignments),
        ids_TK.new_empty(num_ranks, 2),
    )


def _pack_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], output[4])
    ctx.num_tokens, ctx.top_k = inputs[1].shape
    ctx.mark_non_differentiable(output[1], output[3], output[4], output[5])


def _pack_backward(ctx: Any, grad_rows: Tensor, _t: Any, grad_weights: Tensor, *_: Any) -> tuple[Any, ...]:
    tokens_U, order_A = ctx.saved_tensors
    grad_x = torch.ops.moecompile.sum_rows(grad_rows, tokens_U, ctx.num_tokens)
    grad_w = by_assignment(grad_weights, order_A, ctx.num_tokens * ctx.top_k).view(ctx.num_tokens, ctx.top_k)
    return grad_x, None, grad_w, None, None, None


pack_rows.register_autograd(_pack_backward, setup_context=_pack_setup)


@torch.library.custom_op("moecompile::sum_rows", mutates_args=())
def sum_rows(rows_UD: Tensor, index_U: Tensor, num_out: int) -> Tensor:
    """out[index_U[i]] += rows_UD[i], (num_out, D), summed in at least fp32 and rounded once."""
    wide = rows_UD.to(torch.promote_types(rows_UD.dtype, torch.float32))
    return wide.new_zeros(num_out, rows_UD.shape[1]).index_add_(0, index_U, wide).to(rows_UD.dtype)


@sum_rows.register_fake
def _(rows_UD: Tensor, index_U: Tensor, num_out: int) -> Tensor:
    return rows_UD.new_empty(num_out, rows_UD.shape[1])


@torch.library.custom_op("moecompile::expand_rows", mutates_args=())
def expand_rows(
    rows_VD: Tensor, weights_B: Tensor, codes_B: Tensor, num_local: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Copies each received row once per assignment and sorts the copies by local expert.

    Returns:
        rows_BD, weights_B, source_B int64 (copy -> received row), order_B int64 (copy -> assignment), counts_e int64.
    """
    source_B, order_B, counts_e = sorted_codes(codes_B, num_local)
    weights = weights_B.index_select(0, order_B)
    return rows_VD.index_select(0, source_B), weights, source_B, order_B, counts_e


@expand_rows.register_fake
def _(
    rows_VD: Tensor, weights_B: Tensor, codes_B: Tensor, num_local: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    size = codes_B.shape[0]
    index = codes_B.new_empty(size, dtype=torch.int64)
    return (
        rows_VD.new_empty(size, rows_VD.shape[1]),
        torch.empty_like(weights_B),
        index,
        torch.empty_like(index),
        codes_B.new_empty(num_local, dtype=torch.int64),
    )


def _expand_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2], output[3])
    ctx.num_rows = inputs[0].shape[0]
    ctx.mark_non_differentiable(output[2], output[3], output[4])


def _expand_backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor, *_: Any) -> tuple[Any, ...]:
    source_B, order_B = ctx.saved_tensors
    grad = torch.ops.moecompile.sum_rows(grad_rows, source_B, ctx.num_rows)
    return grad, grad_weights.index_select(0, torch.argsort(order_B)), None, None


expand_rows.register_autograd(_expand_backward, setup_context=_expand_setup)


def sorted_codes(codes_B: Tensor, num_local: int) -> tuple[Tensor, Tensor, Tensor]:
    """Received assignments by local expert: source_B (-> received row), order_B (-> assignment), counts_e."""
    codes = codes_B.to(torch.int64)
    expert_B, row_B = codes >> 1, (codes & 1).cumsum(0) - 1
    order_B = torch.argsort(expert_B, stable=True)
    return row_B.index_select(0, order_B), order_B, expert_counts(expert_B, num_local)


@torch.library.custom_op("moecompile::reduce_rows", mutates_args=())
def reduce_rows(rows_BD: Tensor, weights_B: Tensor, source_B: Tensor, like_VD: Tensor) -> Tensor:
    """Weighted sum of the expert outputs of each received row, (V, D); `like_VD` gives the number of rows."""
    weighted = rows_BD.to(weights_B.dtype) * weights_B.unsqueeze(1)
    out = weighted.new_zeros(like_VD.shape[0], rows_BD.shape[1]).index_add_(0, source_B, weighted)
    return out.to(rows_BD.dtype)


@reduce_rows.register_fake
def _(rows_BD: Tensor, weights_B: Tensor, source_B: Tensor, like_VD: Tensor) -> Tensor:
    return rows_BD.new_empty(like_VD.shape[0], rows_BD.shape[1])


def _reduce_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _reduce_backward(ctx: Any, grad_VD: Tensor) -> tuple[Tensor, Tensor, None, None]:
    rows_BD, weights_B, source_B = ctx.saved_tensors
    wide = grad_VD.to(weights_B.dtype).index_select(0, source_B)
    grad_rows = (wide * weights_B.unsqueeze(1)).to(rows_BD.dtype)
    return grad_rows, (rows_BD.to(weights_B.dtype) * wide).sum(1), None, None


reduce_rows.register_autograd(_reduce_backward, setup_context=_reduce_setup)


@torch.library.custom_op("moecompile::combine_rows", mutates_args=())
def combine_rows(rows_UD: Tensor, tokens_U: Tensor, like_TD: Tensor) -> Tensor:
    """Sum of the partial sums that came back for each token, (T, D); `like_TD` gives the number of tokens."""
    out: Tensor = torch.ops.moecompile.sum_rows(rows_UD, tokens_U, like_TD.shape[0])
    return out


@combine_rows.register_fake
def _(rows_UD: Tensor, tokens_U: Tensor, like_TD: Tensor) -> Tensor:
    return rows_UD.new_empty(like_TD.shape[0], rows_UD.shape[1])


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _combine_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
    (tokens_U,) = ctx.saved_tensors
    return grad_TD.index_select(0, tokens_U), None, None


combine_rows.register_autograd(_combine_backward, setup_context=_combine_setup)
