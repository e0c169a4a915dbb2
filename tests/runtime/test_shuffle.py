"""An order that is computed: a permutation, the same everywhere, another one for each key."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from moecompile.runtime.data.batches import shuffled


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 70_001])
def test_it_is_a_permutation(size: int) -> None:
    order = shuffled(np.arange(size), size, "seed 0")
    assert np.array_equal(np.sort(order), np.arange(size))
    some = np.arange(0, size, 3)
    assert np.array_equal(shuffled(some, size, "seed 0"), order[some])  # each element by itself


def by_hand(position: int, size: int, key: str) -> int:
    """The algorithm in Python's own integers."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(key.encode(), digest_size=48).digest()
    value = position
    while True:
        left, right = divmod(value, 2**half)
        for i in range(6):
            mixed = (right + int.from_bytes(digest[8 * i : 8 * i + 8], "little")) % 2**64
            mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) % 2**half)
        value = left * 2**half + right
        if value < size:
            return value


def test_it_does_not_depend_on_the_machine() -> None:
    for size in (1, 7, 1000, 10**12):
        positions = np.arange(min(size, 50))
        for key in ("seed 0", "held out"):
            assert shuffled(positions, size, key).tolist() == [by_hand(i, size, key) for i in range(len(positions))]
    assert shuffled(np.arange(10), 10, "seed 0").tolist() == [6, 1, 2, 3, 8, 4, 9, 0, 7, 5]


def test_it_looks_random() -> None:
    """Correlation, displacement and the cycle structure of large orders are those of random ones."""
    size, position = 50_000, np.arange(50_000)
    for key in ("a", "b"):
        order = shuffled(position, size, key)
        assert abs(np.corrcoef(position, order)[0, 1]) < 0.02
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
        assert np.abs(order - position).mean() == pytest.approx(size / 3, rel=0.02)
        assert (order == position).sum() < 8
    assert abs(np.corrcoef(shuffled(position, size, "a"), shuffled(position, size, "b"))[0, 1]) < 0.02


def test_a_position_beyond_the_end() -> None:
    with pytest.raises(IndexError, match=r"positions 0 \.\. 3 of 3"):
        shuffled(np.arange(4), 3, "")
    assert shuffled(np.arange(0), 3, "").tolist() == []
    assert shuffled(np.array([2**40]), 2**41, "").dtype == np.int64
