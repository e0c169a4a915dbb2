"""Two computations in turns: the order is that of the program, each has its own values, and no failure is waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moecompile.errors import MoecompileError
from moecompile.ops.baton import Baton, Kept, is_shared, landed, together

Compute = Callable[[Baton], None]


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


def saying(name: str, times: int, said: list[str]) -> Compute:
    """Begins `times` exchanges and waits for each."""

    def compute(_: Baton) -> None:
        for i in range(times):
            said.append(f"{name}{i}")
            landed(None)
        said.append(f"{name} over")

    return compute


@pytest.mark.parametrize(
    ("times", "order"),
    [
        ((2, 2), "f0 b0 f1 b1 f over b over"),
        ((1, 3), "f0 b0 f over b1 b2 b over"),  # the longer one goes on alone
        ((3, 1), "f0 b0 f1 b over f2 f over"),
        ((0, 2), "f over b0 b1 b over"),
    ],
)
def test_they_hand_over_where_they_would_wait(executor: ThreadPoolExecutor, times: tuple[int, int], order: str) -> None:
    said: list[str] = []
    together(saying("f", times[0], said), saying("b", times[1], said), executor, [])
    assert " ".join(said) == order
    assert not is_shared()
    landed(None)  # alone: nothing happens


def test_what_concerns_both_waits_for_the_other(executor: ThreadPoolExecutor) -> None:
    said: list[str] = []

    def second(baton: Baton) -> None:
        said.append("b0")
        landed(None)
        baton.await_other()
        said.append("b ends")

    together(saying("f", 3, said), second, executor, [])
    assert said == ["f0", "b0", "f1", "f2", "f over", "b ends"]


def test_each_has_its_own_random_numbers_and_values(executor: ThreadPoolExecutor) -> None:
    """As if each ran alone from the same beginning; afterwards everything is as the first one left it."""
    place = {"now": "before"}
    kept = [
        Kept(torch.get_rng_state, torch.set_rng_state),
        Kept(lambda: place["now"], lambda value: place.update(now=value)),
    ]

    def drawing(name: str, seed: int, drawn: list[float], seen: list[str]) -> Compute:
        def compute(_: Baton) -> None:
            torch.manual_seed(seed)
            place["now"] = name
            for _ in range(3):
                drawn.append(float(torch.rand(())))
                landed(None)
                seen.append(place["now"])

        return compute

    alone: dict[int, list[float]] = {seed: [] for seed in (1, 2)}
    for seed, drawn in alone.items():
        torch.manual_seed(seed)
        drawn += [float(torch.rand(())) for _ in range(3)]
    both: dict[int, list[float]] = {1: [], 2: []}
    seen: dict[int, list[str]] = {1: [], 2: []}
    together(drawing("f", 1, both[1], seen[1]), drawing("b", 2, both[2], seen[2]), executor, kept)
    assert both == alone
    assert seen == {1: ["f"] * 3, 2: ["b"] * 3}
    assert place["now"] == "f"
    following = float(torch.rand(()))
    torch.manual_seed(1)
    assert following == [float(torch.rand(())) for _ in range(4)][3]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("after", [0, 2])
def test_if_one_fails_the_other_one_ends_at_its_next_exchange(
    executor: ThreadPoolExecutor, failing: int, after: int
) -> None:
    said: list[str] = []

    def fails(_: Baton) -> None:
        for _ in range(after):
            landed(None)
        raise ValueError("of its own")

    others: list[BaseException] = []

    def noted(baton: Baton) -> None:
        try:
            saying("other", 5, said)(baton)
        except MoecompileError as error:
            others.append(error)
            raise

    both = (fails, noted) if failing == 0 else (noted, fails)
    with pytest.raises(ValueError, match="of its own"):
        together(*both, executor, [])
    assert len(others) == 1 and str(others[0]) == "the forward or the backward beside this one failed"
    assert "other over" not in said and not is_shared()
