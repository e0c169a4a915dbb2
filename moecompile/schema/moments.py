"""How an optimizer keeps its moments: one row for each `optimizer.state`, beside rows of the weights. Needs no torch.

A moment in codes of 8 bits is a code for every number and a fp32 scale for every block of them (Dettmers et al. 2022,
arXiv 2110.02861). Blocks follow one another in the rows of a weight (its last dim), all of one length: the largest
divisor of the row's length that is at most 256. Wherever FSDP or ep cuts a weight, it cuts between rows, so a block is
the same on every mesh. In fp32 stay vectors, weights of fewer than 4,096 numbers, as in torchao and bitsandbytes, and
rows that only short blocks divide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod

from moecompile.schema.enums import RowRule, StateKind

LEAST_NUMBERS = 4096
"""Smaller weights keep fp32 moments beside others in codes."""
MOST, LEAST = 256, 32
"""Numbers of a block."""
FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class MomentKind:
    """What one number of a moment takes.

    bits: of it. fraction: bits of its fraction, with which a decay must be told from none; None: a block's scale
    decays. in_blocks: whether there are scales. may_adapt: whether adapters can be trained with it.
    """

    bits: int
    fraction: int | None
    in_blocks: bool = False
    may_adapt: bool = True

    @property
    def slowest(self) -> float:
        """The largest decay rate at which any number still becomes smaller by itself."""
        return 1.0 if self.fraction is None else 1.0 - 2.0**-self.fraction


MOMENTS = {
    StateKind.fp32: MomentKind(bits=32, fraction=24),
    StateKind.bf16: MomentKind(bits=16, fraction=8),
    StateKind.int8: MomentKind(bits=8, fraction=None, in_blocks=True, may_adapt=False),
}
"""What is not here has no moments: a KeyError."""

ROW_STATE = {
    RowRule.lazy_adamw: {"exp_avg": True, "exp_avg_sq": True},
    RowRule.rowwise_adagrad: {"sum": False},
}
"""Of tables that are stepped by rows: entries of the state, in fp32 or wider, and whether each has a number for every
one of a row, or one for all.
"""


def resolved(state: StateKind, bits: int) -> StateKind | None:
    """The row for numbers of `bits` that are stepped; None: their own dtype, which has no row (fp64)."""
    if state is not StateKind.auto:
        return state
    return {each.bits: kind for kind, each in MOMENTS.items() if not each.in_blocks}.get(bits)


def block_of(shape: Sequence[int], width: int) -> int | None:
    """Numbers of a block of a weight of this shape, of whose rows a rank has `width` numbers; None: it has none."""
    if len(shape) < 2 or prod(shape) < LEAST_NUMBERS:
        return None
    return next((size for size in range(MOST, LEAST - 1, -1) if width % size == 0), None)


def bytes_in_blocks(shape: Sequence[int], width: int) -> Fraction:
    """Bytes of a number, on average over a weight."""
    block = block_of(shape, width)
    return Fraction(FP32_BYTES) if block is None else 1 + Fraction(FP32_BYTES, block)
