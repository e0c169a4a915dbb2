"""Kernels for a CPU, compiled from the C++ files here when they are first needed, once a machine.

Without a C++ compiler, or with MOECOMPILE_NATIVE=0, torch's own functions do the same, slower.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from torch import Tensor

SOURCES = tuple(Path(__file__).with_name(name) for name in ("swiglu.cpp", "products.cpp"))
_FLAGS = (
    "-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing", "-shared",
    "-fPIC",
)  # fmt: skip
# Function -> how many tensors and how many sizes it takes.
_ALWAYS = {
    "forward_f32": (3, 2),
    "forward_bf16": (3, 2),
    "backward_f32": (6, 2),
    "backward_bf16": (6, 2),
    "transpose_16bit": (2, 2),
}
_PRODUCTS = {
    f"{name}_{suffix}": (4, 3)
    for name in ("product_transposed", "product", "product_gradient")
    for suffix in ("f32", "bf16", "bf16_wide")
}
_TIMEOUT_S = 120


class Kernels:
    """The compiled functions; tensors are contiguous, on the CPU, of the types that the C++ files name.

    has_products: whether the processor can run those of products.cpp.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {}
        self.has_products = bool(library.has_products())
        for name, (tensors, sizes) in (_ALWAYS | (_PRODUCTS if self.has_products else {})).items():
            function = getattr(library, name)
            function.argtypes = [ctypes.c_void_p] * tensors + [ctypes.c_int64] * sizes
            function.restype = None
            self._functions[name] = function

    def __call__(self, name: str, *arguments: Tensor | int) -> None:
        """Runs one function on the tensors' memory; the sizes follow."""
        self._functions[name](*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


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
    """The library in the user's cache; of ranks that need it at the same time one builds it, and the others wait."""
    sources = [source.read_text(encoding="utf-8") for source in SOURCES]
    key = hashlib.sha256("\0".join((*sources, compiler, *_FLAGS, processor())).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moecompile"
    library = folder / f"kernels-{key}.so"
    if not library.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / f"{library.stem}.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=folder) as scratch:
            with suppress(OSError):  # a file system without locks: each builds its own
                fcntl.flock(lock, fcntl.LOCK_EX)  # the end of a process, however it comes, gives it back
            if library.exists():
                return library
            made = Path(scratch, "kernels.so")
            command = [compiler, *_FLAGS, *map(str, SOURCES), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
            made.replace(library)
    return library


@functools.cache
def processor() -> str:
    """What `-march=native` depends on: a home directory may be shared by machines."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    known = sorted(
        {line for line in lines if line.startswith(("vendor_id", "model name", "flags", "Features", "CPU part"))}
    )
    return "\n".join((platform.machine(), *known))
