"""Says how what the ranks of a mesh hold differs from what one process has: by which factor, on which axis.

Pure functions on what rank 0 has gathered. Legend: R ranks, N entries of a weight; an entry that a rank does not hold
is NaN, and one that it holds and that is not finite is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

_ALIKE = 1e-3
"""Relative, of two factors."""


@dataclass(frozen=True)
class Axes:
    """The axes of a mesh and their sizes; ranks are numbered with the last axis fastest."""

    sizes: Mapping[str, int]

    @property
    def num_ranks(self) -> int:
        """Of the mesh."""
        return math.prod(self.sizes.values())

    def place(self, rank: int) -> dict[str, int]:
        """The index of a rank on each axis."""
        found = {}
        for name, size in reversed(list(self.sizes.items())):
            rank, found[name] = divmod(rank, size)
        return {name: found[name] for name in self.sizes}

    def groups(self, along: Sequence[str]) -> list[list[int]]:
        """Sets of ranks that differ on these axes alone."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.num_ranks):
            others = tuple(at for name, at in self.place(rank).items() if name not in along)
            found.setdefault(others, []).append(rank)
        return list(found.values())

    def subsets(self) -> Iterator[tuple[str, ...]]:
        """Every set of axes that have more than one rank, small ones first."""
        names = [name for name, size in self.sizes.items() if size > 1]
        for length in range(1, len(names) + 1):
            yield from combinations(names, length)

    def size(self, along: Sequence[str]) -> int:
        """The number of ranks along some axes."""
        return math.prod(self.sizes[name] for name in along)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How a value on the ranks differs from that of one process.

    error: largest difference over the largest entry of the reference. factor: of the ranks' value over the reference,
    if one holds for all entries. axes: those that explain it. text: both in words; empty: it does not differ.
    """

    error: float
    factor: float | None = None
    axes: tuple[str, ...] = ()
    text: str = ""


def difference(
    held_RN: Tensor, wanted_N: Tensor, axes: Axes, tolerance: float, scale: float | None = None
) -> Difference:
    """Compares what each rank holds of a value with the reference.

    Args:
        tolerance: the largest relative error that counts as rounding.
        scale: what errors are relative to; None: the largest entry of the reference.
    """
    if scale is None:
        scale = _largest(wanted_N)
    differing_RN = (held_RN - wanted_N).abs()
    largest = _largest(differing_RN[~held_RN.isnan()])
    error = largest / scale if scale else largest
    if error <= tolerance:
        return Difference(error=error)
    return _explained(held_RN, wanted_N, axes, error, max(tolerance, 1e-9))


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _explained(held_RN: Tensor, wanted_N: Tensor, axes: Axes, error: float, tolerance: float) -> Difference:
    if not math.isfinite(error):
        ranks = [rank for rank, values in enumerate(held_RN) if values.isinf().any()]
        return Difference(error=error, text=f"not finite on {_ranks(ranks, axes)}")
    if not _largest(wanted_N):
        return Difference(error=error, text="zero in one process")
    factors = {
        rank: _factor(values, wanted_N, tolerance) for rank, values in enumerate(held_RN) if _tells(values, wanted_N)
    }
    known = [factor for factor in factors.values() if factor is not None]
    if known and len(known) == len(factors) and _alike(known):
        return _by_factor(known[0], axes, error)
    for along in axes.subsets():
        if _copies_agree(held_RN, along, axes, tolerance):
            continue  # nothing is left to sum
        factor = _factor_of_sums(held_RN, wanted_N, along, axes, tolerance)
        if factor is not None:
            return _of_parts(factor, along, axes, error)
    if known and len(known) == len(factors):
        return _by_place({rank: factor for rank, factor in factors.items() if factor is not None}, axes, error)
    wrong = [rank for rank, factor in factors.items() if factor is None or not _alike([factor, 1.0])]
    return Difference(error=error, text=f"no multiple of that of one process, on {_ranks(wrong, axes)}")


def _tells(values_N: Tensor, wanted_N: Tensor) -> bool:
    """Whether a rank holds an entry by which a factor is told."""
    held = ~values_N.isnan()
    return bool(held.any()) and (_largest(wanted_N[held]) > 0 or _largest(values_N[held]) > 0)


def _factor(values_N: Tensor, wanted_N: Tensor, tolerance: float) -> float | None:
    """c with values = c * wanted where they are held; None: there is none."""
    held = ~values_N.isnan()
    got, wanted = values_N[held], wanted_N[held]
    if not _largest(wanted):
        return None
    factor = float(got @ wanted) / float(wanted @ wanted)
    within = 10 * tolerance * max(abs(factor), 1.0) * _largest(wanted_N)
    return factor if _largest(got - factor * wanted) <= within else None


def _factor_of_sums(
    held_RN: Tensor, wanted_N: Tensor, along: Sequence[str], axes: Axes, tolerance: float
) -> float | None:
    """The factor that every rank would have, if ranks summed along some axes what they hold of an entry."""
    factors: list[float | None] = []
    for ranks in axes.groups(along):
        total_N = held_RN[ranks].nansum(0)
        total_N[held_RN[ranks].isnan().all(0)] = float("nan")
        if _tells(total_N, wanted_N):
            factors.append(_factor(total_N, wanted_N, tolerance))
    known = [factor for factor in factors if factor is not None]
    return known[0] if known and len(known) == len(factors) and _alike(known) else None


def _copies_agree(held_RN: Tensor, along: Sequence[str], axes: Axes, tolerance: float) -> bool:
    for ranks in axes.groups(along):
        for one, other in combinations(ranks, 2):
            both = ~(held_RN[one].isnan() | held_RN[other].isnan())
            if _largest((held_RN[one] - held_RN[other])[both]) > tolerance * _largest(held_RN[one][both]):
                return False
    return True


def _alike(factors: Sequence[float]) -> bool:
    return max(factors) - min(factors) <= _ALIKE * max(abs(factor) for factor in factors)


# -- in words ----------------------------------------------------------------------------------------------------------


def _by_factor(factor: float, axes: Axes, error: float) -> Difference:
    """The same factor on all ranks, and the axes whose size it is."""
    if abs(factor) <= _ALIKE:
        return Difference(error=error, factor=0.0, text="zero on every rank")
    for along in axes.subsets():
        size = axes.size(along)
        for wanted, why in ((size, "summed twice, or not averaged"), (1 / size, "averaged twice, or not summed")):
            if _alike([factor, wanted]):
                same = [each for each in axes.subsets() if axes.size(each) == size]
                named = " or ".join(map(_named, same))
                return Difference(error=error, factor=factor, axes=along, text=f"{factor:.4g} x on {named}: {why}")
    return Difference(error=error, factor=factor, text=f"{factor:.4g} x on every rank")


def _of_parts(factor: float, along: tuple[str, ...], axes: Axes, error: float) -> Difference:
    """The ranks' values are parts: their sum is the reference times the factor."""
    if _alike([factor, 1.0]):
        more = "not summed"
    elif _alike([factor, axes.size(along)]):
        more = "not averaged"
    else:
        more = f"not summed, and their sum is {factor:.4g} x"
    return Difference(error=error, axes=along, text=f"each rank has its own on {_named(along)}: {more}")


def _by_place(factors: Mapping[int, float], axes: Axes, error: float) -> Difference:
    """Each rank has a factor of its own; if they follow from the place on one axis, that axis is named."""
    for name in axes.sizes:
        by_place: dict[int, list[float]] = {}
        for rank, factor in factors.items():
            by_place.setdefault(axes.place(rank)[name], []).append(factor)
        if all(_alike(values) or not any(values) for values in by_place.values()):
            told = ", ".join(f"{values[0]:.4g} x at {place}" for place, values in sorted(by_place.items()))
            return Difference(error=error, axes=(name,), text=f"by the place on `{name}`: {told}")
    told = ", ".join(f"{factor:.4g} x on rank {rank}" for rank, factor in factors.items())
    return Difference(error=error, text=told)


def _ranks(ranks: Sequence[int], axes: Axes) -> str:
    if len(ranks) == axes.num_ranks:
        return "every rank"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _named(along: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in along)
