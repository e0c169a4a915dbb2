"""Matrix products of experts on a CPU, with the fastest method for the processor.

Rows: if experts have few rows, reading the weights dominates, and a library product copies them first. Our own kernel
reads them in place (moecompile/ops/cpu/products.cpp).

bf16: with matrix tiles (AMX) a processor multiplies bf16 many times as fast as fp32. Without, it may be slower: half as
fast if fp32 has twice the units, and far slower if bf16 is emulated. Then factors are widened to fp32, a block at a
time, and only the product is rounded. Both add in fp32 and round once, so results differ only in the order of sums.

Legend: M rows of a block, K and N the widths of a weight, E experts.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moecompile.ops.cpu.blocks import TILE, Block
from moecompile.ops.cpu.native import kernels, processor

VARIABLE = "MOECOMPILE_WIDE_PRODUCTS"
_FEW_ROWS = 24  # with fewer, widening a weight takes longer than its product
_TRIALS, _GAIN = 3, 0.8
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
# Average rows per expert up to which the kernel is faster than a library; benchmarks/layer.py.
_MOST_ROWS, _MOST_ROWS_BESIDE_TILES = 128, 16
_CACHE_BYTES = 1 << 20  # the working set that the kernel reads repeatedly must fit
_MULTIPLE = 64  # of both widths
_ALIGNMENT_BYTES = 64


class Products:
    """Products for consecutive blocks of experts, with shared scratch memory, of factors like `like`.

    On a GPU, which computes here what its grouped products do not (fp32, widths that are not aligned), by plain ones.
    """

    def __init__(self, like: Tensor) -> None:
        self.is_wide = like.device.type == "cpu" and like.dtype is torch.bfloat16 and faster_wide()
        self._scratch: dict[str, Tensor] = {}

    def transposed(self, block: Block, rows_MK: Tensor, weight_ENK: Tensor, out_MN: Tensor) -> None:
        """Each expert's rows times its transposed weight."""
        weights_nNK = block.experts_of(weight_ENK)
        if not self._by_kernel("product_transposed", block, rows_MK, weights_nNK, out_MN):
            for a, b_NK, out in block.each(rows_MK, weights_nNK, out_MN):
                self.by_torch(a, b_NK.t(), out, a.shape[0])

    def straight(self, block: Block, rows_MK: Tensor, weight_EKN: Tensor, out_MN: Tensor) -> None:
        """Each expert's rows times its weight."""
        weights_nKN = block.experts_of(weight_EKN)
        if not self._by_kernel("product", block, rows_MK, weights_nKN, out_MN):
            for a, b_KN, out in block.each(rows_MK, weights_nKN, out_MN):
                self.by_torch(a, b_KN, out, a.shape[0])

    def gradient(self, block: Block, grad_MK: Tensor, rows_MN: Tensor, out_EKN: Tensor) -> None:
        """Weight gradient of each expert; zero for an expert without rows."""
        out_nKN = block.experts_of(out_EKN)
        if self._by_kernel("product_gradient", block, grad_MK, rows_MN, out_nKN):
            return
        for a, b, out in block.each(grad_MK, rows_MN, out_nKN):
            if a.shape[0]:
                self.by_torch(self._transpose(a), b, out, a.shape[0])
            else:
                out.zero_()

    def by_torch(self, a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, rows: int) -> None:
        """One product. rows: number of tokens, the smallest of the three sizes if experts are small."""
        if not self.is_wide or rows < _FEW_ROWS:
            torch.mm(a_MK, b_KN, out=out_MN)
            return
        a, b = self._like("a", a_MK).copy_(a_MK), self._like("b", b_KN).copy_(b_KN)
        out_MN.copy_(torch.mm(a, b, out=self._like("out", out_MN)))

    def _by_kernel(self, name: str, block: Block, a: Tensor, b: Tensor, out: Tensor) -> bool:
        """Runs the kernel if it suits the factors; returns whether it has run. Torch reports wrong shapes."""
        (rows, depth), width, experts = a.shape, out.shape[-1], len(block.lengths)
        shapes = {
            "product_transposed": ((experts, width, depth), (rows, width)),
            "product": ((experts, depth, width), (rows, width)),
            "product_gradient": ((rows, width), (experts, depth, width)),
        }
        num_busy = sum(map(bool, block.lengths))
        fits = (b.shape, out.shape) == shapes[name] and sum(block.lengths) == rows and min(block.lengths) >= 0
        if not (fits and suits_kernel(rows, num_busy, (depth, width), a, b, out)):
            return False
        native = kernels()
        assert native is not None
        suffix = _SUFFIX[a.dtype] + ("_wide" if self.is_wide else "")
        counts = torch.tensor(block.lengths, dtype=torch.int64)
        native(f"{name}_{suffix}", a, b, out, counts, experts, depth, width)
        return True

    def _transpose(self, x_MN: Tensor) -> Tensor:
        """x^T; a copy if that makes a product in bf16 faster, else a view."""
        native = kernels() if has_tiles() and x_MN.dtype is torch.bfloat16 and x_MN.device.type == "cpu" else None
        rows, width = x_MN.shape
        if native is None or width % TILE or not x_MN.is_contiguous():
            return x_MN.t()
        out = self._like("transposed", x_MN).view(width, rows)
        native("transpose_16bit", x_MN, out, rows, width)
        return out

    def _like(self, name: str, tensor: Tensor) -> Tensor:
        """Scratch memory with the strides of `tensor`, a matrix or its transpose; fp32, except for `transposed`."""
        buffer = self._scratch.get(name)
        if buffer is None or buffer.numel() < tensor.numel():
            dtype = tensor.dtype if name == "transposed" else torch.float32
            buffer = self._scratch[name] = torch.empty(tensor.numel(), dtype=dtype)
        return buffer.as_strided(tensor.shape, tensor.stride())


def suits_kernel(num_rows: int, num_experts: int, widths: tuple[int, ...], *tensors: Tensor) -> bool:
    """Whether to use our kernel for this many rows of this many experts, with these factors (and this result).

    It depends on the processor model, not on timing, so results are reproducible. The kernel runs in one thread.
    """
    dtype = tensors[0].dtype
    if tensors[0].device.type != "cpu" or dtype not in _SUFFIX or any(width % _MULTIPLE for width in widths):
        return False
    rows, most = num_rows / max(num_experts, 1), _most_rows(dtype)
    if not 0 < rows <= most or max(rows, _MULTIPLE) * max(widths) * 4 > _CACHE_BYTES:
        return False
    return torch.get_num_threads() == 1 and all(_is_plain(tensor, dtype) for tensor in tensors)


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    if tensor.device.type != "cpu" or tensor.dtype != dtype or not tensor.is_contiguous():
        return False
    return tensor.data_ptr() % _ALIGNMENT_BYTES == 0


def _most_rows(dtype: torch.dtype) -> float:
    native = kernels()
    if native is None or not native.has_products:
        return 0
    if dtype is torch.bfloat16 and has_tiles():
        return _MOST_ROWS_BESIDE_TILES
    # MKL is slower on this vendor's processors at all sizes.
    return float("inf") if "AuthenticAMD" in processor() and dtype is torch.float32 else _MOST_ROWS


@functools.cache
def has_tiles() -> bool:
    """Whether the processor has matrix tiles."""
    return bool(torch.cpu.get_capabilities().get("amx_tile", False))


def is_padded(x: Tensor) -> bool:
    """Whether the rows of an expert are padded to one of few lengths: a library product prepares for each length."""
    return may_be_padded(x) and not faster_wide()


def may_be_padded(x: Tensor) -> bool:
    """Decides without timing the processor, which is impossible with fake tensors."""
    return x.dtype == torch.bfloat16 and not x.is_cuda


@functools.cache
def faster_wide() -> bool:
    """Whether this processor multiplies bf16 faster in fp32: measured once, in 10 to 50 ms, or from the environment."""
    setting = os.environ.get(VARIABLE)
    if setting in ("0", "1"):
        return setting == "1"
    a, b, out = torch.ones(256, 512).bfloat16(), torch.ones(512, 512).bfloat16(), torch.empty(256, 512).bfloat16()
    wide_a, wide_b, wide_out = a.float(), b.float(), out.float()

    def widened() -> None:
        torch.mm(wide_a.copy_(a), wide_b.copy_(b), out=wide_out)
        out.copy_(wide_out)

    return _seconds(widened) < _GAIN * _seconds(lambda: torch.mm(a, b, out=out))


def _seconds(f: Callable[[], object]) -> float:
    """The fastest of a few runs after a warm-up."""
    f()
    seconds = []
    for _ in range(_TRIALS):
        start = time.perf_counter()
        f()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
