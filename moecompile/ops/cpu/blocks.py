"""Splits the rows of a rank's experts into blocks that fit in the cache, padded to a few lengths for matrix products.

Legend: V rows of the input, D model dim, R rows in expert order, E experts, P rows with padding, M rows of a block,
G width of gate and up together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moecompile.ops.layout import sum_by

TILE = 16  # rows of a matrix tile, in bf16
_BLOCK_BYTES, _GPU_BLOCK_BYTES = 1 << 20, 16 << 20  # of the rows of a block: they should stay in the cache


class Block(NamedTuple):
    """Rows start .. end of consecutive experts from `first` on, and the number of rows of each; padding is included.

    stack: which of the stacks of weights has them (moecompile.ops.grouped).
    """

    start: int
    end: int
    first: int
    lengths: list[int]
    stack: int = 0

    @classmethod
    def whole(cls, counts_E: Tensor) -> Block:
        """All experts in one block."""
        lengths = counts_E.tolist()
        return cls(0, sum(lengths), 0, lengths)

    def of(self, rows_P: Tensor) -> Tensor:
        """The block's rows of a (P, ...) tensor: (M, ...)."""
        return rows_P[self.start : self.end]

    def experts_of(self, weight_E: Tensor) -> Tensor:
        """The weights of the block's experts, of an (E, ...) tensor: (n, ...)."""
        return weight_E[self.first : self.first + len(self.lengths)]

    def each(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Each expert's part of the tensors, which are rows of the block, (M, D), or weights of its experts."""
        parts = (tensor.split(self.lengths) if tensor.dim() == 2 else tensor.unbind() for tensor in tensors)
        return zip(*parts, strict=True)


class Piece(NamedTuple):
    """Rows of one chunk, and their place in a block of several chunks' rows."""

    chunk: int
    rows: slice
    place: slice


def pieces(block: Block, counts: list[list[int]], starts: list[list[int]]) -> tuple[list[Piece], list[slice]]:
    """Where the rows of a block over several chunks come from, expert by expert, and the places that are padding.

    Args:
        counts, starts: for each chunk and expert, how many rows it has, and the first of them.
    """
    found, padding, place = list[Piece](), list[slice](), 0
    for expert, length in enumerate(block.lengths, block.first):
        end = place + length
        for chunk, (counts_E, starts_E) in enumerate(zip(counts, starts, strict=True)):
            start, count = starts_E[expert], counts_E[expert]
            last = found[-1] if found else None
            if last and (last.chunk, last.rows.stop, last.place.stop) == (chunk, start, place):
                found[-1] = Piece(chunk, slice(last.rows.start, start + count), slice(last.place.start, place + count))
            elif count:
                found.append(Piece(chunk, slice(start, start + count), slice(place, place + count)))
            place += count
        if place < end:
            padding.append(slice(place, end))
        place = end
    return found, padding


def starts_of(counts: list[int], num_rows: int) -> list[int]:
    """The first row of each expert in rows that are padded, unless there are just as many as counted."""
    lengths = counts if sum(counts) == num_rows else map(_padded_length, counts)
    return list(itertools.accumulate(lengths, initial=0))[:-1]


def make_blocks(
    counts_E: Tensor, x_VD: Tensor, width: int, *, pad: bool, num_own: int | None = None
) -> tuple[list[Block], Tensor]:
    """Blocks that together have every expert once, and the rows of each expert with padding, (E,).

    Args:
        width: G. num_own: how many experts are in the first stack, if there are two.
    """
    lengths = [_padded_length(n) if pad else n for n in counts_E.tolist()]
    row_bytes = (x_VD.shape[1] + 2 * width) * x_VD.element_size()
    most = _BLOCK_BYTES if x_VD.device.type == "cpu" else _GPU_BLOCK_BYTES
    blocks: list[Block] = []
    start = 0
    for expert, length in enumerate(lengths):
        last = blocks[-1] if blocks else None
        stack = int(num_own is not None and expert >= num_own)
        if last and last.stack == stack and (not length or (start + length - last.start) * row_bytes <= most):
            blocks[-1] = last._replace(end=start + length, lengths=[*last.lengths, length])
        else:
            blocks.append(Block(start, start + length, expert - stack * (num_own or 0), [length], stack))
        start += length
    return blocks, torch.tensor(lengths, dtype=torch.int64)


def _padded_length(count: int) -> int:
    """Rounds up to one of few lengths: all up to 32, then 16 between n and 2 n, from 512 on multiples of 16, from 2048
    on 64 between n and 2 n. At most 1/16 is padding, from 1024 on 1/64."""
    octave = 1 << count.bit_length()
    step = max(1, octave // 128, min(TILE, octave // 32))
    return -(-count // step) * step


def places(counts_E: Tensor, padded_E: Tensor, num_rows: int) -> Tensor:
    """Row in expert order -> its position among the padded rows, (R,) int64."""
    shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
    return torch.arange(num_rows) + shift_E.repeat_interleave(counts_E, output_size=num_rows)


def padded(source_R: Tensor, weights_R: Tensor, counts_E: Tensor, padded_E: Tensor) -> tuple[Tensor, Tensor]:
    """Sources and weights with padding, which is the first input row with weight 0."""
    num_padded = int(padded_E.sum())
    if num_padded == source_R.shape[0]:
        return source_R.to(torch.int32), weights_R.clone()
    places_R = places(counts_E, padded_E, source_R.shape[0])
    source_P = torch.zeros(num_padded, dtype=torch.int32).index_copy_(0, places_R, source_R.to(torch.int32))
    return source_P, weights_R.new_zeros(num_padded).index_copy_(0, places_R, weights_R)


def summed(rows_PD: Tensor, source_R: Tensor, counts_E: Tensor, padded_E: Tensor, like_VD: Tensor) -> Tensor:
    """Sums the rows of each input row, (V, D), in expert order, without padding."""
    num_rows = source_R.shape[0]
    place_R = places(counts_E, padded_E, num_rows) if rows_PD.shape[0] > num_rows else None
    return sum_by(rows_PD, source_R, like_VD.shape[0], place_R)


def scratch(blocks: list[Block], like: Tensor, width: int) -> Callable[[Block], Tensor]:
    """One buffer that all blocks share: block -> (its rows, width), uninitialized."""
    buffer = like.new_empty(longest(blocks), width)
    return lambda block: buffer[: block.end - block.start]


def longest(blocks: list[Block]) -> int:
    return max((block.end - block.start for block in blocks), default=0)
