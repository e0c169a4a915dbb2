"""Where experts go: never a fuller rank than EPLB's, the optimum where a solver finds it, groups on one node."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from moecompile.planner.placement import place_experts

Loads = NDArray[np.float64]

# The loads of the example in EPLB's README: two layers of 12 experts in 4 groups.
README = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]],
    dtype=np.float64,
)


# -- EPLB without replicas, from its published description -----------------------------------------------------------


def eplb_packing(weights: Loads, packs: int) -> list[list[int]]:
    """Heaviest first, each into the lightest pack that is not full."""
    each = len(weights) // packs
    held: list[list[int]] = [[] for _ in range(packs)]
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        open_packs = [pack for pack in held if len(pack) < each]
        min(open_packs, key=lambda pack: weights[pack].sum()).append(item)
    return held


def eplb(weights: Loads, ranks: int, nodes: int, groups: int) -> float:
    """Load of the fullest rank: groups packed to nodes, then experts to the ranks of a node; else all at once."""
    if groups % nodes:
        nodes = groups = 1
    size = len(weights) // groups
    fullest = 0.0
    for on_node in eplb_packing(weights.reshape(groups, size).sum(1), nodes):
        experts = np.array([group * size + i for group in on_node for i in range(size)])
        packs = eplb_packing(weights[experts], ranks // nodes)
        fullest = max(fullest, *(weights[experts[pack]].sum() for pack in packs))
    return fullest


# -- ours -------------------------------------------------------------------------------------------------------------


def fullest(weights: Loads, order: Sequence[int], ranks: int) -> float:
    assert sorted(order) == list(range(len(weights)))
    return float(weights[list(order)].reshape(ranks, -1).sum(1).max())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    ("ranks", "nodes", "groups"), [(4, 2, 4), (4, 1, 1), (6, 2, 4), (6, 3, 4), (2, 2, 4), (12, 2, 4)]
)
def test_the_readme_example_is_at_least_as_balanced(layer: int, ranks: int, nodes: int, groups: int) -> None:
    weights = README[layer]
    got = fullest(weights, place_experts(weights, ranks, nodes, groups), ranks)
    assert got <= eplb(weights, ranks, nodes, groups)


def random_loads(generator: np.random.Generator, number: int) -> Loads:
    kind = generator.integers(3)
    if kind == 0:
        return np.floor(generator.lognormal(5, 1, number))
    if kind == 1:
        return generator.integers(0, 50, number).astype(np.float64)  # ties
    return np.floor(1e4 / (1 + generator.permutation(number)) ** generator.uniform(0.2, 1.5))


@pytest.mark.parametrize("cases", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_cases_are_at_least_as_balanced(cases: int) -> None:
    generator, better = np.random.default_rng(0), {"groups": 0, "global": 0}
    for case in range(cases):
        nodes, on_node = (int(generator.choice(n)) for n in ([1, 2, 4, 8], [1, 2, 4, 8]))
        groups = nodes * int(generator.choice([1, 2, 4])) if case % 2 else 1
        ranks, each = nodes * on_node, int(generator.integers(1, 9))
        size = ranks * each
        if size % groups:
            groups = nodes
        weights = random_loads(generator, size)
        order = place_experts(weights, ranks, nodes, groups)
        theirs = eplb(weights, ranks, nodes, groups) if groups > 1 else eplb(weights, ranks, 1, 1)
        ours = fullest(weights, order, ranks)
        assert ours <= theirs, (case, ranks, nodes, groups)
        better["groups" if groups > 1 and nodes > 1 else "global"] += ours < theirs
        if groups > 1 and nodes > 1:
            for group in np.argsort(order).reshape(groups, -1):
                assert len(set(group // (size // nodes))) == 1, (case, "a group is on two nodes")
    assert min(better.values()) > cases / 10


# -- the optimum ------------------------------------------------------------------------------------------------------


def optimum(weights: Loads, ranks: int, nodes: int = 1, groups: int = 1) -> float:
    """By a mixed-integer program: x[e, r] whether rank r has expert e, y[g, n] whether node n has group g."""
    experts, each, size = len(weights), len(weights) // ranks, len(weights) // groups
    x = lambda e, r: e * ranks + r  # noqa: E731
    y = lambda g, n: experts * ranks + g * nodes + n  # noqa: E731
    count = experts * ranks + groups * nodes + 1
    rows, low, high = [], [], []

    def add(terms: dict[int, float], least: float, most: float) -> None:
        row = np.zeros(count)
        for column, factor in terms.items():
            row[column] = factor
        rows.append(row)
        low.append(least)
        high.append(most)

    for e in range(experts):
        add({x(e, r): 1 for r in range(ranks)}, 1, 1)
        for n in range(nodes):
            on_node = range(n * ranks // nodes, (n + 1) * ranks // nodes)
            add({**{x(e, r): 1 for r in on_node}, y(e // size, n): -1}, 0, 0)
    for r in range(ranks):
        add({x(e, r): 1 for e in range(experts)}, each, each)
        add({**{x(e, r): weights[e] for e in range(experts)}, count - 1: -1}, -np.inf, 0)
    whole = np.ones(count)
    whole[-1] = 0
    cost = 1 - whole
    bounds = Bounds(0, np.where(whole > 0, 1, np.inf))
    found = milp(
        cost, constraints=LinearConstraint(np.array(rows), low, high), integrality=whole, bounds=bounds,
        options={"mip_rel_gap": 0},
    )  # fmt: skip
    assert found.success
    return float(found.fun)


@pytest.mark.parametrize(
    ("experts", "ranks", "nodes", "groups"),
    [(6, 3, 1, 1), (8, 2, 1, 1), (8, 4, 1, 1), (9, 3, 1, 1), (12, 4, 1, 1), (8, 4, 2, 4), (12, 4, 2, 4), (12, 6, 3, 6)],
)
def test_small_cases_are_the_optimum(experts: int, ranks: int, nodes: int, groups: int) -> None:
    generator = np.random.default_rng(experts * ranks)
    for _ in range(10):
        weights = random_loads(generator, experts) + 1
        got = fullest(weights, place_experts(weights, ranks, nodes, groups), ranks)
        assert got == pytest.approx(optimum(weights, ranks, nodes, groups), rel=1e-3)


def test_what_cannot_be_balanced_keeps_its_place() -> None:
    assert place_experts([0.0] * 4, 4) == (0, 1, 2, 3)
    assert sorted(place_experts([5.0, 1.0], 1)) == [0, 1]
