"""The front, and counted reasons."""

from __future__ import annotations

import numpy as np

from moecompile.planner.search.found import Candidate, Rejected, front, tight


def candidate(speed: float, memory: int, fits: str = "yes") -> Candidate:
    return Candidate(
        settings={"mesh.ep": memory, "routing.max_nodes": None}, runs=True, seconds=1 / speed,
        tokens_per_second_per_rank=speed, memory_bytes=memory - 1, memory_bytes_uneven=memory, fits=fits,
    )  # fmt: skip


def test_the_front_is_what_no_other_beats() -> None:
    draws = np.random.default_rng(0).integers(1, 30, size=(300, 2)).tolist()
    candidates = [candidate(speed, memory) for speed, memory in draws]
    found = [(each.tokens_per_second_per_rank, each.memory_bytes_uneven) for each in front(candidates)]

    def is_beaten(speed: int, memory: int) -> bool:
        return any(s >= speed and m <= memory and (s, m) != (speed, memory) for s, m in draws)

    expected = {(speed, memory) for speed, memory in map(tuple, draws) if not is_beaten(speed, memory)}
    assert set(found) == expected
    assert len(found) == len(expected)
    assert found == sorted(found, reverse=True)


def test_what_fits_only_if_the_load_is_even_is_told_apart() -> None:
    fast, slow, even = candidate(3, 5), candidate(1, 2), candidate(4, 9, "if even")
    assert front([even, slow, fast]) == [fast, slow]
    assert front([even]) == [even]
    assert tight([even, slow, fast], fast) == even
    assert tight([candidate(2, 9, "if even"), fast], fast) is None
    assert tight([even], even) is None


def test_overrides_and_reasons() -> None:
    assert candidate(2.0, 3).overrides == "mesh.ep=3 routing.max_nodes=null"
    rejected = Rejected()
    rejected.add("is odd", "first")
    rejected.add("is odd", "second", 3)
    rejected.too_large(3 * 2**30, 2**30, {"mesh.ep": 1})
    rejected.too_large(2 * 2**30, 2**30, {"mesh.ep": 2})
    rejected.too_large(2**30 + 1, 2**30)
    assert [(each.rule, each.count, each.example) for each in rejected.listed] == [
        ("is odd", 4, "first"), ("needs more than the 1 GiB of a rank", 3, "3 GiB"),
    ]  # fmt: skip
    assert rejected.total == 7
    assert rejected.least == (2 * 2**30, {"mesh.ep": 2})
