"""The exchanges: all communication over a mesh axis, which is the last argument of each op.

`axis` is a logical mesh axis (`ep`) until `shard` replaces it by the name of a process group. Running an exchange
before that raises an error; it never falls back to the identity.

Legend: R rows sent, S rows received, D model dim, K top-k, r ranks on the axis, n numbers per rank, A assignments sent,
M rows of a block, equally many on every rank of the axis.

`table_2rn`, int64 on the CPU, has all split sizes: input_splits in [0] (what this rank sends to each rank) and
output_splits in [1] (what it receives). The first op that needs it waits for it, which is the only host sync of a layer
(moecompile.ops.host); later exchanges reuse it. `column` selects one of the n numbers per rank, -1 their sum.

`narrow`, `narrow_gradient`: the format in which rows, and gradients on their way back, are bytes on the wire
(moecompile.row_formats); empty: as they are. Both ends of the op have the dtype of the rows: in a tensor of float8 a
gradient of 1e-6 would be zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moecompile.errors import UnboundAxisError
from moecompile.ops import sizes
from moecompile.ops.baton import is_shared, landed
from moecompile.ops.host import finish_read, start_read
from moecompile.ops.narrow_rows import pack, unpack_rows
from moecompile.ops.traffic import TrafficCounter, traffic
from moecompile.torch_private import all_gather_single, process_group_by_name


@torch.library.custom_op("moecompile::exchange_counts", mutates_args=())
def exchange_counts(counts: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    """Sends every rank the counts of what it will receive.

    Args:
        counts: int64, r * n numbers; row j of the (r, n) view goes to rank j.

    Returns:
        recv_rn int64 on the device, table_2rn int64 on the CPU (see above).
    """
    recv_rn = _exchange_counts(counts, axis)
    return recv_rn, start_read(torch.stack((counts.reshape(recv_rn.shape), recv_rn)))


@exchange_counts.register_fake
def _(counts: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    size = fake_axis_size(axis)
    numbers = counts.numel() // size
    return counts.new_empty(size, numbers), torch.empty((2, size, numbers), dtype=counts.dtype, device="cpu")


@torch.library.custom_op("moecompile::send_counts", mutates_args=())
def send_counts(counts: Tensor, axis: str) -> Tensor:
    """Like `exchange_counts` but without the copy to the host: returns only recv_rn, from which other counts follow."""
    return _exchange_counts(counts, axis)


@send_counts.register_fake
def _(counts: Tensor, axis: str) -> Tensor:
    size = fake_axis_size(axis)
    return counts.new_empty(size, counts.numel() // size)


@torch.library.custom_op("moecompile::all_to_all", mutates_args=())
def all_to_all(
    rows_RD: Tensor, table_2rn: Tensor, column: int, reverse: bool, axis: str, *, narrow: str = "",
    narrow_gradient: str = "",
) -> Tensor:  # fmt: skip
    """Sends rows, sorted by destination rank, and returns the received rows, sorted by source rank, (S, D).

    `reverse` swaps input and output splits, to return the results of an earlier exchange.
    """
    input_splits, output_splits = splits(table_2rn, column, reverse)
    received = exchange_rows(packed(rows_RD, narrow), input_splits, output_splits, axis)
    return unpack_rows(received, narrow, like=rows_RD) if narrow else received


@all_to_all.register_fake
def _(
    rows_RD: Tensor, table_2rn: Tensor, column: int, reverse: bool, axis: str, *, narrow: str = "",
    narrow_gradient: str = "",
) -> Tensor:  # fmt: skip
    size = sizes.size(lambda load: load.brought(rows_RD.shape[0], table_2rn, column, reverse, axis))
    return rows_RD.new_empty(size, rows_RD.shape[1])


def _all_to_all_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, str], output: Tensor) -> None:
    _, table, ctx.column, ctx.reverse, ctx.axis = inputs
    ctx.narrow = keyword_only_inputs["narrow_gradient"]
    ctx.save_for_backward(table)


def _all_to_all_backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None, None, None]:
    (table,), back = ctx.saved_tensors, not ctx.reverse
    grad_SD = grad_SD.contiguous()
    grad = torch.ops.moecompile.all_to_all(grad_SD, table, ctx.column, back, ctx.axis, narrow=ctx.narrow)
    return grad, None, None, None, None


all_to_all.register_autograd(_all_to_all_backward, setup_context=_all_to_all_setup)


@torch.library.custom_op("moecompile::exchange_assignments", mutates_args=())
def exchange_assignments(
    weights_A: Tensor, codes_A: Tensor, table_2rn: Tensor, column: int, axis: str
) -> tuple[Tensor, Tensor]:
    """Sends routing weights and their int16 codes in one message: the bytes of the weight, then those of the code.

    Returns:
        received weights and codes, sorted by source rank.
    """
    input_splits, output_splits = splits(table_2rn, column, reverse=False)
    width = weights_A.element_size()
    packed = torch.cat((bytes_of(weights_A), bytes_of(codes_A)), dim=1)
    received = exchange_rows(packed, input_splits, output_splits, axis, hands_over=False)
    return unpack(received[:, :width], weights_A.dtype), unpack(received[:, width:], codes_A.dtype)


@exchange_assignments.register_fake
def _(weights_A: Tensor, codes_A: Tensor, table_2rn: Tensor, column: int, axis: str) -> tuple[Tensor, Tensor]:
    size = sizes.size(lambda load: load.brought(weights_A.shape[0], table_2rn, column, False, axis))
    return weights_A.new_empty(size), codes_A.new_empty(size)


def _assignments_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.column, ctx.axis = inputs[3], inputs[4]
    ctx.mark_non_differentiable(output[1])


def _assignments_backward(ctx: Any, grad_weights: Tensor, _codes: Tensor) -> tuple[Tensor, None, None, None, None]:
    (table,) = ctx.saved_tensors
    column = grad_weights.reshape(-1, 1).contiguous()
    back = torch.ops.moecompile.all_to_all(column, table, ctx.column, True, ctx.axis)
    return back.reshape(-1), None, None, None, None


exchange_assignments.register_autograd(_assignments_backward, setup_context=_assignments_setup)


@torch.library.custom_op("moecompile::all_gather", mutates_args=())
def all_gather(rows_MD: Tensor, axis: str) -> Tensor:
    """The blocks of all ranks, (r * M, D), sorted by source rank."""
    return gather_blocks(rows_MD, axis)


@all_gather.register_fake
def _(rows_MD: Tensor, axis: str) -> Tensor:
    return rows_MD.new_empty(rows_MD.shape[0] * fake_axis_size(axis), rows_MD.shape[1])


@torch.library.custom_op("moecompile::reduce_scatter", mutates_args=())
def reduce_scatter(rows: Tensor, axis: str) -> Tensor:
    """Sums the blocks that all ranks have for this rank, (r * M, D) -> (M, D), in at least fp32.

    An all-to-all moves the blocks, and they are added here in rank order, so the sum is the same with every backend and
    rounded once. A rank sends as many bytes as in a ring.
    """
    group = group_of(axis)
    received = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if rows.numel():
        landed(dist.all_to_all_single(received, rows.contiguous(), group=group, async_op=is_shared()))
    _count_blocks(group, rows.numel() * rows.element_size() // group.size())
    blocks = received.view(group.size(), rows.shape[0] // group.size(), rows.shape[1])
    return blocks.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)


@reduce_scatter.register_fake
def _(rows: Tensor, axis: str) -> Tensor:
    return rows.new_empty(rows.shape[0] // fake_axis_size(axis), rows.shape[1])


def _axis_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.axis = inputs[-1]


def _all_gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.moecompile.reduce_scatter(grad, ctx.axis), None


def _reduce_scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.moecompile.all_gather(grad, ctx.axis), None


all_gather.register_autograd(_all_gather_backward, setup_context=_axis_setup)
reduce_scatter.register_autograd(_reduce_scatter_backward, setup_context=_axis_setup)


@torch.library.custom_op("moecompile::gather_assignments", mutates_args=())
def gather_assignments(weights_MK: Tensor, ids_MK: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    """Gathers routing weights and int16 expert ids in one message, (r * M, K) each."""
    top_k, width = weights_MK.shape[1], weights_MK.shape[1] * weights_MK.element_size()
    packed = torch.cat((weights_MK.contiguous().view(torch.uint8), ids_MK.contiguous().view(torch.uint8)), dim=1)
    gathered = gather_blocks(packed, axis, hands_over=False)
    weights, ids = unpack(gathered[:, :width], weights_MK.dtype), unpack(gathered[:, width:], ids_MK.dtype)
    return weights.view(-1, top_k), ids.view(-1, top_k)


@gather_assignments.register_fake
def _(weights_MK: Tensor, ids_MK: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    shape = (weights_MK.shape[0] * fake_axis_size(axis), weights_MK.shape[1])
    return weights_MK.new_empty(shape), ids_MK.new_empty(shape)


def _gather_assignments_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.axis = inputs[-1]
    ctx.mark_non_differentiable(output[1])


def _gather_assignments_backward(ctx: Any, grad_weights: Tensor, _ids: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.moecompile.reduce_scatter(grad_weights, ctx.axis), None, None


gather_assignments.register_autograd(_gather_assignments_backward, setup_context=_gather_assignments_setup)


def group_of(axis: str) -> dist.ProcessGroup:
    """The process group that an axis is bound to."""
    group = process_group_by_name(axis)
    if group is None:
        raise UnboundAxisError(
            f"mesh axis '{axis}' is not bound to a process group: run shard (compile_model(..., until='shard') or "
            "ExpertParallelStrategy) before the model"
        )
    return group


def fake_axis_size(axis: str) -> int:
    return group_of(axis).size()


def _exchange_counts(counts: Tensor, axis: str) -> Tensor:
    group = group_of(axis)
    sent_rn = counts.reshape(group.size(), -1)
    recv_rn = torch.empty_like(sent_rn)
    dist.all_to_all_single(recv_rn, sent_rn, group=group)
    _count_blocks(group, sent_rn.shape[1] * sent_rn.element_size())
    return recv_rn


def gather_blocks(block: Tensor, axis: str, *, hands_over: bool = True) -> Tensor:
    group = group_of(axis)
    out = block.new_empty(group.size() * block.shape[0], block.shape[1])
    if block.numel():  # all ranks agree on this, because blocks have equal sizes
        work = all_gather_single(out, block.contiguous(), group, async_op=hands_over and is_shared())
        landed(work, hands_over=hands_over)
    _count_blocks(group, block.numel() * block.element_size())
    return out


def _count_blocks(group: dist.ProcessGroup, block_bytes: int) -> None:
    """Counts one block sent to every rank. A ring sends as many bytes to the next rank, over the same class of link if
    the axis is on one node or has one rank per node.
    """
    traffic.add(group, [block_bytes] * group.size())


def splits(table_2rn: Tensor, column: int, reverse: bool) -> tuple[list[int], list[int]]:
    """input_splits, output_splits: rows sent to, and received from, each rank."""
    table_2rn = finish_read(table_2rn)
    sizes_2r = table_2rn.sum(2) if column < 0 else table_2rn[:, :, column]
    input_splits, output_splits = sizes_2r.tolist()
    return (output_splits, input_splits) if reverse else (input_splits, output_splits)


def exchange_rows(
    rows: Tensor, input_splits: list[int], output_splits: list[int], axis: str, *, hands_over: bool = True,
    counter: TrafficCounter = traffic,
) -> Tensor:  # fmt: skip
    group = group_of(axis)
    out = rows.new_empty(sum(output_splits), *rows.shape[1:])
    sent, async_op = rows.contiguous(), hands_over and is_shared()
    work = dist.all_to_all_single(out, sent, output_splits, input_splits, group=group, async_op=async_op)
    landed(work, hands_over=hands_over)
    count_sent(group, rows, input_splits, counter)
    return out


def packed(rows: Tensor, narrow: str) -> Tensor:
    """Rows as they are on the wire."""
    return pack(rows, narrow) if narrow else rows


def count_sent(
    group: dist.ProcessGroup, rows: Tensor, input_splits: list[int], counter: TrafficCounter = traffic
) -> None:
    """Counts the bytes of `rows`, of which `input_splits[i]` go to rank i of the group."""
    row_bytes = rows.element_size() * rows[:1].numel() if rows.shape[0] else 0
    counter.add(group, [count * row_bytes for count in input_splits])


def unpack(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Byte columns as values. Copies explicitly, because reshape and contiguous return a view of a single row."""
    flat = torch.empty(columns.numel(), dtype=torch.uint8, device=columns.device)
    flat.view_as(columns).copy_(columns)
    return flat.view(dtype)


def bytes_of(values_A: Tensor) -> Tensor:
    """(A, bytes of one value)"""
    return values_A.contiguous().view(torch.uint8).view(values_A.shape[0], values_A.element_size())


# -- casts around an exchange: rows and their gradients may be sent in a lower precision ----------------------------
#
# Routing weights, ids and counts are never cast.


@torch.library.custom_op("moecompile::wire_cast", mutates_args=())
def wire_cast(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows in the wire dtype, rounded to nearest. The gradient arrives in the wire dtype and is cast back."""
    return rows.to(dtype, copy=True)


@wire_cast.register_fake
def _(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(rows, dtype=dtype)


@torch.library.custom_op("moecompile::wire_uncast", mutates_args=())
def wire_uncast(rows: Tensor, like: Tensor) -> Tensor:
    """Received rows in the dtype of `like`. The gradient is rounded to the wire dtype before it is sent."""
    return rows.to(like.dtype, copy=True)


@wire_uncast.register_fake
def _(rows: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(rows, dtype=like.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad.to(ctx.dtype), None


wire_cast.register_autograd(_backward, setup_context=_setup)
wire_uncast.register_autograd(_backward, setup_context=_setup)
