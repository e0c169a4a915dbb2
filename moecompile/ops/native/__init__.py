"""SwiGLU kernels for a CPU, compiled from `swiglu.cpp` when they are first needed, once a machine.

Without a C++ compiler, or with MOECOMPILE_NATIVE=0, torch's own functions do the same, slower.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

SOURCE = Path(__file__).with_name("swiglu.cpp")
_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_SIGNATURES = {"forward": 3, "backward": 6, "transpose": 2}  # how many tensors; two sizes follow
_TIMEOUT_S = 120


class Kernels:
    """The compiled functions; tensors are contiguous, on the CPU, fp32 or bf16 (moecompile/ops/native/swiglu.cpp)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {}
        for name in ("forward_f32", "forward_bf16", "backward_f32", "backward_bf16", "transpose_16bit"):
            function = getattr(library, name)
            tensors = _SIGNATURES[name.partition("_")[0]]
            function.argtypes = [ctypes.c_void_p] * tensors + [ctypes.c_int64] * 2
            function.restype = None
            self._functions[name] = function

    def __call__(self, name: str, *tensors: Tensor, rows: int, width: int) -> None:
        """Runs one function on the tensors' memory."""
        self._functions[name](*(tensor.data_ptr() for tensor in tensors), rows, width)


@functools.cache
def kernels() -> Kernels | None:
    """The kernels, or None where they cannot be built."""
    if os.environ.get("MOECOMPILE_NATIVE") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        return None
    try:
        return Kernels(ctypes.CDLL(str(_built(compiler))))
    except (OSError, subprocess.SubprocessError):
        return None


def _built(compiler: str) -> Path:
    """The library in the user's cache; ranks that build it at the same time do not disturb each other."""
    key = hashlib.sha256("\0".join((SOURCE.read_text(), compiler, *_FLAGS, _processor())).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moecompile"
    library = folder / f"swiglu-{key}.so"
    if not library.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, "swiglu.so")
            command = [compiler, *_FLAGS, str(SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
            made.replace(library)
    return library


def _processor() -> str:
    """What `-march=native` depends on: a home directory may be shared by machines."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    known = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return "\n".join((platform.machine(), *known))
