"""Two computations of a rank that take turns: while the rows of one are on the wire, the other one computes.

A pipeline runs the forward of one micro-batch beside the backward of another (moecompile.runtime.pipeline). Each has a
thread, and only the thread with the baton runs. It hands the baton over where it would wait for rows of an exchange,
so the order of exchanges follows from the program, not from time: ranks of a group begin them in one order.

What torch and moecompile keep for "the computation that runs" (random numbers, padding masks, what FSDP2's root is
doing) is exchanged with the baton: see `Kept`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from moecompile.errors import MoecompileError


@dataclass(frozen=True)
class Kept:
    """A place for a value of the computation that runs. read, write: that place."""

    read: Callable[[], Any]
    write: Callable[[Any], None]


class Baton:
    """Of two computations, 0 and 1; 0 has it first.

    Attributes:
        turn: who has it. handed_over: how often it went from one to the other.
    """

    def __init__(self, kept: Sequence[Kept]) -> None:
        self.turn, self.handed_over = 0, 0
        self._kept = kept
        self._values = [[each.read() for each in kept]] * 2
        self._is_over, self._waits, self._failed = [False, False], [False, False], False
        self._changed = threading.Condition()

    def hand_over(self) -> None:
        """Lets the other one run until it hands over or is over; returns at once if it is.

        Raises:
            MoecompileError: the other one failed.
        """
        own = self.turn
        if not self._is_over[1 - own] and not self._waits[1 - own]:
            self._pass_on(own)
            self.take(own)
        self._check()

    def await_other(self) -> None:
        """Goes on when the other one is over: what comes now concerns both.

        Raises:
            MoecompileError: the other one failed.
        """
        own = self.turn
        if not self._is_over[1 - own]:
            self._waits[own] = True
            self._pass_on(own)
            self.take(own)
        self._check()

    def take(self, own: int) -> None:
        """Waits for the turn of a computation, whose values are there then."""
        with self._changed:
            self._changed.wait_for(lambda: self.turn == own)
        self.restore(own)

    def restore(self, own: int) -> None:
        """Writes the values of a computation."""
        for each, value in zip(self._kept, self._values[own], strict=True):
            each.write(value)

    def end(self, own: int, *, failed: bool) -> None:
        """The computation is over, and the other one runs to its end."""
        self._failed, self._is_over[own] = self._failed or failed, True
        self._pass_on(own)

    def _check(self) -> None:
        if self._failed:
            raise MoecompileError("the forward or the backward beside this one failed")

    def _pass_on(self, own: int) -> None:
        self._values[own] = [each.read() for each in self._kept]
        self.handed_over += 1
        with self._changed:
            self.turn = 1 - own
            self._changed.notify_all()


_shared: list[Baton] = []  # that of the pair that runs, if one does


def landed(work: dist.Work | None, *, hands_over: bool = True) -> None:
    """Waits for an exchange that was begun; the other computation, if there is one, runs before.

    hands_over: false of small exchanges (counts, weights and codes), for which what is computed between two of them is
    too short to hide rows of the other computation.
    """
    for baton in _shared if hands_over else ():
        baton.hand_over()
    if work is not None:
        work.wait()


def is_shared() -> bool:
    """Whether another computation runs beside this one, so that an exchange is begun before it is waited for."""
    return bool(_shared)


def together(
    first: Callable[[Baton], Any], second: Callable[[Baton], Any], executor: Executor, kept: Sequence[Kept]
) -> Baton:
    """Runs `first` in this thread and `second` in one of the executor, in turns; returns when both are over.

    What is kept has the values then that `first` left.

    Raises:
        Exception: that of the one that failed first.
    """
    baton = Baton(kept)
    errors: list[BaseException] = []

    def run(own: int, compute: Callable[[Baton], Any]) -> None:
        try:
            baton.take(own)
            compute(baton)
        except BaseException as error:
            errors.append(error)
        finally:
            baton.end(own, failed=bool(errors))

    _shared.append(baton)
    try:
        beside = executor.submit(run, 1, second)
        run(0, first)
        beside.result()
        baton.restore(0)
    finally:
        _shared.clear()
    if errors:
        raise errors[0]
    return baton
