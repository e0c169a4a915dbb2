"""Back ends of the tests, in plain torch: one that sends a token once to each rank, and one that loops over experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import moecompile


class _Handle(NamedTuple):
    """index_U: the token of each row sent. sent, received: rows to and from each rank. used_UK: assignments sent."""

    index_U: Tensor
    sent: list[int]
    received: list[int]
    used_UK: Tensor
    num_tokens: int
    group: dist.ProcessGroup


class OncePerRank:
    """A row for each (token, rank), with all of its ids and weights; those of other ranks are -1 and 0."""

    def dispatch(self, *arguments: Any) -> moecompile.Dispatched:
        return self._dispatch(*arguments)()

    def dispatch_again(self, x_TD: Tensor, handle: _Handle) -> Tensor:
        return self._dispatch_again(x_TD, handle)()

    def combine(self, rows_VD: Tensor, handle: _Handle, weights_VK: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._combine(rows_VD, handle, weights_VK)()

    def _dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, group: dist.ProcessGroup
    ) -> Callable[[], moecompile.Dispatched]:
        each = num_experts // group.size()
        there = [(ids_TK >= rank * each) & (ids_TK < (rank + 1) * each) for rank in range(group.size())]
        index = [used.any(1).nonzero().flatten() for used in there]
        sent = torch.tensor([rows.numel() for rows in index])
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        ids = torch.cat(
            [torch.where(u, ids_TK - r * each, -1)[i] for r, (u, i) in enumerate(zip(there, index, strict=True))]
        )
        used = torch.cat([u[i] for u, i in zip(there, index, strict=True)])
        handle = _Handle(torch.cat(index), sent.tolist(), received.tolist(), used, x_TD.shape[0], group)
        rows = _exchange(x_TD[handle.index_U], handle)
        weights = _exchange(torch.where(used, weights_TK[handle.index_U], 0), handle)
        numbers = _exchange(ids, handle)
        return lambda: moecompile.Dispatched(rows(), numbers(), weights(), handle)

    def _dispatch_again(self, x_TD: Tensor, handle: _Handle) -> Callable[[], Tensor]:
        return _exchange(x_TD[handle.index_U], handle)

    def _combine(
        self, rows_VD: Tensor, handle: _Handle, weights_VK: Tensor | None
    ) -> Callable[[], tuple[Tensor, Tensor | None]]:
        def summed(rows: Tensor) -> Tensor:
            return rows.new_zeros(handle.num_tokens, rows.shape[1]).index_add_(0, handle.index_U, rows)

        rows = _exchange(rows_VD, handle, back=True)
        if weights_VK is None:
            return lambda: (summed(rows()), None)
        weights = _exchange(weights_VK, handle, back=True)
        return lambda: (summed(rows()), summed(torch.where(handle.used_UK, weights(), 0)))


def _exchange(rows: Tensor, handle: _Handle, *, back: bool = False) -> Callable[[], Tensor]:
    """Starts to send rows; the result waits for those that are received."""
    sent, received = (handle.received, handle.sent) if back else (handle.sent, handle.received)
    rows, out = rows.contiguous(), rows.new_empty(sum(received), rows.shape[1])
    work = dist.all_to_all_single(out, rows, received, sent, group=handle.group, async_op=True)
    moecompile.count_sent_bytes(handle.group, [n * rows.shape[1] * rows.element_size() for n in sent])

    def landed(sent: Tensor = rows) -> Tensor:  # which is alive until here
        work.wait()
        return out

    return landed


once_per_rank = OncePerRank()


class InFlight(OncePerRank):
    """Its calls can be started. `most`: how many were in flight at the same time; `made`: how often each was made."""

    def __init__(self) -> None:
        self.now, self.most, self.made = 0, 0, Counter[str]()

    def start(self, call: str, *arguments: Any) -> Callable[[], Any]:
        self.now, self.made[call] = self.now + 1, self.made[call] + 1
        self.most = max(self.most, self.now)
        wait = getattr(self, f"_{call}")(*arguments)

        def landed() -> Any:
            self.now -= 1
            return wait()

        return landed


in_flight = InFlight()


class _WrongWay(OncePerRank):
    """Returns gradients of rows in another order."""

    def _dispatch_again(self, x_TD: Tensor, handle: _Handle) -> Callable[[], Tensor]:
        wait = super()._dispatch_again(x_TD, handle)
        return lambda: wait().flip(0)


wrong_way = _WrongWay()


def one_by_one(x_VD: Tensor, ids_VK: Tensor, weights_VK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """Every expert on all rows; those that did not choose it count nothing."""
    y_VD = torch.zeros_like(x_VD)
    for expert, (gate_up, down) in enumerate(zip(gate_up_EGD, down_EDF, strict=True)):
        gate, up = (x_VD @ gate_up.T.to(x_VD.dtype)).chunk(2, -1)
        weight_V = torch.where(ids_VK == expert, weights_VK, 0).sum(1, keepdim=True)
        y_VD = y_VD + (weight_V * ((F.silu(gate) * up) @ down.T.to(x_VD.dtype))).to(x_VD.dtype)
    return y_VD


def transposed(*arguments: Any) -> Tensor:
    """Returns another shape."""
    return one_by_one(*arguments).T


not_callable = 3
