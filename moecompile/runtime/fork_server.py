"""What the fork server of `launch` imports first, and no other process: it ends with its launcher.

By itself it would look whether its launcher is there once it has imported everything.

Nothing that it imports is garbage, so nothing is collected while it imports, which would take a fifth of the time. What
it forks collects its own objects alone, and leaves the pages of the others shared.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_SERVER = os.getpid()


def _collect_again() -> None:
    if os.getppid() == _SERVER:  # not what a rank forks: that has garbage of the rank
        gc.freeze()
        gc.enable()


gc.disable()
os.register_at_fork(after_in_child=_collect_again)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
