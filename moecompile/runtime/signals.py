"""Signals that end a run: a rank that trains finishes its step and saves, any other rank ends immediately.

A rank that waits in C++ (a collective) does not run signal handlers of Python. The wake-up descriptor is written even
then, and a thread reads it:

    SIGUSR1                       a batch system's warning that time is running out: record it, also before training
    a rank has failed before      launchers end the others by SIGTERM: exit, and report the failure if no rank has
    nothing is being trained      exit immediately
    the first signal              record it; training checks `requested()` after each step, on all ranks together
    the second one                exit immediately (our own launcher sends SIGKILL then)
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
WARNING = signal.SIGUSR1
IGNORED_AT_THE_END = (*ASKING, WARNING)
_FAILURE_S = 1.5
"""Seconds after a SIGTERM within which a failure of another rank becomes visible."""
_SECOND_S = 1.0
"""Signals within this time are one request: a launcher and its terminal may both send it."""


class Stopped(MoecompileError):
    """A signal has ended the run.

    Args:
        step: the optimizer step that was saved last; None: none was.
        num_steps: optimizer steps since the run was started or resumed.
    """

    def __init__(self, number: int, step: int | None = None, num_steps: int = 0) -> None:
        self.number, self.step, self.num_steps = number, step, num_steps
        self.exit_code = 128 + number
        saved = "nothing was saved" if step is None else f"step {step} is saved"
        super().__init__(f"ended by {signal.Signals(number).name}: {saved}")


@dataclass
class _State:
    requested: int = 0
    at: float | None = None  # of the first signal but the warning
    is_training: bool = False
    hooks: list[Callable[[], None]] = field(default_factory=list)


_state = _State()


def requested() -> int:
    """The signal that this rank has received; 0: none yet."""
    return _state.requested


@contextmanager
def training() -> Iterator[None]:
    """Within it, a signal takes effect after the current step, not immediately."""
    _state.is_training = True
    try:
        yield
    finally:
        _state.is_training = False


def quiet() -> None:
    """Leaves the signals to the thread again. Lightning sets its own handler, which starts a collective."""
    if threading.current_thread() is threading.main_thread() and _state.hooks:
        for number in (*ASKING, WARNING):
            signal.signal(number, _nothing)


def watch(
    *, failed: Callable[[], bool], leave: Callable[[int], object], is_orphan: Callable[[], bool], counts: bool
) -> None:
    """Starts the thread.

    Args:
        failed: whether another rank has failed. leave: reports, and ends this process with an exit code.
        is_orphan: whether the launcher is gone. counts: whether a second signal ends this process immediately.
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
                    if number == WARNING:
                        _state.requested = _state.requested or number
                    elif number in ASKING:
                        _answer(number, failed, leave, counts=counts)
        leave(128 + signal.SIGTERM)

    threading.Thread(target=listen, name="signals", daemon=True).start()


def _answer(number: int, failed: Callable[[], bool], leave: Callable[[int], object], *, counts: bool) -> None:
    now = time.monotonic()
    ends = number == signal.SIGTERM and _shows_within(failed, _FAILURE_S)
    again = counts and _state.at is not None and now - _state.at > _SECOND_S
    if ends or again or not _state.is_training:
        leave(128 + number)
    elif _state.at is None:
        _state.requested, _state.at = _state.requested or number, now


def _shows_within(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _nothing(number: int, frame: object) -> None:
    """Python's handler: without one, the signal would end the process."""
