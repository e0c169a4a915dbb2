"""Samplers: which tokens are in which micro-batch of which rank.

Training numbers all sequences: position p is window `permutation(seed, p // N)[p % N]` of the N
windows. Optimizer step s takes the global batch of positions [s * B, (s + 1) * B); rank r of W takes its r-th
contiguous part and cuts it into micro-batches:

    B = 8, W = 2, micro-batch 2      step s:   |  0  1 |  2  3 |  4  5 |  6  7 |  + 8 s
                                               rank 0: m0, m1     rank 1: m0, m1

So the micro-batches of all ranks, in rank order, are those of one process with gradient accumulation; and the position
from which a run is resumed does not depend on the mesh.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

# -- a shuffled order that takes no memory: position -> element, computed, not stored -------------------------------
#
# Algorithm (a Feistel network with cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary finite domains"):
#   1. A number of 2 h bits is cut into two halves. In each round, left, right = right, left XOR hash(right, key). Every
#      round is invertible, so all rounds together permute the numbers below 2 ** (2 h), which is at least the size.
#   2. A result that is not below the size is permuted again, until it is. That is still a permutation, of the numbers
#      below the size; it takes fewer than four tries on average.
#
# The order depends on size and key alone: not on numpy's or torch's generators, nor on ranks.

_ROUNDS = 6
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64


def shuffled(positions: NDArray[np.int64], size: int, key: str) -> NDArray[np.int64]:
    """The elements at `positions` of a shuffled 0 .. size - 1, int64 of the same shape.

    Args:
        key: another order for each text.
    """
    if positions.size and not 0 <= int(positions.min()) <= int(positions.max()) < size:
        raise IndexError(f"positions {positions.min()} .. {positions.max()} of {size}")
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest(), dtype="<u8")
    values = _permuted(positions.astype(np.uint64), half, keys)  # Step 1
    while (outside := values >= size).any():  # Step 2
        values[outside] = _permuted(values[outside], half, keys)
    return values.astype(np.int64)


def _permuted(values: NDArray[np.uint64], half: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << half) | right


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's last step: every bit of the result depends on every bit of the value. Overflow wraps."""
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLIERS[0]
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLIERS[1]
    out: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return out


# -- samplers -------------------------------------------------------------------------------------------------------

IGNORED = -100
"""Label of a token that is not a target."""


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Windows of `seq_len` tokens, side by side; window i is `tokens[i * seq_len : (i + 1) * seq_len + 1]`.

    An item is {"input_ids": (S,), "labels": (S,)}, int64. Labels are already shifted: `labels[t]` is the token that
    follows `input_ids[t]`. Window `PADDING` has no targets.
    """

    PADDING = -1

    def __init__(self, tokens: Tensor, seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == self.PADDING:
            return no_targets(self.seq_len)
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        window = self.tokens[index * self.seq_len : (index + 1) * self.seq_len + 1]
        return {"input_ids": window[:-1], "labels": window[1:]}


def no_targets(seq_len: int) -> dict[str, Tensor]:
    """A window that adds nothing to sums of losses and numbers of targets."""
    return {
        "input_ids": torch.zeros(seq_len, dtype=torch.int64),
        "labels": torch.full((seq_len,), IGNORED, dtype=torch.int64),
    }


class GlobalBatchSampler(Sampler[list[int]]):
    """This rank's training micro-batches, as lists of window indices, in order.

    Args:
        num_windows: N. global_batch_size: B, a multiple of micro_batch_size * world_size.
        start_step: the first optimizer step, for resuming. num_steps: how many steps (None: without end).
        distinct_epochs: indices are window + epoch * N, for windows that are not the same in every epoch.
        computed_order: the order takes no memory, for any number of windows; otherwise 8 bytes a window.
    """

    def __init__(
        self,
        num_windows: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        start_step: int = 0,
        num_steps: int | None = None,
        distinct_epochs: bool = False,
        computed_order: bool = False,
    ) -> None:
        if num_windows < 1 or global_batch_size % (micro_batch_size * world_size):
            raise ValueError(
                f"{num_windows} windows, global batch {global_batch_size} in micro-batches of {micro_batch_size} on "
                f"{world_size} ranks: there must be a window, and the division must leave no rest"
            )
        self.num_windows, self.seed = num_windows, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.per_rank = global_batch_size // world_size
        self.rank, self.start_step, self.num_steps = rank, start_step, num_steps
        self.stride = num_windows if distinct_epochs else 0
        self.order = ComputedOrder if computed_order else permutation

    def __iter__(self) -> Iterator[list[int]]:
        steps = itertools.count(self.start_step)
        epoch, order = -1, self.order(1, self.seed, 0)
        for step in itertools.islice(steps, self.num_steps):
            first = step * self.global_batch_size + self.rank * self.per_rank
            windows = []
            for position in range(first, first + self.per_rank):
                if position // self.num_windows != epoch:
                    epoch = position // self.num_windows
                    order = self.order(self.num_windows, self.seed, epoch)
                windows.append(int(order[position % self.num_windows]) + epoch * self.stride)
            yield from _cut(windows, self.micro_batch_size)

    def __len__(self) -> int:
        """Number of micro-batches; PyTorch takes the TypeError for "without end"."""
        if self.num_steps is None:
            raise TypeError("a sampler without num_steps has no length")
        return self.num_steps * self.per_rank // self.micro_batch_size


class ValidationSampler(Sampler[list[int]]):
    """This rank's validation micro-batches: the same number on all ranks, all of full size, each window once.

    Missing windows are filled with `TokenWindows.PADDING`, which adds nothing to the sum of losses and the number of
    targets.

    Args:
        max_batches: micro-batches per rank (0: as many as all windows take).
    """

    def __init__(
        self, num_windows: int, *, micro_batch_size: int, rank: int, world_size: int, max_batches: int = 0
    ) -> None:
        self.num_windows, self.micro_batch_size = num_windows, micro_batch_size
        self.rank, self.world_size = rank, world_size
        needed = math.ceil(num_windows / (micro_batch_size * world_size))
        self.num_batches = min(needed, max_batches) if max_batches else needed

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.num_batches):
            first = (batch * self.world_size + self.rank) * self.micro_batch_size
            windows = range(first, first + self.micro_batch_size)
            yield [window if window < self.num_windows else TokenWindows.PADDING for window in windows]

    def __len__(self) -> int:
        return self.num_batches


class ComputedOrder:
    """The order of the windows in one epoch, each computed when it is asked for."""

    def __init__(self, num_windows: int, seed: int, epoch: int) -> None:
        self.num_windows, self.key = num_windows, f"seed {seed} epoch {epoch}"

    def __getitem__(self, position: int) -> int:
        return int(shuffled(np.array([position]), self.num_windows, self.key)[0])


def permutation(num_windows: int, seed: int, epoch: int) -> Tensor:
    """The order of the windows in one epoch, 8 bytes each.

    The odd factor keeps the (seed, epoch) pairs of neighbours apart.
    """
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + epoch) % 2**63)
    return torch.randperm(num_windows, generator=generator)


def _cut(windows: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(windows), size):
        yield windows[first : first + size]
