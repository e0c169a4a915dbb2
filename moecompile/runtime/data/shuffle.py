"""A shuffled order that takes no memory: position -> element, computed, not stored.

Algorithm (a Feistel network with cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary finite domains"):
  1. A number of 2 h bits is cut into two halves. In each round, left, right = right, left XOR hash(right, key). Every
     round is invertible, so all rounds together permute the numbers below 2 ** (2 h), which is at least the size.
  2. A result that is not below the size is permuted again, until it is. That is still a permutation, of the numbers
     below the size; it takes fewer than four tries on average.

The order depends on size and key alone: not on numpy's or torch's generators, nor on ranks.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

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
