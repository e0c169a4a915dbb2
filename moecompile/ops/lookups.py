"""Rows of an embedding table that are spread over the ranks of an axis: which ranks have them, and how they come here.

Rank r of n has the rows [r B, (r + 1) B) of N, with B = ceil(N / n), as a DTensor that is `Shard(0)` has them. A lookup
asks for each row once, whatever number of tokens need it:

    ids -> unique_ids -> send_ids -> read_rows (at the owner) -> return_rows -> an embedding for each id

Backward goes the same way: what all tokens of a rank say of a row is summed, and one row goes to its owner, who adds
what ranks have sent. So the gradient of the table is whole, and nothing is left to sum.

Legend: U different ids of this rank, S rows that others ask this rank for, D width of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moecompile.ops import sizes
from moecompile.ops.exchange import exchange_rows, group_of, splits
from moecompile.ops.host import start_read
from moecompile.ops.layout import sum_by
from moecompile.ops.traffic import lookup_traffic
from moecompile.torch_private import is_fake, local_block, local_part


def rows_of_a_rank(num_rows: int, ranks: int) -> int:
    """The most rows that a rank has; the last ranks may have fewer."""
    return -(-num_rows // ranks)


@torch.library.custom_op("moecompile::unique_ids", mutates_args=())
def unique_ids(ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The different ids, sorted, (U,), and the place of each id among them, in the shape of `ids`.

    Raises:
        IndexError: an id is not in [0, num_rows).
    """
    unique_U, places = torch.unique(ids, return_inverse=True)
    check_ids(unique_U, num_rows)
    lookup_traffic.note(ids.numel(), unique_U.numel())
    return unique_U.long(), places


@unique_ids.register_fake
def _(ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    size = sizes.size(lambda load: round(load.different(ids.numel(), num_rows)))
    return ids.new_empty(size, dtype=torch.long), torch.empty_like(ids, dtype=torch.long)


def check_ids(sorted_ids: Tensor, num_rows: int) -> None:
    """Raises IndexError unless all are rows of the table."""
    if sorted_ids.numel() and not (0 <= (least := int(sorted_ids[0])) <= (most := int(sorted_ids[-1])) < num_rows):
        wrong = least if least < 0 else most
        raise IndexError(f"an embedding table has {num_rows} rows, and a token asks for row {wrong}")


@torch.library.custom_op("moecompile::send_ids", mutates_args=())
def send_ids(unique_U: Tensor, num_rows: int, axis: str) -> tuple[Tensor, Tensor]:
    """Asks each rank for its rows.

    Args:
        unique_U: sorted.

    Returns:
        ids_S: the rows that this rank is asked for, counted from its first one, sorted by who asks.
        table_2r1: rows that this rank [0] gets from each rank and [1] gives to it, int64 on the CPU.
    """
    group = group_of(axis)
    each, ranks = rows_of_a_rank(num_rows, group.size()), group.size()
    bounds = torch.arange(1, ranks, device=unique_U.device) * each
    ends = torch.searchsorted(unique_U, bounds)
    first = ends.new_zeros(1)
    counts_r = torch.diff(torch.cat((first, ends, first + unique_U.numel())))
    asked_r = torch.empty_like(counts_r)
    dist.all_to_all_single(asked_r, counts_r, group=group)
    lookup_traffic.add(group, [counts_r.element_size()] * ranks)
    table_2r1 = start_read(torch.stack((counts_r, asked_r)).unsqueeze(2))
    local_U = (unique_U - unique_U.div(each, rounding_mode="floor") * each).to(_index_dtype(each))
    gives, gets = splits(table_2r1, 0, reverse=False)
    ids_S = exchange_rows(local_U, gives, gets, axis, counter=lookup_traffic)
    return ids_S.long(), table_2r1


@send_ids.register_fake
def _(unique_U: Tensor, num_rows: int, axis: str) -> tuple[Tensor, Tensor]:
    ranks = group_of(axis).size()
    table_2r1 = torch.empty((2, ranks, 1), dtype=torch.long, device="cpu")
    size = sizes.size(lambda load: load.asked(table_2r1, unique_U.shape[0]))
    return unique_U.new_empty(size), table_2r1


def _index_dtype(rows: int) -> torch.dtype:
    return torch.int32 if rows <= torch.iinfo(torch.int32).max else torch.int64


@torch.library.custom_op("moecompile::read_rows", mutates_args=())
def _read_rows(weight_ND: Tensor, ids: Tensor, padding: int) -> Tensor:
    """Rows of this rank's part of a table, (*ids.shape, D), in fp32 or wider; the row `padding` gets no gradient."""
    rows = weight_ND.index_select(0, ids.reshape(-1)).view(*ids.shape, weight_ND.shape[1])
    return rows.to(_wide(weight_ND.dtype))


@_read_rows.register_fake
def _(weight_ND: Tensor, ids: Tensor, padding: int) -> Tensor:
    return weight_ND.new_empty(*ids.shape, weight_ND.shape[1], dtype=_wide(weight_ND.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients are summed and sent."""
    return torch.promote_types(dtype, torch.float32)


def _read_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ids, ctx.padding = inputs
    ctx.num_rows, ctx.dtype = weight.shape[0], weight.dtype
    ctx.save_for_backward(ids)


def _read_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (ids,) = ctx.saved_tensors
    grad = torch.ops.moecompile.table_gradient(grad, ids, ctx.num_rows, ctx.padding)
    return grad.to(ctx.dtype), None, None


_read_rows.register_autograd(_read_backward, setup_context=_read_setup)


@torch.library.custom_op("moecompile::table_gradient", mutates_args=())
def table_gradient(grad: Tensor, ids: Tensor, num_rows: int, padding: int) -> Tensor:
    """The gradient of a table, (num_rows, D), from those of the rows that were read; none of the row `padding`."""
    rows_V, summed_VD = summed_by_row(grad, ids, padding)
    return grad.new_zeros(num_rows, grad.shape[-1]).index_copy_(0, rows_V, summed_VD)


@table_gradient.register_fake
def _(grad: Tensor, ids: Tensor, num_rows: int, padding: int) -> Tensor:
    return grad.new_empty(num_rows, grad.shape[-1])


def summed_by_row(grad: Tensor, ids: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Different rows that were read, sorted, (V,), and the sum of the gradients of each, (V, D)."""
    rows_V, places = torch.unique(ids, return_inverse=True)
    summed_VD = sum_by(grad.reshape(-1, grad.shape[-1]), places.reshape(-1), rows_V.shape[0])
    if padding >= 0:
        summed_VD[rows_V == padding] = 0
    return rows_V, summed_VD


@torch.library.custom_op("moecompile::row_gradients", mutates_args=())
def _row_gradients(grad: Tensor, ids: Tensor, num_rows: int, padding: int) -> tuple[Tensor, Tensor]:
    """As `summed_by_row`, of a part with `num_rows` rows."""
    return summed_by_row(grad, ids, padding)


@_row_gradients.register_fake
def _(grad: Tensor, ids: Tensor, num_rows: int, padding: int) -> tuple[Tensor, Tensor]:
    size = sizes.size(lambda load: round(load.different(ids.numel(), num_rows)))
    return ids.new_empty(size), grad.new_empty(size, grad.shape[-1])


@torch.library.custom_op("moecompile::rows_to_step", mutates_args=())
def rows_to_step(rows_V: Tensor, summed_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Those rows whose gradient is not zero everywhere, and their gradients."""
    has_grad = summed_VD.any(1)
    return rows_V[has_grad], summed_VD[has_grad]


@rows_to_step.register_fake
def _(rows_V: Tensor, summed_VD: Tensor) -> tuple[Tensor, Tensor]:
    size = sizes.size(lambda load: rows_V.shape[0])
    return rows_V.new_empty(size), summed_VD.new_empty(size, summed_VD.shape[1])


# -- gradients of some rows ------------------------------------------------------------------------------------------


class RowGradients:
    """The gradients of the rows of a table that were read: not those of all rows, which would be as large as it.

    Attributes:
        num_rows: of this rank's part. rows_V: different ones of it, sorted. summed_VD: the gradient of each, in fp32 or
            wider.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: Tensor, grads: Tensor) -> None:
        """Adds different rows of a backward with their gradients."""
        self._parts.append((rows, grads))

    def clear(self) -> None:
        """Forgets all."""
        self._parts = []

    def exchange(self, parts: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Makes these the gradients, and returns those that there were."""
        self._parts, before = parts, self._parts
        return before

    @property
    def exist(self) -> bool:
        """Whether there was a backward."""
        return bool(self._parts)

    @property
    def rows_V(self) -> Tensor:
        """(V,)"""
        return self._summed()[0]

    @property
    def summed_VD(self) -> Tensor:
        """(V, D); changed in place it stays so."""
        return self._summed()[1]

    @torch.no_grad()
    def _summed(self) -> tuple[Tensor, Tensor]:
        if len(self._parts) > 1:
            rows, grads = (torch.cat(each) for each in zip(*self._parts, strict=True))
            self._parts = [torch.ops.moecompile.row_gradients(grads, rows, self.num_rows, -1)]
        return self._parts[0]

    def whole(self, weight: Tensor) -> Tensor:
        """The gradient of all rows, as large as the table and cut as it is."""
        grad = torch.zeros_like(weight, dtype=_wide(weight.dtype))
        local_part(grad).index_copy_(0, self.rows_V, self.summed_VD)
        return grad


_ROWS = "_moecompile_row_gradients"


def row_gradients(weight: Tensor) -> RowGradients | None:
    """The gradients of a table that are kept by rows; None: they are in `.grad`."""
    return getattr(weight, _ROWS, None)


class _KeepRows(torch.autograd.Function):
    """The identity, whose backward keeps the gradients by rows. Not an op: it changes nothing but what is kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ids: Tensor, padding: int) -> Tensor:
        ctx.weight, ctx.padding = weight, padding
        ctx.save_for_backward(ids)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        (ids,), kept = ctx.saved_tensors, row_gradients(ctx.weight)
        if kept is None:
            kept = RowGradients(local_part(ctx.weight).shape[0])
            setattr(ctx.weight, _ROWS, kept)
        kept.add(*torch.ops.moecompile.row_gradients(grad, ids, kept.num_rows, ctx.padding))
        return None, None, None, None


def read_rows(
    weight: Tensor, ids: Tensor, padding: int, *, dtype: torch.dtype | None = None, by_rows: str = ""
) -> Tensor:
    """Rows of a table, or of this rank's part of it.

    Args:
        weight: (N, D), a DTensor where rows are spread over ranks.
        ids: int64, of any shape; of a part counted from its first row.
        padding: a row of the whole table that gets no gradient; -1: none.
        dtype: of the result; None: fp32 or wider.
        by_rows: the rule that steps the rows that were read (moecompile.schema.RowRule); then gradients are not in
            `.grad` but in `row_gradients`. Empty: as others are.
    """
    first = local_block(weight)[0].start
    local = local_part(weight)
    inside = first <= padding < first + local.shape[0]
    padding = padding - first if inside else -1
    if by_rows and weight.requires_grad and torch.is_grad_enabled():
        rows = torch.ops.moecompile.read_rows(local.detach(), ids, padding)
        out: Tensor = _KeepRows.apply(rows, weight, ids, padding)  # type: ignore[no-untyped-call]
    else:
        out = torch.ops.moecompile.read_rows(local, ids, padding)
    return out if dtype is None else out.to(dtype)


@torch.library.custom_op("moecompile::return_rows", mutates_args=())
def return_rows(rows_SD: Tensor, table_2r1: Tensor, places: Tensor, dtype: torch.dtype, axis: str) -> Tensor:
    """Returns rows to who asked for them, and puts each where its ids are: (*places.shape, D).

    dtype: of the result, and of rows on the wire. Gradients are summed and sent in that of the rows.
    """
    gives, gets = splits(table_2r1, 0, reverse=True)
    rows_UD = exchange_rows(rows_SD.to(dtype), gives, gets, axis, counter=lookup_traffic)
    return rows_UD.index_select(0, places.reshape(-1)).view(*places.shape, rows_UD.shape[1])


@return_rows.register_fake
def _(rows_SD: Tensor, table_2r1: Tensor, places: Tensor, dtype: torch.dtype, axis: str) -> Tensor:
    return rows_SD.new_empty(*places.shape, rows_SD.shape[1], dtype=dtype)


def _return_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, table, places, _, ctx.axis = inputs
    ctx.dtype = rows.dtype
    ctx.save_for_backward(table, places)


def _return_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    table, places = ctx.saved_tensors
    back = torch.ops.moecompile.send_row_gradients(grad.to(ctx.dtype), table, places, ctx.axis)
    return back, None, None, None, None


return_rows.register_autograd(_return_backward, setup_context=_return_setup)


@torch.library.custom_op("moecompile::send_row_gradients", mutates_args=())
def send_row_gradients(grad: Tensor, table_2r1: Tensor, places: Tensor, axis: str) -> Tensor:
    """Sums the gradients of each row over the tokens of this rank, and sends one to its owner: (S, D)."""
    gets, gives = splits(table_2r1, 0, reverse=False)
    summed_UD = sum_by(grad.reshape(-1, grad.shape[-1]), places.reshape(-1), sum(gets))
    return exchange_rows(summed_UD, gets, gives, axis, counter=lookup_traffic)


@send_row_gradients.register_fake
def _(grad: Tensor, table_2r1: Tensor, places: Tensor, axis: str) -> Tensor:
    size = sizes.size(lambda load: load.asked(table_2r1))
    return grad.new_empty(size, grad.shape[-1])


def bytes_given(op: str, args: Sequence[Any]) -> int | None:
    """Bytes that a rank gives to an exchange of a lookup, its own part included; None: it is another op."""
    known = _BYTES_GIVEN.get(op)
    return None if known is None else known(*args)


def _ids_given(unique_U: Tensor, num_rows: int, axis: str) -> int:
    ranks = group_of(axis).size()
    return unique_U.numel() * _index_dtype(rows_of_a_rank(num_rows, ranks)).itemsize + ranks * torch.int64.itemsize


def _rows_given(rows_SD: Tensor, table_2r1: Tensor, places: Tensor, dtype: torch.dtype, axis: str) -> int:
    return rows_SD.numel() * dtype.itemsize


def _gradients_given(grad: Tensor, table_2r1: Tensor, *_: Any) -> int:
    rows = sizes.current().asked(table_2r1) if is_fake(table_2r1) else int(table_2r1[0].sum())
    return rows * grad.shape[-1] * grad.element_size()


_BYTES_GIVEN: dict[str, Callable[..., int]] = {
    "send_ids": _ids_given, "return_rows": _rows_given, "send_row_gradients": _gradients_given,
}  # fmt: skip
