"""Wall time of a run, from the start of the process that the user started."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STARTED = "MOECOMPILE_STARTED"
"""Environment variable for ranks: start of their launcher, in seconds since boot."""

_began: list[float] = []


def begin() -> None:
    """Starts the clock of a run; that of the first run in a process started with the process."""
    _began.append(_now() if _began else _process_start())
    os.environ[_STARTED] = str(_began[-1])


def seconds() -> float:
    """Seconds since the start of the run, in its launcher and on its ranks."""
    started = os.environ.get(_STARTED)
    return _now() - (float(started) if started else _process_start())


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _process_start() -> float:
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")
