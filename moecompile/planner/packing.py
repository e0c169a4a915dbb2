"""Which rank gets which expert, so that the fullest rank computes as few rows as possible. Needs no torch.

Every rank gets equally many experts. With groups (node-limited routing), the experts of a group stay on one node.

Algorithm:
  1. Groups go to nodes. If there are few ways, all are tried, those with the lightest fullest node first, until no way
     left can be better; else they are packed as experts are.
  2. On each node, the heaviest expert that is left goes to the lightest rank with room, as EPLB packs them
     (https://github.com/deepseek-ai/EPLB).
  3. The fullest rank and another one share their experts anew, as evenly as they can be shared, as long as that makes
     the fullest rank lighter. So the result is never worse than that of step 2.
  4. Few experts are packed from other starts too, drawn at random but always the same, unless no rank could be
     lighter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

_WAYS = 1000  # ways from groups to nodes that are tried
_EXACT = 16  # experts of two ranks that are shared by trying all halves
_STARTS, _CLOSE = 30, 1e-3
_FEW = 32  # items that are packed from other starts too
_Bins = list[list[int]]
_Weights = NDArray[np.float64]


def place_experts(loads: Sequence[float], ep: int, nodes: int = 1, groups: int = 1) -> tuple[int, ...]:
    """The expert at each position: rank r has the r-th equal part, by ascending id.

    Args:
        loads: rows of each expert, of which ranks compute equally many. ep: ranks, which `nodes` divides.
        groups: of consecutive experts that must stay on one node each; if nodes cannot share them evenly, or there is
            one node, they do not matter.
    """
    weights = np.asarray(loads, dtype=np.float64)
    if nodes == 1 or groups == 1 or groups % nodes:
        nodes = groups = 1
    size, ranks = len(weights) // groups, ep // nodes
    totals = weights.reshape(groups, size).sum(1)

    @cache
    def on_a_node(chosen: tuple[int, ...]) -> tuple[_Bins, float]:
        """The experts of some groups on the ranks of a node, and the rows of the fullest one."""
        experts = np.concatenate([np.arange(group * size, (group + 1) * size) for group in chosen])
        bins = [[int(experts[i]) for i in held] for held in pack(weights[experts], ranks)]
        return bins, fullest_of(weights, bins)

    best: _Bins = []
    least = np.inf
    for way in _ways(totals, nodes):  # Step 1
        if max(totals[chosen].sum() for chosen in way) / ranks >= least:
            break
        heaviest_first = sorted(way, key=lambda chosen: -totals[chosen].sum())
        if all(on_a_node(tuple(chosen))[1] < least for chosen in heaviest_first):
            best = [held for chosen in way for held in on_a_node(tuple(chosen))[0]]
            least = max(on_a_node(tuple(chosen))[1] for chosen in way)
    return tuple(expert for held in best for expert in sorted(held))


def pack(weights: _Weights, num_bins: int) -> _Bins:
    """Equally many items for each bin, the fullest one as light as steps 2 to 4 make it."""
    room, generator = len(weights) // num_bins, np.random.default_rng(0)
    heaviest = weights.max() + np.sort(weights)[: room - 1].sum()
    least = max(weights.sum() / num_bins, heaviest) * (1 + _CLOSE)  # no packing is lighter
    bins = _greedy(weights, num_bins)
    best = _improved(weights, bins)
    for _ in range(_STARTS if num_bins > 2 and room > 1 and len(weights) <= _FEW else 0):  # Step 4
        if fullest_of(weights, best) <= least:
            break
        start = generator.permutation(len(weights)).reshape(num_bins, room).tolist()
        best = min(best, _improved(weights, start), key=lambda bins: fullest_of(weights, bins))
    return best


def _improved(weights: _Weights, bins: _Bins) -> _Bins:
    """Step 3, as often as it helps."""
    while _shared_anew(weights, bins):
        pass
    return bins


def fullest_of(weights: _Weights, bins: Sequence[Sequence[int]]) -> float:
    """The weight of the fullest bin."""
    return float(max(weights[list(held)].sum() for held in bins))


def _ways(totals: _Weights, nodes: int) -> list[_Bins]:
    """Ways to give each node equally many groups, the one with the lightest fullest node first."""
    ways: list[_Bins] = []
    for way in _divisions(tuple(range(len(totals))), nodes):
        ways.append(way)
        if len(ways) > _WAYS:
            ways = [pack(totals, nodes), _greedy(totals, nodes)]
            break
    return sorted(ways, key=lambda way: fullest_of(totals, way))


def _divisions(items: tuple[int, ...], parts: int) -> Iterator[_Bins]:
    """Every division into equal parts, regardless of their order."""
    if parts == 1:
        yield [list(items)]
        return
    first, *rest = items
    for others in combinations(rest, len(items) // parts - 1):
        left = tuple(item for item in rest if item not in others)
        for division in _divisions(left, parts - 1):
            yield [[first, *others], *division]


def _greedy(weights: _Weights, num_bins: int) -> _Bins:
    """Step 2."""
    room, bins = len(weights) // num_bins, [list[int]() for _ in range(num_bins)]
    loads = [0.0] * num_bins
    for item in np.argsort(-weights, kind="stable"):
        lightest = min((i for i in range(num_bins) if len(bins[i]) < room), key=loads.__getitem__)
        bins[lightest].append(int(item))
        loads[lightest] += float(weights[item])
    return bins


def _shared_anew(weights: _Weights, bins: _Bins) -> bool:
    """Step 3, once: whether the fullest bin got lighter, in place."""
    loads = [float(weights[held].sum()) for held in bins]
    fullest, *others = sorted(range(len(bins)), key=lambda i: -loads[i])
    for other in reversed(others):
        halves = _halves(weights, bins[fullest], bins[other])
        if max(weights[half].sum() for half in halves) < loads[fullest] * (1 - 1e-12):
            bins[fullest], bins[other] = halves
            return True
    return False


def _halves(weights: _Weights, first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
    """The experts of two bins in two halves of equal number, as even as trying all of them or swaps can make them."""
    items = [*first, *second]
    if len(items) <= _EXACT:
        ways = _of_half(len(items))
        sums = weights[np.array(items)[ways]].sum(1)
        chosen = set(ways[np.abs(2 * sums - weights[items].sum()).argmin()].tolist())
        return [items[i] for i in sorted(chosen)], [item for i, item in enumerate(items) if i not in chosen]
    a, b = list(first), list(second)
    while True:
        gap = weights[a].sum() - weights[b].sum()
        after = np.abs(gap - 2 * (weights[a][:, None] - weights[b][None, :]))
        i, j = np.unravel_index(after.argmin(), after.shape)
        if after[i, j] >= abs(gap) * (1 - 1e-12):
            return a, b
        a[i], b[j] = b[j], a[i]


@cache
def _of_half(count: int) -> NDArray[np.int64]:
    """The halves of `count` items that have the first one, (ways, count / 2)."""
    halves = [(0, *others) for others in combinations(range(1, count), count // 2 - 1)]
    return np.array(halves, dtype=np.int64)
