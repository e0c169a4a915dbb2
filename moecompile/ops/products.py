"""Matrix products of bf16 on a CPU, by whichever arithmetic is faster there.

With matrix tiles (AMX) a processor multiplies bf16 many times as fast as fp32. Without, it may be slower: half as fast
where fp32 has twice the units, and far slower where bf16 is emulated. Then factors are widened, a block at a time, and
only the product is rounded. As both add in fp32 and round once, results differ by the order of additions alone.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

VARIABLE = "MOECOMPILE_WIDE_PRODUCTS"
_FEW_ROWS = 24  # with fewer, reading the weight is what takes the time
_TRIALS, _GAIN = 3, 0.8


class Products:
    """out = a b, for products one after the other that share scratch memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.is_wide = dtype is torch.bfloat16 and faster_wide()
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, rows: int) -> None:
        """Writes the product. rows: of tokens, the smallest of the three sizes where experts are small."""
        if not self.is_wide or rows < _FEW_ROWS:
            torch.mm(a_MK, b_KN, out=out_MN)
            return
        a, b = self._like("a", a_MK).copy_(a_MK), self._like("b", b_KN).copy_(b_KN)
        out_MN.copy_(torch.mm(a, b, out=self._like("out", out_MN)))

    def _like(self, name: str, tensor: Tensor) -> Tensor:
        """fp32 memory in the layout of `tensor`, which is one matrix, transposed or not."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < tensor.numel():
            buffer = self._buffers[name] = torch.empty(tensor.numel())
        return buffer.as_strided(tensor.shape, tensor.stride())


@functools.cache
def faster_wide() -> bool:
    """Whether this processor multiplies bf16 faster in fp32: tried once, in 10 to 50 ms, or as the environment says."""
    given = os.environ.get(VARIABLE)
    if given in ("0", "1"):
        return given == "1"
    a, b, out = torch.ones(256, 512).bfloat16(), torch.ones(512, 512).bfloat16(), torch.empty(256, 512).bfloat16()
    wide_a, wide_b, wide_out = a.float(), b.float(), out.float()

    def widened() -> None:
        torch.mm(wide_a.copy_(a), wide_b.copy_(b), out=wide_out)
        out.copy_(wide_out)

    return _seconds(widened) < _GAIN * _seconds(lambda: torch.mm(a, b, out=out))


def _seconds(f: Callable[[], object]) -> float:
    """The fastest of some runs after a first one."""
    f()
    found = []
    for _ in range(_TRIALS):
        start = time.perf_counter()
        f()
        found.append(time.perf_counter() - start)
    return min(found)
