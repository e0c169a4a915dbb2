"""CPU kernels, compiled from the C++ files in this directory on first use, once per machine.

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
from pathlib import Path

from torch import Tensor

from moecompile.atomic import locked, replacing

SOURCES = tuple(Path(__file__).with_name(name) for name in ("swiglu.cpp", "products.cpp", "narrow_rows.cpp"))
_FLAGS = (
    "-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing", "-shared",
    "-fPIC",
)  # fmt: skip
# Function -> number of tensor arguments, number of sizes.
_ALWAYS = {
    "forward_f32": (3, 2),
    "forward_bf16": (3, 2),
    "backward_f32": (6, 2),
    "backward_bf16": (6, 2),
    "transpose_16bit": (2, 2),
    "pack_f32": (2, 4),
    "pack_bf16": (2, 4),
    "unpack_f32": (2, 4),
    "unpack_bf16": (2, 4),
}
_PRODUCTS = {
    f"{name}_{suffix}": (4, 3)
    for name in ("product_transposed", "product", "product_gradient")
    for suffix in ("f32", "bf16", "bf16_wide")
}
_TIMEOUT_S = 120


class Kernels:
    """The compiled functions. Tensors must be contiguous, on the CPU, and of the dtypes in the C++ files.

    has_products: whether the processor supports products.cpp.
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
        """Calls one function with the data pointers of the tensors, then the sizes."""
        self._functions[name](*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


@functools.cache
def kernels() -> Kernels | None:
    """The kernels, or None if they cannot be built."""
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
    """The library in the user's cache directory; if several ranks need it at once, one builds it, the others wait."""
    sources = [source.read_text(encoding="utf-8") for source in SOURCES]
    key = hashlib.sha256("\0".join((*sources, compiler, *_FLAGS, processor())).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moecompile"
    library = folder / f"kernels-{key}.so"
    if not library.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(folder / f"{library.stem}.lock"):  # without locks each rank builds its own
            if library.exists():
                return library
            with replacing(library) as output:
                command = [compiler, *_FLAGS, *map(str, SOURCES), "-o", str(output)]
                subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
    return library


@functools.cache
def processor() -> str:
    """What `-march=native` depends on. Part of the key, because machines may share a home directory."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = sorted(
        {line for line in lines if line.startswith(("vendor_id", "model name", "flags", "Features", "CPU part"))}
    )
    return "\n".join((platform.machine(), *features))
