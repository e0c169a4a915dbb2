"""The exchanges: everything that crosses a mesh axis.

`axis` is a logical mesh axis (`ep`) until `shard` replaces it by the name of a process group; running an exchange
before that raises, it never falls back to the identity.

Legend: R rows sent, S rows received, D model dim, r ranks on the axis, n numbers per rank, A assignments sent.

`table_2rn` is the one thing about split sizes that the host must know: [0] what this rank sends to each rank, [1] what
it receives, int64 on the CPU. It costs one host sync a layer; later exchanges of the layer reuse it. `column` selects
one of the n numbers, -1 their sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moecompile.errors import UnboundAxisError
from moecompile.ops.traffic import traffic
from moecompile.torch_private import process_group_by_name


@torch.library.custom_op("moecompile::exchange_counts", mutates_args=())
def exchange_counts(counts: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    """Tells every rank what it will receive.

    Args:
        counts: int64, r * n numbers; row j of the (r, n) view goes to rank j.

    Returns:
        recv_rn int64 on the device, table_2rn int64 on the CPU (see above).
    """
    group = _group(axis)
    sent_rn = counts.reshape(group.size(), -1)
    recv_rn = torch.empty_like(sent_rn)
    dist.all_to_all_single(recv_rn, sent_rn, group=group)
    traffic.add(axis, group, [sent_rn.shape[1] * sent_rn.element_size()] * group.size())
    return recv_rn, torch.stack((sent_rn, recv_rn)).cpu()


@exchange_counts.register_fake
def _(counts: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    size = _fake_axis_size(axis)
    numbers = counts.numel() // size
    return counts.new_empty(size, numbers), torch.empty((2, size, numbers), dtype=counts.dtype, device="cpu")


@torch.library.custom_op("moecompile::all_to_all", mutates_args=())
def all_to_all(rows_RD: Tensor, table_2rn: Tensor, column: int, reverse: bool, axis: str) -> Tensor:
    """Sends rows, which stand by destination rank, and returns the received ones by source rank, (S, D).

    With `reverse` the table is read the other way round: the answers to an earlier exchange travel back.
    """
    sent, received = _splits(table_2rn, column, reverse)
    return _exchange(rows_RD, sent, received, axis)


@all_to_all.register_fake
def _(rows_RD: Tensor, table_2rn: Tensor, column: int, reverse: bool, axis: str) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size()
    return rows_RD.new_empty(size, rows_RD.shape[1])


def _all_to_all_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, table, ctx.column, ctx.reverse, ctx.axis = inputs
    ctx.save_for_backward(table)


def _all_to_all_backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None, None, None]:
    (table,) = ctx.saved_tensors
    grad = torch.ops.moecompile.all_to_all(grad_SD.contiguous(), table, ctx.column, not ctx.reverse, ctx.axis)
    return grad, None, None, None, None


all_to_all.register_autograd(_all_to_all_backward, setup_context=_all_to_all_setup)


@torch.library.custom_op("moecompile::exchange_assignments", mutates_args=())
def exchange_assignments(
    weights_A: Tensor, codes_A: Tensor, table_2rn: Tensor, column: int, axis: str
) -> tuple[Tensor, Tensor]:
    """Sends routing weights and their int16 codes in one message: weight bit-cast to bytes, then the code.

    Returns:
        weights and codes received, by source rank.
    """
    sent, received = _splits(table_2rn, column, reverse=False)
    width = weights_A.element_size()
    packed = torch.cat((_bytes(weights_A), _bytes(codes_A)), dim=1)
    landed = _exchange(packed, sent, received, axis)
    return _unpack(landed[:, :width], weights_A.dtype), _unpack(landed[:, width:], codes_A.dtype)


@exchange_assignments.register_fake
def _(weights_A: Tensor, codes_A: Tensor, table_2rn: Tensor, column: int, axis: str) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
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


def _group(axis: str) -> dist.ProcessGroup:
    group = process_group_by_name(axis)
    if group is None:
        raise UnboundAxisError(
            f"mesh axis '{axis}' is not bound to a process group: run shard (compile_model(..., until='shard') or "
            "ExpertParallelStrategy) before the model"
        )
    return group


def _fake_axis_size(axis: str) -> int:
    return _group(axis).size()


def _splits(table_2rn: Tensor, column: int, reverse: bool) -> tuple[list[int], list[int]]:
    sizes_2r = table_2rn.sum(2) if column < 0 else table_2rn[:, :, column]
    sent, received = sizes_2r.tolist()
    return (received, sent) if reverse else (sent, received)


def _exchange(rows: Tensor, sent: list[int], received: list[int], axis: str) -> Tensor:
    group = _group(axis)
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    row_bytes = rows.element_size() * rows[:1].numel() if rows.shape[0] else 0
    traffic.add(axis, group, [count * row_bytes for count in sent])
    return out


def _unpack(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Byte columns as values. The copy is explicit: of a single row, reshape and contiguous would return a view."""
    flat = torch.empty(columns.numel(), dtype=torch.uint8, device=columns.device)
    flat.view_as(columns).copy_(columns)
    return flat.view(dtype)


def _bytes(values_A: Tensor) -> Tensor:
    return values_A.contiguous().view(torch.uint8).view(values_A.shape[0], values_A.element_size())
