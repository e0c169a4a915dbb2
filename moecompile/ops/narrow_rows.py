"""Rows as bytes: e4m3 with a scale for each block of numbers, and back (moecompile.row_formats).

Algorithm, for each block:
  1. a: its largest magnitude. The scale s is the smallest power of two with a <= 448 s, at least 2^-126; or, in fp32,
     a / 448. So no number is cut off, which by the standard's scale costs 0.9 dB of error.
  2. Each number x becomes the e4m3 nearest to x / s, ties to even; a row's codes come before its scales.
  3. Back: code times s, which is exact in bf16 for a power of two. So what was rounded once is not rounded again.

A block with inf or NaN becomes NaN. Below 2^-135 (power of two) numbers become 0.

Legend: R rows, D model dim, B blocks of a row, b numbers of a block, S bytes of its scales, W = D + S.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from moecompile.ops.cpu.native import Kernels, kernels
from moecompile.row_formats import ROW_FORMATS, RowFormat

LARGEST = 448.0
_LEAST_EXPONENT, _BIAS, _NAN_SCALE = -126, 127, 255
_HAS_E4M3 = (8, 9)  # compute capability
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def pack(rows_RD: Tensor, name: str) -> Tensor:
    """Rows of floating-point numbers as bytes, uint8 (R, W).

    Raises:
        KeyError: no format of that name.
    """
    form, rows = ROW_FORMATS[name], rows_RD.contiguous()
    native = _native(rows.device, rows.dtype)
    if native is None:
        return _fused(rows.device)[0](rows, form)
    out = rows.new_empty(rows.shape[0], form.row_bytes(rows.shape[1]), dtype=torch.uint8)
    native(f"pack_{_SUFFIX[rows.dtype]}", rows, out, *rows.shape, form.block, form.scale_bytes)
    return out


def unpack_rows(bytes_RW: Tensor, name: str, like: Tensor) -> Tensor:
    """What `pack` made as rows (R, D), with the width and the dtype of `like`."""
    form, width, received = ROW_FORMATS[name], like.shape[1], bytes_RW.contiguous()
    native = _native(like.device, like.dtype)
    if native is None:
        return _fused(like.device)[1](received, form, width, like.dtype)
    out = like.new_empty(received.shape[0], width)
    native(f"unpack_{_SUFFIX[out.dtype]}", received, out, *out.shape, form.block, form.scale_bytes)
    return out


def _pack(rows_RD: Tensor, form: RowFormat) -> Tensor:
    blocks_RBb = _blocks(rows_RD.to(torch.promote_types(rows_RD.dtype, torch.float32)), form)
    scale_RB, bytes_RS = _scales(blocks_RBb.abs().amax(-1), form)
    codes_RBb = (blocks_RBb / scale_RB.to(blocks_RBb.dtype)[..., None]).float().to(torch.float8_e4m3fn)
    codes_RD = codes_RBb.view(torch.uint8).flatten(1)[:, : rows_RD.shape[1]]
    return torch.cat((codes_RD, bytes_RS), 1)


def _unpack(bytes_RW: Tensor, form: RowFormat, width: int, dtype: torch.dtype) -> Tensor:
    # Copied: reshape and contiguous return a view of a single row, which may begin at an odd byte.
    codes_RD, scales = (part.clone(memory_format=torch.contiguous_format) for part in _parts(bytes_RW, width))
    scale_RB = _powers(scales) if form.scale_bytes == 1 else scales.view(torch.float32)
    wide = torch.promote_types(dtype, torch.float32)
    blocks_RBb = _blocks(codes_RD.view(torch.float8_e4m3fn).to(wide), form) * scale_RB.to(wide)[..., None]
    return blocks_RBb.flatten(1)[:, :width].to(dtype, memory_format=torch.contiguous_format, copy=True)


def _parts(bytes_RW: Tensor, width: int) -> tuple[Tensor, Tensor]:
    return bytes_RW[:, :width], bytes_RW[:, width:]


@functools.cache
def _fused(device: torch.device) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The two functions for a device; on a GPU with e4m3 each is compiled to one or two kernels."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HAS_E4M3:
        return torch.compile(_pack, dynamic=True), torch.compile(_unpack, dynamic=True)
    return _pack, _unpack


def _scales(largest_RB: Tensor, form: RowFormat) -> tuple[Tensor, Tensor]:
    """Step 1: the scales in fp32, NaN where a block is not finite, and as bytes, (R, S)."""
    largest = largest_RB.float()
    if form.scale_bytes == 4:
        scale = largest.clamp(min=LARGEST * 2.0**_LEAST_EXPONENT) / LARGEST
        scale = scale.masked_fill(~scale.isfinite(), torch.nan)
        return scale, scale.view(torch.uint8)
    bits = largest.view(torch.int32)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).int()  # 448 is 1.75 * 2^8
    coded = exponent.clamp(_LEAST_EXPONENT + _BIAS).masked_fill(~largest.isfinite(), _NAN_SCALE).to(torch.uint8)
    return _powers(coded), coded


def _powers(coded: Tensor) -> Tensor:
    """E8M0 as fp32."""
    return (coded.int() << 23).view(torch.float32).masked_fill(coded == _NAN_SCALE, torch.nan)


def _blocks(rows_RD: Tensor, form: RowFormat) -> Tensor:
    """(R, B, b), with zeros at the end of the last block."""
    num_rows, width = rows_RD.shape
    return F.pad(rows_RD, (0, -width % form.block)).view(num_rows, form.blocks(width), form.block)


def _native(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    return kernels() if device.type == "cpu" and dtype in _SUFFIX else None
