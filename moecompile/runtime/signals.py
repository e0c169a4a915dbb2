"""Being asked to end: a rank that trains finishes its step and saves, any other one ends at once.

A rank that waits in C++ (a collective) never reaches a signal handler of Python. The wake-up descriptor is written to
even then, and a thread reads it:

    a rank has failed before      SIGTERM is how launchers end the others: leave, and tell what happened if nobody has
    nothing is being trained      leave at once
    the first signal              remember it; training looks at `requested()` after each step, on all ranks together
    the second one                leave at once (with a launcher of ours, that one says so by SIGKILL)
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from moecompile.errors import MoecompileError

ASKING = (signal.SIGTERM, signal.SIGINT)
_FAILURE_S = 1.5
"""Seconds after a SIGTERM in which a failure of another rank shows, if there was one."""
_SECOND_S = 1.0
"""Signals closer together are one request: a launcher and its terminal may both send it."""


class Stopped(MoecompileError):
    """The run was asked to end. step: the optimizer step that was saved last; None: none was."""

    def __init__(self, number: int, step: int | None = None) -> None:
        self.number, self.step = number, step
        self.exit_code = 128 + number
        saved = "nothing was saved" if step is None else f"step {step} is saved"
        super().__init__(f"ended by {signal.Signals(number).name}: {saved}")


@dataclass
class _State:
    requested: int = 0
    at: float = 0.0
    is_training: bool = False
    hooks: list[Callable[[], None]] = field(default_factory=list)


_state = _State()


def requested() -> int:
    """The signal that asked this rank to end, 0: none yet."""
    return _state.requested


@contextmanager
def training() -> Iterator[None]:
    """A signal is answered after the step, not at once."""
    _state.is_training = True
    try:
        yield
    finally:
        _state.is_training = False


def quiet() -> None:
    """Leaves the signals to the thread. Lightning puts a handler in its place, which starts a collective."""
    if threading.current_thread() is threading.main_thread() and _state.hooks:
        for number in ASKING:
            signal.signal(number, _nothing)


def watch(
    *, failed: Callable[[], bool], leave: Callable[[int], object], is_orphan: Callable[[], bool], counts: bool
) -> None:
    """Starts the thread.

    Args:
        failed: whether another rank has failed. leave: ends this process with an exit code; tells first what happened.
        is_orphan: whether the launcher is gone. counts: whether a second signal ends at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _state.hooks.append(quiet)
    quiet()

    def listen() -> None:
        while not is_orphan():
            if select.select([reader], [], [], 0.5)[0]:
                for number in os.read(reader, 64):
                    if number in ASKING:
                        _answer(number, failed, leave, counts=counts)
        leave(128 + signal.SIGTERM)

    threading.Thread(target=listen, name="signals", daemon=True).start()


def _answer(number: int, failed: Callable[[], bool], leave: Callable[[int], object], *, counts: bool) -> None:
    now = time.monotonic()
    ends = number == signal.SIGTERM and _shows_within(failed, _FAILURE_S)
    again = counts and _state.requested != 0 and now - _state.at > _SECOND_S
    if ends or again or not _state.is_training:
        leave(128 + number)
    elif not _state.requested:
        _state.requested, _state.at = number, now


def _shows_within(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _nothing(number: int, frame: object) -> None:
    """Python's handler: there must be one, or the signal would end the process."""
