"""Row movement of the `dedup` dispatch: one row per (token, destination rank), partial sums back.

Legend: T tokens, D model dim, K top-k, r EP ranks, e local experts, A local assignments, U rows sent, V local or
received rows, B assignments sent or received (only kept ones).

NOTE on the wire format:
  1. Rows are sorted by (destination rank, token); `source_U` is each row's token on the sender.
  2. Assignments are sorted by (destination rank, token, slot), so those of one row are adjacent.
  3. An assignment's int16 code is 2 * local expert + (1 if it is the first of its row). The receiver gets the row of
     an assignment as the running sum of the first-of-row bits: no row numbers are sent.
  4. Counts are exchanged before rows are packed. So the host gets all sizes that are sent and received in one table. It
     waits for the table after the sort and before rows are cut; no op here reads from the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moecompile.ops import sizes
from moecompile.ops.host import finish_read, start_read
from moecompile.ops.layout import by_assignment, sum_by
from moecompile.ops.tokens import expert_counts

MAX_LOCAL_EXPERTS = 2**14  # an int16 code holds twice the expert id, plus one


@torch.library.custom_op("moecompile::count_rows", mutates_args=())
def count_rows(ids_TK: Tensor, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Codes of the assignments, and counts to send to each rank. The id num_experts, a dropped one, is not counted.

    Returns:
        codes_A int64 (A = T * K): 2 * expert + (1 if it is the first of its token); counts_r2 int64, rows and
        assignments.
    """
    rank_TK = torch.div(ids_TK, num_experts // num_ranks, rounding_mode="floor")  # dropped: num_ranks
    hits_Tr = ids_TK.new_zeros(ids_TK.shape[0], num_ranks + 1).scatter_add_(1, rank_TK, torch.ones_like(ids_TK))
    hits_Tr = hits_Tr[:, :num_ranks]
    return assignment_codes(ids_TK), torch.stack(((hits_Tr > 0).sum(0), hits_Tr.sum(0)), dim=1)


@count_rows.register_fake
def _(ids_TK: Tensor, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    return ids_TK.new_empty(ids_TK.numel()), ids_TK.new_empty(num_ranks, 2)


def assignment_codes(ids_TK: Tensor) -> Tensor:
    """2 * expert + (1 if it is the first of its token) of every assignment."""
    codes_TK = 2 * ids_TK
    codes_TK[:, :1] += 1
    return codes_TK.reshape(-1)


@torch.library.custom_op("moecompile::pack_rows", mutates_args=())
def pack_rows(
    rows_VD: Tensor, weights: Tensor, codes_A: Tensor, num_experts: int, num_parts: int, table_2rn: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Packs what is sent to each part: each row once if the part has one of its experts, and its assignments there.

    Args:
        rows_VD: local rows. weights: of their assignments, A in all, of any shape. codes_A: 2 * expert + (1 if it is
            the first of its row), sorted by row; an expert id of `num_experts` is dropped.
        num_experts: experts of all parts, equally many each. table_2rn: starts with rows and assignments per part.

    Returns:
        rows_UD sorted by (part, row), source_U int64 (sent row -> local row), weights_B, codes_B int16 sorted by
        (part, row, slot) with the local expert on the part, order_B int64 (sent -> local assignment).
    """
    per_part = num_experts // num_parts
    if per_part > MAX_LOCAL_EXPERTS:
        raise ValueError(f"an int16 code holds at most {MAX_LOCAL_EXPERTS} experts a rank or node, not {per_part}")
    codes = codes_A.to(torch.int64)
    expert_A, row_A = codes >> 1, (codes & 1).cumsum(0) - 1
    part_A = torch.div(expert_A, per_part, rounding_mode="floor")  # dropped: num_parts, which sorts last
    key_A, order_A = torch.sort(part_A * rows_VD.shape[0] + row_A, stable=True)
    num_sent, num_assigned = finish_read(table_2rn)[0, :, :2].sum(0).tolist()
    key_B, order_B = key_A[:num_assigned], order_A[:num_assigned].clone()
    first_B = torch.ones_like(key_B, dtype=torch.bool)
    first_B[1:] = key_B[1:] != key_B[:-1]
    # All assignments of a row write the same number to the same element.
    source_U = key_B.new_empty(num_sent).scatter_(0, first_B.cumsum(0) - 1, row_A.index_select(0, order_B))
    codes_B = (2 * (expert_A.index_select(0, order_B) % per_part) + first_B).to(torch.int16)
    weights_B = weights.reshape(-1).index_select(0, order_B)
    return rows_VD.index_select(0, source_U), source_U, weights_B, codes_B, order_B


@pack_rows.register_fake
def _(
    rows_VD: Tensor, weights: Tensor, codes_A: Tensor, num_experts: int, num_parts: int, table_2rn: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_sent = sizes.size(lambda load: load.rows_sent(rows_VD.shape[0], num_experts, num_parts))
    num_assigned = sizes.size(lambda load: load.kept(weights.numel(), num_experts))
    return (
        rows_VD.new_empty(num_sent, rows_VD.shape[1]),
        codes_A.new_empty(num_sent, dtype=torch.int64),
        weights.new_empty(num_assigned),
        codes_A.new_empty(num_assigned, dtype=torch.int16),
        codes_A.new_empty(num_assigned, dtype=torch.int64),
    )


def _pack_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], output[4])
    ctx.num_rows, ctx.num_assignments, ctx.weights_shape = inputs[0].shape[0], inputs[1].numel(), inputs[1].shape
    ctx.mark_non_differentiable(output[1], output[3], output[4])


def _pack_backward(ctx: Any, grad_rows: Tensor, _s: Any, grad_weights: Tensor, *_: Any) -> tuple[Any, ...]:
    source_U, order_B = ctx.saved_tensors
    grad_x = torch.ops.moecompile.sum_rows(grad_rows, source_U, ctx.num_rows)
    grad_w = by_assignment(grad_weights, order_B, ctx.num_assignments)
    return grad_x, grad_w.view(ctx.weights_shape), None, None, None, None


pack_rows.register_autograd(_pack_backward, setup_context=_pack_setup)


@torch.library.custom_op("moecompile::sum_rows", mutates_args=())
def sum_rows(rows_UD: Tensor, index_U: Tensor, num_out: int) -> Tensor:
    """out[index_U[i]] += rows_UD[i], (num_out, D), summed in at least fp32 and rounded once."""
    return sum_by(rows_UD, index_U, num_out)


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
    """Received assignments sorted by local expert: source_B (-> received row), order_B (-> assignment), counts_e."""
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
    """Adds up the returned partial sums of each token, (T, D); `like_TD` gives the number of tokens."""
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


# -- the `hierarchical` dispatch: two hops, each a deduplicated exchange between nodes or ranks (parts) -------------
#
# Legend: T tokens, D model dim, K top-k, N nodes of the EP group, L EP ranks on each, V local rows, A local
# assignments, U rows sent, B assignments sent.
#
# NOTE on the route of a token from rank (n, l), local rank l on node n, to its experts:
#   1. Hop 1, over `ep_inter`: one row to (m, l) for each node m that has one of the token's experts.
#   2. Hop 2, over `ep_intra`: (m, l) forwards the row once to each (m, j) that has one of the token's experts.
#   3. Back the same way: (m, j) sends (m, l) one weighted sum per row; (m, l) adds up the sums from its node and sends
#      (n, l) one row per token.
#
# NOTE on the counts. What (m, l) forwards depends on what it receives, but every source can count it from its own ids.
# So the counts of hop 1 include those of hop 2, 2 + 2 L numbers for each node:
#   [rows, assignments, (rows, assignments) for local rank 0, ..., for local rank L - 1]
# Their sums over the sources are what (m, l) forwards. Both counts stay on the device, and both tables are copied to
# the host together: one host sync per layer. Since all sizes are then known, no op here needs another.


@torch.library.custom_op("moecompile::count_hops", mutates_args=())
def count_hops(ids_TK: Tensor, num_experts: int, num_nodes: int, ranks_per_node: int) -> tuple[Tensor, Tensor]:
    """Codes of the assignments, and counts to send to each node (see above). Dropped assignments are not counted.

    Returns:
        codes_A int64 (A = T * K): 2 * expert + (1 if it is the first of its token); counts_Nn int64.
    """
    num_tokens, num_ranks = ids_TK.shape[0], num_nodes * ranks_per_node
    rank_TK = torch.div(ids_TK, num_experts // num_ranks, rounding_mode="floor")  # dropped: num_ranks
    hits_Tr = ids_TK.new_zeros(num_tokens, num_ranks + 1).scatter_add_(1, rank_TK, torch.ones_like(ids_TK))
    hits_TNL = hits_Tr[:, :num_ranks].reshape(num_tokens, num_nodes, ranks_per_node)
    hits_TN = hits_TNL.sum(2)
    onward_NL2 = torch.stack(((hits_TNL > 0).sum(0), hits_TNL.sum(0)), dim=2)
    counts_Nn = torch.cat(
        ((hits_TN > 0).sum(0).unsqueeze(1), hits_TN.sum(0).unsqueeze(1), onward_NL2.flatten(1)), dim=1
    )
    return assignment_codes(ids_TK), counts_Nn


@count_hops.register_fake
def _(ids_TK: Tensor, num_experts: int, num_nodes: int, ranks_per_node: int) -> tuple[Tensor, Tensor]:
    return ids_TK.new_empty(ids_TK.numel()), ids_TK.new_empty(num_nodes, 2 + 2 * ranks_per_node)


@torch.library.custom_op("moecompile::onward_counts", mutates_args=())
def onward_counts(received_Nn: Tensor) -> Tensor:
    """Rows and assignments that hop 2 forwards to each rank of the node, (L, 2)."""
    return received_Nn[:, 2:].sum(0).reshape(-1, 2)


@onward_counts.register_fake
def _(received_Nn: Tensor) -> Tensor:
    return received_Nn.new_empty((received_Nn.shape[1] - 2) // 2, 2)


@torch.library.custom_op("moecompile::read_tables", mutates_args=())
def read_tables(sent_Nn: Tensor, received_Nn: Tensor, sent_L2: Tensor, received_L2: Tensor) -> tuple[Tensor, Tensor]:
    """The tables of both hops, table_2Nn and table_2L2 (moecompile.ops.exchange), with a single host sync."""
    return start_read(torch.stack((sent_Nn, received_Nn))), start_read(torch.stack((sent_L2, received_L2)))


@read_tables.register_fake
def _(sent_Nn: Tensor, received_Nn: Tensor, sent_L2: Tensor, received_L2: Tensor) -> tuple[Tensor, Tensor]:
    first, second = (torch.empty(2, *counts.shape, dtype=torch.int64, device="cpu") for counts in (sent_Nn, sent_L2))
    return first, second
