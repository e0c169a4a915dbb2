"""Two seams for other back ends: (routing, dispatch, combine) over a mesh axis, and the experts of one rank.

A back end is named `module:name` in the config, so every rank imports it by itself. Both seams use the forms that the
libraries of the field have in common:

    dispatch(x, ids, weights) -> rows, ids, weights, handle;   combine(rows, handle) -> y      (DeepEP, NCCL EP)
    experts(x, ids, weights, gate_up, down) -> y                                               (fused MoE kernels)

Legend: T tokens, K top-k, V rows received, k experts of a received row, D model dim, F expert width, e local experts,
R rows in expert order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moecompile.errors import ConfigError, MoecompileError
from moecompile.named_code import imported
from moecompile.ops.baton import landed
from moecompile.ops.exchange import group_of
from moecompile.ops.expert_ffn import RaggedRows
from moecompile.ops.traffic import traffic

P = ParamSpec("P")
R = TypeVar("R")
DISPATCH, EXPERTS = "dispatch.backend", "experts.backend"
"""Config paths of the two seams."""


class Dispatched(NamedTuple):
    """What a rank has received.

    Attributes:
        rows_VD: in any order.
        ids_VK: int64 (V, k), local experts (0 .. e - 1) of each row, -1 where there is none.
        weights_VK: (V, k), their routing weights.
        handle: whatever the back end needs to return sums.
    """

    rows_VD: Tensor
    ids_VK: Tensor
    weights_VK: Tensor
    handle: Any


class DispatchBackend(Protocol):
    """Sends tokens to the ranks of their experts and returns sums; autograd is not its task.

    Every rank of the group calls each method, in the same order. `count_sent_bytes` records what is sent, if the bytes
    of a run are to be compared with the planned ones.
    """

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, group: dist.ProcessGroup
    ) -> Dispatched:
        """Sends each token to the ranks of its experts.

        Args:
            x_TD: the tokens of this rank.
            ids_TK: int64, over all ranks: rank i has experts i * e .. (i + 1) * e - 1; -1 where an assignment is
                dropped.
            weights_TK: fp32 or wider.
            num_experts: of all ranks.
            group: the ranks that share these experts.
        """

    def dispatch_again(self, x_TD: Tensor, handle: Any) -> Tensor:
        """Sends other rows on the same way, rows_VD: gradients of `combine`."""

    def combine(self, rows_VD: Tensor, handle: Any, weights_VK: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The sum of the rows of each token, (T, D), and with weights_VK its entries at home, (T, K).

        Args:
            weights_VK: in backward, gradients of the weights received.
        """


class AsyncDispatchBackend(DispatchBackend, Protocol):
    """A dispatch back end whose calls can be in flight while experts compute, for `dispatch.overlap`."""

    def start(self, call: str, *arguments: Any) -> Callable[[], Any]:
        """Starts `dispatch`, `dispatch_again` or `combine` with its arguments.

        Several calls may be in flight. Every rank starts them, and waits for them, in the same order.

        Returns:
            A function that is called once: it waits, and returns what the call returns.
        """


class ExpertsBackend(Protocol):
    """Computes the SwiGLU experts of one rank; differentiable in x, the routing weights and both stacks of weights."""

    def __call__(
        self, x_VD: Tensor, ids_VK: Tensor, weights_VK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        """y[v] = sum over k of weights[v, k] * down (silu(gate x[v]) * (up x[v])) of the expert ids[v, k].

        Args:
            x_VD: rows.
            ids_VK: int64, local experts, -1 where there is none.
            weights_VK: routing weights.
            gate_up_EGD: (e, 2F, D), gate first.
            down_EDF: (e, D, F).
        """


@functools.cache
def load(path: str, name: str) -> Any:
    """The back end `module:name` of a config path.

    Raises:
        ConfigError: it cannot be imported, or is not one.
    """
    try:
        found = imported(path, name)
    except Exception as error:
        rule = f"cannot be imported: {type(error).__name__}: {error}"
        raise ConfigError(path, name, rule, "Give module:name, of a module that Python finds on every rank") from error
    wanted = ("dispatch", "dispatch_again", "combine") if path == DISPATCH else ("__call__",)
    if missing := [method for method in wanted if not callable(getattr(found, method, None))]:
        rule = f"has no {' and no '.join(missing)}"
        raise ConfigError(path, name, rule, "See moecompile.DispatchBackend and moecompile.ExpertsBackend")
    return found


def _outside_of_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """torch.compile leaves its graph here."""
    kept: Callable[P, R] = torch.compiler.disable(function)
    return kept


def count_sent_bytes(group: dist.ProcessGroup, sent: list[int]) -> None:
    """Counts what a back end has sent over `group`, for the bytes of a run.

    Args:
        group: the group that the back end was called with.
        sent: bytes to each of its ranks.
    """
    traffic.add(group, sent)


def check_dispatch_backend(name: str, overlap: str) -> None:
    """Checks that a back end can be imported and, with overlap, that its calls can be started.

    Raises:
        ConfigError: it cannot.
    """
    if not callable(getattr(load(DISPATCH, name), "start", None)) and overlap != "none":
        raise ConfigError(
            "dispatch.overlap", overlap, f"{DISPATCH}={name} has no start, so its calls are finished when they "
            "return", "Use dispatch.overlap=none, or give it a start: see moecompile.AsyncDispatchBackend",
        )  # fmt: skip


# -- routing, dispatch, combine ---------------------------------------------------------------------------------------
#
# Each is a start and a wait. Autograd runs along a token with the shape of the rows sent and no memory, as in
# moecompile.ops.in_flight: the backward of a wait starts the way back, and that of the start waits for it.


@dataclass
class Flight:
    """A call that has been started. wait: for its result. back: for what backward has started under it."""

    wait: Callable[[], Any] | None = None
    back: Callable[[], Any] | None = None


def _start(backend: Any, call: str, *arguments: Any) -> Callable[[], Any]:
    """Starts a call; one of a back end that cannot do this is finished at once."""
    if callable(getattr(backend, "start", None)):
        waits: Callable[[], Any] = backend.start(call, *arguments)
        return waits
    result = getattr(backend, call)(*arguments)
    return lambda: result


@_outside_of_graphs
def dispatch_tokens_start(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, backend: str, axis: str
) -> tuple[Tensor, Flight]:
    """Starts to send tokens to the ranks of their experts; ids without an expert are -1 for a back end."""
    given_TK, flight = torch.where(ids_TK < num_experts, ids_TK, -1), Flight()
    arguments = (x_TD, weights_TK, given_TK, num_experts, load(DISPATCH, backend), axis, flight)
    return _StartDispatch.apply(*arguments), flight  # type: ignore[no-untyped-call]


@_outside_of_graphs
def dispatch_tokens_wait(token_TD: Tensor, flight: Flight, num_experts: int, backend: str, axis: str) -> Dispatched:
    """The rows of this rank's experts; ids without an expert are `e` for `permute`."""
    arguments = (token_TD, flight, load(DISPATCH, backend))
    rows, ids, weights, handle = _WaitDispatch.apply(*arguments)  # type: ignore[no-untyped-call]
    return Dispatched(rows, torch.where(ids < 0, num_experts // group_of(axis).size(), ids), weights, handle)


@_outside_of_graphs
def dispatch_tokens(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, backend: str, axis: str
) -> Dispatched:
    """Both."""
    started = dispatch_tokens_start(x_TD, ids_TK, weights_TK, num_experts, backend, axis)
    return dispatch_tokens_wait(*started, num_experts, backend, axis)


@_outside_of_graphs
def combine_tokens_start(rows_VD: Tensor, handle: Any, x_TD: Tensor, backend: str, axis: str) -> tuple[Tensor, Flight]:
    """Starts to return the rows."""
    flight = Flight()
    return _StartCombine.apply(rows_VD, handle, load(DISPATCH, backend), flight), flight  # type: ignore[no-untyped-call]


@_outside_of_graphs
def combine_tokens_wait(token_VD: Tensor, flight: Flight, handle: Any, x_TD: Tensor, backend: str, axis: str) -> Tensor:
    """The sum of the rows of each token, shaped like x_TD."""
    arguments = (token_VD, flight, handle, load(DISPATCH, backend))
    out: Tensor = _WaitCombine.apply(*arguments)  # type: ignore[no-untyped-call]
    if out.shape != x_TD.shape:
        raise MoecompileError(f"{DISPATCH}={backend}: combine returned {tuple(out.shape)}, not {tuple(x_TD.shape)}")
    return out


@_outside_of_graphs
def combine_tokens(rows_VD: Tensor, handle: Any, x_TD: Tensor, backend: str, axis: str) -> Tensor:
    """Both."""
    started = combine_tokens_start(rows_VD, handle, x_TD, backend, axis)
    return combine_tokens_wait(*started, handle, x_TD, backend, axis)


CALLS: dict[str, Callable[..., Any]] = {
    "dispatch_tokens_start": dispatch_tokens_start,
    "dispatch_tokens_wait": dispatch_tokens_wait,
    "combine_tokens_start": combine_tokens_start,
    "combine_tokens_wait": combine_tokens_wait,
}
"""The halves of the calls in a graph, by name: they are functions, not registered ops."""


class _StartDispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, ids: Tensor, num_experts: int, backend: Any, axis: str, flight: Flight
    ) -> Tensor:
        if not _kept.replays:
            flight.wait = _start(backend, "dispatch", x, ids, weights, num_experts, group_of(axis))
        ctx.flight = flight
        return _token(x)

    @staticmethod
    def backward(ctx: Any, grad_token: Tensor) -> Any:
        x_TD, weights_TK = ctx.flight.back()
        return x_TD, weights_TK, None, None, None, None, None


class _WaitDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, flight: Flight, backend: Any) -> Any:
        rows, ids, weights, handle = _kept.result_of(flight)
        ctx.backend, ctx.flight, ctx.handle = backend, flight, handle
        ctx.save_for_backward(token)  # a forward that is computed again goes on until here: no call is left in flight
        ctx.mark_non_differentiable(ids)
        return rows, ids, weights, handle

    @staticmethod
    def backward(ctx: Any, grad_VD: Tensor, _ids: Any, grad_VK: Tensor, _handle: Any) -> Any:
        arguments = (grad_VD.contiguous(), ctx.handle, grad_VK.contiguous())
        ctx.flight.back = _start(ctx.backend, "combine", *arguments)
        return _token(ctx.saved_tensors[0]), None, None


class _StartCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, handle: Any, backend: Any, flight: Flight) -> Tensor:
        if not _kept.replays:
            flight.wait = _start(backend, "combine", rows, handle, None)
        ctx.flight = flight
        return _token(rows)

    @staticmethod
    def backward(ctx: Any, grad_token: Tensor) -> Any:
        return ctx.flight.back(), None, None, None


class _WaitCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, flight: Flight, handle: Any, backend: Any) -> Any:
        ctx.backend, ctx.flight, ctx.handle = backend, flight, handle
        ctx.save_for_backward(token)  # a forward that is computed again goes on until here: no call is left in flight
        return _kept.result_of(flight)[0]

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> Any:
        ctx.flight.back = _start(ctx.backend, "dispatch_again", grad_TD.contiguous(), ctx.handle)
        return _token(ctx.saved_tensors[0]), None, None, None


def _token(like: Tensor) -> Tensor:
    return like.new_zeros(()).expand(like.shape)


class KeptCalls:
    """Results of the calls of a forward, for the same forward that is computed again in backward."""

    def __init__(self) -> None:
        self.results: list[tuple[Any, ...]] = []

    @contextmanager
    def first(self) -> Iterator[None]:
        """Inside, results are kept."""
        self.results.clear()
        with _kept.during(self.results.append, None):
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, nothing is called: results are those of the first forward, in the same order."""
        with _kept.during(None, iter(self.results)):
            yield


class _Kept:
    """What becomes of results now: they are kept, taken from those that were kept, or neither."""

    keep: Callable[[tuple[Any, ...]], None] | None = None
    replays: Iterator[tuple[Any, ...]] | None = None

    @contextmanager
    def during(
        self, keep: Callable[[tuple[Any, ...]], None] | None, replays: Iterator[tuple[Any, ...]] | None
    ) -> Iterator[None]:
        before = self.keep, self.replays
        self.keep, self.replays = keep, replays
        try:
            yield
        finally:
            self.keep, self.replays = before

    def result_of(self, flight: Flight) -> tuple[Any, ...]:
        """The result of a call, as tensors that no autograd graph knows yet."""
        if self.replays is not None:
            result = next(self.replays)
        else:
            assert flight.wait is not None
            landed(None)
            result = tuple(flight.wait())
        if self.keep is not None:
            self.keep(_unconnected(result))
        return _unconnected(result)


def _unconnected(result: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.detach() if isinstance(each, Tensor) else each for each in result)


_kept = _Kept()


# -- the experts of one rank ------------------------------------------------------------------------------------------


@_outside_of_graphs
def experts_by(backend: str, max_per_token: int, rows: RaggedRows, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """`expert_ffn` by a back end; a row of the input has at most `max_per_token` of the local experts."""
    ids_VK, weights_VK = by_row(rows, min(max_per_token, gate_up_EGD.shape[0]))
    out: Tensor = load(EXPERTS, backend)(rows.x_VD, ids_VK, weights_VK, gate_up_EGD, down_EDF)
    if out.shape != rows.x_VD.shape or out.dtype != rows.x_VD.dtype:
        got, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (out, rows.x_VD))
        raise MoecompileError(f"{EXPERTS}={backend}: returned {got}, not {wanted}")
    return out


def by_row(rows: RaggedRows, width: int) -> tuple[Tensor, Tensor]:
    """Rows as ids_VK, -1 where a row of the input has fewer than `width`, and weights_VK; differentiable."""
    num_rows, (_, source_R, weights_R, counts_E) = rows.x_VD.shape[0], rows
    expert_R = torch.repeat_interleave(counts_E, output_size=source_R.shape[0])
    order_R = torch.argsort(source_R, stable=True)
    row_R = source_R.index_select(0, order_R)
    per_row_V = row_R.new_zeros(num_rows).index_add_(0, row_R, torch.ones_like(row_R))
    before_V = per_row_V.cumsum(0) - per_row_V
    slot_R = torch.arange(row_R.shape[0], device=row_R.device) - before_V.index_select(0, row_R)
    ids_VK = expert_R.new_full((num_rows, width), -1).index_put_((row_R, slot_R), expert_R.index_select(0, order_R))
    empty_VK = weights_R.new_zeros(num_rows, width)
    return ids_VK, empty_VK.index_put((row_R, slot_R), weights_R.index_select(0, order_R))
