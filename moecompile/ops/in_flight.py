"""Exchanges in two halves: `..._start` puts rows on the wire, `..._wait` returns those that arrived.

Legend: R rows sent, S rows received, D model dim, A assignments sent.

NOTE on what connects the halves:
  1. A start returns a token and a ticket. The ticket names the exchange in flight in a table of this process; its wait
     takes it out and returns the received rows. No tensor in flight is visible to anything else.
  2. Autograd runs along the token, which has the shape of the rows sent and no memory (all strides are 0). A gradient
     must have the shape of its value, and the returned tensor has as many rows as were sent.
  3. In backward the order is mirrored: the backward of a wait starts the reverse exchange, under the same ticket, and
     returns zeros without memory as the token's gradient; the backward of the start waits for it. Hooks and anomaly
     mode see these zeros, never a buffer that is being written.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moecompile.errors import MoecompileError
from moecompile.ops import sizes
from moecompile.ops.baton import landed
from moecompile.ops.exchange import bytes_of, count_sent, group_of, packed, splits, unpack
from moecompile.ops.narrow_rows import unpack_rows
from moecompile.torch_private import ORDERED

_numbers = itertools.count(1)
_in_flight: dict[int, tuple[Tensor, Tensor, dist.Work]] = {}  # received rows, sent rows (kept alive), what to wait for


@torch.library.custom_op("moecompile::all_to_all_start", mutates_args=())
def all_to_all_start(
    rows_RD: Tensor, table_2rn: Tensor, column: int, reverse: bool, axis: str, *, narrow: str = "",
    narrow_gradient: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Begins `all_to_all`: the arguments are the same.

    Returns:
        token_RD, ticket int64 on the CPU (see the note above).
    """
    ticket = next(_numbers)
    _launch(ticket, packed(rows_RD, narrow), *splits(table_2rn, column, reverse), axis)
    return _token(rows_RD), torch.tensor(ticket)


@all_to_all_start.register_fake
def _(
    rows_RD: Tensor, table_2rn: Tensor, column: int, reverse: bool, axis: str, *, narrow: str = "",
    narrow_gradient: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _token(rows_RD), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("moecompile::all_to_all_wait", mutates_args=())
def all_to_all_wait(
    token_RD: Tensor, ticket: Tensor, table_2rn: Tensor, column: int, reverse: bool, axis: str, *, narrow: str = "",
    narrow_gradient: str = "",
) -> Tensor:  # fmt: skip
    """The rows received, (S, D)."""
    return _rows(_land(int(ticket)), narrow, token_RD)


@all_to_all_wait.register_fake
def _(
    token_RD: Tensor, ticket: Tensor, table_2rn: Tensor, column: int, reverse: bool, axis: str, *, narrow: str = "",
    narrow_gradient: str = "",
) -> Tensor:  # fmt: skip
    size = sizes.size(lambda load: load.brought(token_RD.shape[0], table_2rn, column, reverse, axis))
    return token_RD.new_empty(size, *token_RD.shape[1:])


@torch.library.custom_op("moecompile::exchange_assignments_start", mutates_args=())
def exchange_assignments_start(
    weights_A: Tensor, codes_A: Tensor, table_2rn: Tensor, column: int, axis: str
) -> tuple[Tensor, Tensor]:
    """Begins `exchange_assignments`. Returns token_A and a ticket."""
    ticket = next(_numbers)
    packed = torch.cat((bytes_of(weights_A), bytes_of(codes_A)), dim=1)
    _launch(ticket, packed, *splits(table_2rn, column, reverse=False), axis)
    return _token(weights_A), torch.tensor(ticket)


@exchange_assignments_start.register_fake
def _(weights_A: Tensor, codes_A: Tensor, table_2rn: Tensor, column: int, axis: str) -> tuple[Tensor, Tensor]:
    return _token(weights_A), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("moecompile::exchange_assignments_wait", mutates_args=())
def exchange_assignments_wait(
    token_A: Tensor, ticket: Tensor, table_2rn: Tensor, column: int, axis: str
) -> tuple[Tensor, Tensor]:
    """The routing weights and int16 codes received, by source rank."""
    packed, width = _land(int(ticket), hands_over=False), token_A.element_size()
    return unpack(packed[:, :width], token_A.dtype), unpack(packed[:, width:], torch.int16)


@exchange_assignments_wait.register_fake
def _(token_A: Tensor, ticket: Tensor, table_2rn: Tensor, column: int, axis: str) -> tuple[Tensor, Tensor]:
    size = sizes.size(lambda load: load.brought(token_A.shape[0], table_2rn, column, False, axis))
    return token_A.new_empty(size), token_A.new_empty(size, dtype=torch.int16)


# -- the way back ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("moecompile::gradient_start", mutates_args=())
def gradient_start(
    grad: Tensor, token: Tensor, ticket: Tensor, table_2rn: Tensor, column: int, reverse: bool, axis: str, *,
    narrow: str = "",
) -> Tensor:  # fmt: skip
    """Sends gradients of received rows, (S, ...), back to where these came from. Returns the token's gradient."""
    received, sent = splits(table_2rn, column, reverse)
    _launch(-int(ticket), packed(grad, narrow), sent, received, axis)
    return _token(token)


@gradient_start.register_fake
def _(
    grad: Tensor, token: Tensor, ticket: Tensor, table_2rn: Tensor, column: int, reverse: bool, axis: str, *,
    narrow: str = "",
) -> Tensor:  # fmt: skip
    return _token(token)


@torch.library.custom_op("moecompile::gradient_wait", mutates_args=())
def gradient_wait(grad_token: Tensor, ticket: Tensor, *, narrow: str = "") -> Tensor:
    """The gradients of the rows sent, of the token's shape."""
    return _rows(_land(-int(ticket)), narrow, grad_token)


@gradient_wait.register_fake
def _(grad_token: Tensor, ticket: Tensor, *, narrow: str = "") -> Tensor:
    return grad_token.new_empty(grad_token.shape)


def _start_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.narrow = ""
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _rows_start_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, str], output: tuple[Tensor, Tensor]
) -> None:
    _start_setup(ctx, inputs, output)
    ctx.narrow = keyword_only_inputs["narrow_gradient"]


def _start_backward(ctx: Any, grad_token: Tensor, _ticket: Any) -> tuple[Any, ...]:
    return torch.ops.moecompile.gradient_wait(grad_token, *ctx.saved_tensors, narrow=ctx.narrow), None, None, None, None


def _wait_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    token, ticket, table, ctx.column, *rest = inputs
    ctx.reverse, ctx.axis = (*rest,) if len(rest) == 2 else (False, rest[0])
    ctx.narrow = ""
    ctx.save_for_backward(token, ticket, table)
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(output[1])


def _rows_wait_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, str], output: Tensor) -> None:
    _wait_setup(ctx, inputs, output)
    ctx.narrow = keyword_only_inputs["narrow_gradient"]


def _wait_backward(ctx: Any, grad: Tensor, *_codes: Any) -> tuple[Any, ...]:
    kept = (*ctx.saved_tensors, ctx.column, ctx.reverse, ctx.axis)
    sent = torch.ops.moecompile.gradient_start(grad.contiguous(), *kept, narrow=ctx.narrow)
    return sent, *[None] * (4 if _codes else 5)


all_to_all_start.register_autograd(_start_backward, setup_context=_rows_start_setup)
exchange_assignments_start.register_autograd(_start_backward, setup_context=_start_setup)
all_to_all_wait.register_autograd(_wait_backward, setup_context=_rows_wait_setup)
exchange_assignments_wait.register_autograd(_wait_backward, setup_context=_wait_setup)


for _sends in (all_to_all_start, exchange_assignments_start, gradient_start):
    _sends.register_effect(ORDERED)  # compiled graphs keep the order, which must be the same on every rank


def _token(like: Tensor) -> Tensor:
    return like.new_zeros(()).expand(like.shape)


def _rows(received: Tensor, narrow: str, like: Tensor) -> Tensor:
    return unpack_rows(received, narrow, like=like) if narrow else received


def _launch(ticket: int, rows: Tensor, sent: list[int], received: list[int], axis: str) -> None:
    group, rows = group_of(axis), rows.contiguous()
    out = rows.new_empty(sum(received), *rows.shape[1:])
    work = dist.all_to_all_single(out, rows, received, sent, group=group, async_op=True)
    _in_flight[ticket] = (out, rows, work)
    count_sent(group, rows, sent)


def _land(ticket: int, *, hands_over: bool = True) -> Tensor:
    if ticket not in _in_flight:
        raise MoecompileError(
            f"exchange {abs(ticket)} is not in flight: each start has one wait, in the process that started it"
        )
    out, _rows, work = _in_flight.pop(ticket)
    landed(work, hands_over=hands_over)
    return out
