"""Hash routing against plain Python integers, and how evenly it chooses."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from moecompile import ops  # noqa: F401  (registers the ops)

hashed_ids = torch.ops.moecompile.hashed_ids
BITS = 2**64


def splitmix64(state: int) -> int:
    """The next number of the generator by Steele, Lea and Flood (2014), from its state."""
    z = (state + 0x9E3779B97F4A7C15) % BITS
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % BITS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % BITS
    return z ^ (z >> 31)


def chosen(token: int, num_experts: int, top_k: int, layer: int) -> list[int]:
    start, taken = splitmix64((token + splitmix64(layer + 1)) % BITS), []
    for last in range(num_experts - top_k, num_experts):
        drawn = splitmix64((start + last) % BITS) % 2**63 % (last + 1)
        taken.append(last if drawn in taken else drawn)
    return taken


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 1), (16, 4), (7, 7), (384, 6)])
@pytest.mark.parametrize("layer", [0, 1, 60])
def test_equals_python_integers(num_experts: int, top_k: int, layer: int) -> None:
    tokens = [0, 1, 2, 17, 129_279, 2**31 - 1]
    got = hashed_ids(torch.tensor(tokens), num_experts, top_k, layer)
    assert got.tolist() == [chosen(token, num_experts, top_k, layer) for token in tokens]
    assert torch.equal(got, hashed_ids(torch.tensor(tokens, dtype=torch.int32), num_experts, top_k, layer))


def test_the_reference_is_the_published_generator() -> None:
    """The first outputs from the seed 1234567, as in its authors' test vectors."""
    states = [(1234567 + i * 0x9E3779B97F4A7C15) % BITS for i in range(3)]
    assert [splitmix64(state) for state in states] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423,
    ]  # fmt: skip


def test_every_set_of_experts_is_about_as_frequent() -> None:
    ids = hashed_ids(torch.arange(21_000), 7, 2, 3)
    pairs = Counter(tuple(sorted(row)) for row in ids.tolist())
    assert len(pairs) == 21  # all of them, of two different experts
    chi_square = sum((count - 1000) ** 2 / 1000 for count in pairs.values())
    assert chi_square < 45.3  # 20 degrees of freedom: 0.1 % of random choices are beyond it


def test_layers_choose_independently() -> None:
    one, other = (hashed_ids(torch.arange(20_000), 16, 2, layer).sort(1).values for layer in (0, 1))
    assert (one == other).all(1).double().mean() == pytest.approx(1 / 120, abs=0.003)
