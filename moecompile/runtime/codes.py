"""Codes of 8 bits for blocks of numbers: the table, the blocks and the rounding of torchao and bitsandbytes.

A code stands for a number of a table, times the scale of its block, which is the block's largest number (Dettmers et
al. 2022, arXiv 2110.02861). The table has, in each of seven decades below one, numbers at even distances, twice as many
in each larger decade; without signs, twice as many again. A number gets the code of the nearest one.

torchao finds it by eight steps of a search, of which each is several passes over numbers of 8 bytes. Here the first
16 bits of a fp32 number say it, up to one (step 2):
  1. Numbers that begin with the same 16 bits are so near to each other that no more than one number of the table is
     between them; so there is a table of the last one below the least of them, and the next one is compared.
  2. Of the two beside it the number gets the nearer one, the upper one if it is in the middle, in torchao's arithmetic:
     codes are equal bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_DECADES, _LEAST_SCALE = 7, 1e-12
_CELL = 16  # bits that numbers of a cell do not share


class Tables(NamedTuple):
    """values: (256,) of the codes, rising; above: the next one; half: of the distance to it. first: (2^16,) the last
    code that is not above the least number of a cell.
    """

    values: Tensor
    above: Tensor
    half: Tensor
    first: Tensor


def values_of(signed: bool) -> Tensor:
    """The numbers that codes stand for, (256,), fp32."""
    found = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for i in range(_DECADES):
        ends = torch.linspace(0.1, 1, 2**i + 1 if signed else 2 ** (i + 1) + 1, dtype=torch.float32)
        means = 10 ** (i + 1 - _DECADES) * ((ends[:-1] + ends[1:]) / 2)
        found += [means, -means] if signed else [means]
    return torch.cat(found).sort().values


def tables(signed: bool, device: torch.device) -> Tables:
    """The tables of codes with signs or without."""
    values = values_of(signed)
    above = torch.cat([values[1:], torch.tensor([torch.inf], dtype=torch.float32)])
    cells = torch.arange(2**_CELL, dtype=torch.int64)
    least = torch.where(cells < 2 ** (_CELL - 1), cells << _CELL, (cells << _CELL) + 2**_CELL - 1)  # else negative
    least = torch.where(least >= 2**31, least - 2**32, least).int().view(torch.float32)
    first = torch.bucketize(least, above[:-1], right=True, out_int32=True)  # Step 1
    return Tables(*(each.to(device) for each in (values, above, (above - values) * 0.5, first)))


@dataclass(frozen=True, kw_only=True)
class Coded:
    """Numbers in codes. codes: (n,), uint8. scales: (blocks,), fp32. lowest: the least code that is written."""

    codes: Tensor
    scales: Tensor
    tables: Tables
    lowest: int = 0

    def read(self) -> Tensor:
        """The numbers, (n,), fp32."""
        values = self.tables.values.index_select(0, self.codes.int())
        return values.view(len(self.scales), -1).mul_(self.scales[:, None]).view(-1)

    def write(self, numbers: Tensor) -> None:
        """Rounds numbers, (n,), fp32."""
        blocks = numbers.view(len(self.scales), -1)
        self.scales.copy_(blocks.abs().amax(-1).clamp_(min=_LEAST_SCALE))
        scaled = (blocks / self.scales[:, None]).view(-1)
        cells = (scaled.view(torch.int32) >> _CELL).bitwise_and_(2**_CELL - 1)
        codes = self.tables.first.index_select(0, cells)
        codes += scaled >= self.tables.above.index_select(0, codes)
        beyond = scaled - self.tables.values.index_select(0, codes)
        codes += beyond >= self.tables.half.index_select(0, codes)  # Step 2
        self.codes.copy_(codes.clamp_(min=self.lowest))
