"""What the fork server of `launch` imports first, and no other process: it ends with its launcher.

By itself it would look whether its launcher is there once it has imported everything.
"""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1

if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
