"""How FSDP cuts a stack of experts over the ranks that hold the same experts.

These are the ranks along `edp`; without expert parallelism, all over which weights are sharded.

    the ranks divide                  the stack is cut along    a rank has
    its experts (to 1%)               dim 0                     whole experts
    another dim                       the first such dim        a part of each expert
    none of its dims                  dim 0                     ceil(experts / ranks) whole experts or fewer

FSDP2 pads shards along dim 0 to the largest one when it gathers and reduces them, and cuts other dims evenly or not at
all. So the largest shard is what every rank sends, and times the ranks what each has after a gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

EVEN = 1.01
"""How much more than its even share of a stack a rank may have, if there is a dim that allows it."""


def cut_dim(shape: Sequence[int], ranks: int) -> int:
    """The dim along which `ranks` ranks cut a stack of `shape`, the experts that they have together first."""
    if -(-shape[0] // ranks) * ranks <= EVEN * shape[0]:
        return 0
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


def largest_shard(shape: Sequence[int], ranks: int) -> int:
    """Numbers of a stack on the rank that has the most."""
    dim = cut_dim(shape, ranks)
    return prod(shape[:dim]) * -(-shape[dim] // ranks) * prod(shape[dim + 1 :])
