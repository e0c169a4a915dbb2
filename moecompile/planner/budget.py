"""trainer.checkpointing=budget: what backward computes again, for each layer, so that a plan fits with the least time.

A layer has these choices                                                                          -> `_choices`
    nothing    it keeps all that backward needs
    parts      of norms, attention, experts (in a dense layer its FFN): any of them
    layer      all of it, from its input
and where the parts have exchanges, what these brought is kept, or they are sent again.

1. Bytes that a layer keeps with a choice, and what is computed again at a time, at the load that is to be expected:
   memory.py, A2. Layers with the same bytes, parts and products are of a kind, so that only numbers are chosen.
2. Seconds of a choice: the sum over its parts of what a step takes longer if backward repeats that part of one layer,
   by the forecast of the plan's step (cost_model/).                                               -> `prices_of`
3. With a bound on what is computed again at a time, the bytes that layers may keep follow from the memory of a rank
   (`most_kept`); each bound that a choice needs is tried.
4. Choices of a kind that lie on the lower hull of seconds over bytes. All layers start with the fewest bytes; then the
   step along a hull that saves the most seconds for its bytes is taken for as many layers as there is room for, until
   none is left; last, any change of a layer that still fits. A knapsack, to within one layer.      -> `_filled`
The first layers of a kind, which keep longest, get the choices with the fewest bytes. If nothing fits, all layers are
computed again and exchanges sent again. `HEADROOM` of the memory is left free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import inf

from moecompile.errors import ConfigError, PlanError
from moecompile.mesh import MeshSpec
from moecompile.plan import ATTENTION, BUDGET, EXPERTS, FFN, LAYER, NORMS, LayerPlan, Recomputation, Recomputed
from moecompile.planner.cost_model.forecast import step_of
from moecompile.planner.cost_model.inputs import Inputs
from moecompile.planner.cost_model.shapes import Layer, ModelShape
from moecompile.planner.lookups import kept_bytes
from moecompile.planner.memory import (
    Activations,
    Gradients,
    LayerBytes,
    activations,
    layer_bytes,
    most_kept,
    owner_of,
    together,
)
from moecompile.planner.params import ModelFacts, RunFacts

HEADROOM = 0.05
"""Share of a rank's memory that a budget leaves free: the process itself and gaps between tensors are not counted."""
_AGAIN = "Correct the plan, or plan again"
_WORDS = {ATTENTION: "attention", NORMS: "layernorm", FFN: "mlp"}


Prices = Sequence[Mapping[str, float]]
"""For each kind of layer of a shape: word -> seconds that a step takes longer if that is repeated for one layer."""


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """Layers of a kind: their paths, what they can keep with the expected and with an even load, their parts, and their
    place in the shape. times: micro-batches of which they keep it at a time.
    """

    layers: tuple[str, ...]
    times: int
    bytes: LayerBytes
    even: LayerBytes
    parts: tuple[tuple[str, tuple[str, ...]], ...]
    place: int


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """A choice of one layer. what: None for nothing. kept, again: bytes. seconds: of a step."""

    what: Recomputed | None
    kept: float
    again: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What backward computes again, and the activations with the expected and with an even load."""

    recomputed: tuple[Recomputed, ...]
    expected: Activations
    even: Activations


class Budget:
    """The layers of a rank, their choices and what these cost, for any memory that is left.

    Args:
        run: with the load that is to be expected. prices: of the layers of the shape, see `prices_of`. keeps_exchanges:
            whether what exchanges brought can be kept.

    Raises:
        ConfigError: the model has no list of layers.
    """

    def __init__(
        self, layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts, shape: ModelShape,
        prices: Prices, *, keeps_exchanges: bool = True,
    ) -> None:  # fmt: skip
        places, paths = dict(shape.places), [fact.path for fact in facts.layers]
        here = [path for path in places if path in paths] if run.in_flight_of else list(places)  # of stages some
        if not paths or here != paths:
            raise ConfigError(
                "trainer.checkpointing", BUDGET, "chooses for each layer, and this model has no list of layers",
                "Use auto",
            )  # fmt: skip
        loads = [replace(run, checkpointing="none", row_load=load) for load in (run.row_load, 1.0)]
        self.whole = [replace(activations(layers, mesh, facts, each), kinds=(), each=()) for each in loads]
        self.beside = kept_bytes(facts, run)
        bytes_, even = (layer_bytes(layers, mesh, facts, each) for each in loads)
        with_experts = {owner_of(layer, bytes_) for layer in layers}
        by_kind: dict[tuple[object, ...], _Kind] = {}
        for fact in facts.layers:
            path, place, times = fact.path, places[fact.path], dict(run.in_flight_of).get(fact.path, 1)
            ffn = EXPERTS if path in with_experts else FFN
            parts = tuple((ffn if part == FFN else part, modules) for part, modules in fact.parts)
            kind = _Kind(layers=(path,), times=times, bytes=bytes_[path], even=even[path], parts=parts, place=place)
            known = by_kind.setdefault((bytes_[path], times, parts, place), replace(kind, layers=()))
            by_kind[bytes_[path], times, parts, place] = replace(known, layers=(*known.layers, path))
        self.kinds = list(by_kind.values())
        self.prices = prices
        self.choices = [_choices(kind, self.prices[kind.place], keeps_exchanges) for kind in self.kinds]
        bounds = sorted({choice.again for choices in self.choices for choice in choices})
        self.hulls = [
            (bound, [_hull([c for c in each if c.again <= bound]) for each in self.choices]) for bound in bounds
        ]

    def within(self, grads: Gradients, limit: float, buffers: int = 0) -> Chosen:
        """The choices with the least time with which gradients and activations need at most `limit` bytes (steps 3, 4).

        Args:
            grads: of the run. buffers: bytes of those of exchanges.
        """
        best, least, used = None, inf, inf
        for bound, hulls in self.hulls:
            made = replace(self.whole[0], layers=self.whole[0].layers + bound)
            room = most_kept(grads, made, limit, buffers) - self.beside
            filled = _filled(self.kinds, hulls, room)
            if filled is not None and filled.seconds < least:
                best, least, used = filled, filled.seconds, bound
        if best is None:
            least_kept = [min(each, key=lambda choice: (choice.kept, choice.seconds)) for each in self.choices]
            return self._chosen([[(c, len(kind.layers))] for kind, c in zip(self.kinds, least_kept, strict=True)])
        allowed = [[choice for choice in each if choice.again <= used] for each in self.choices]
        return self._chosen(_topped_up(best, allowed))

    @property
    def layers(self) -> list[str]:
        """Paths of the layers."""
        return [path for kind in self.kinds for path in kind.layers]

    def costs(self, recomputed: Sequence[Recomputed]) -> Iterator[Recomputation]:
        """What the choices of a plan cost, for each kind of layer.

        Raises:
            PlanError: a plan that was edited names parts that the model does not have.
        """
        chosen = {path: each for each in recomputed for path in each.layers}
        for kind in self.kinds:
            groups: dict[Recomputed | None, list[str]] = {}
            for path in kind.layers:
                groups.setdefault(chosen.get(path), []).append(path)
            for what, paths in groups.items():
                parts, sends = ((), False) if what is None else (what.parts, what.sends)
                if missing := [part for part in parts if part not in (LAYER, *dict(kind.parts))]:
                    raise PlanError("recomputed.parts", missing[0], f"{paths[0]} has no such part", _AGAIN)
                price = sum(_price(part, sends, self.prices[kind.place]) for part in parts)
                yield Recomputation(
                    site=paths[0], parts=parts, sends=sends, layers=len(paths),
                    kept=round(kind.times * kind.even.kept(what)),
                    kept_uneven=round(kind.times * kind.bytes.kept(what)), seconds=price * len(paths),
                )  # fmt: skip

    def _chosen(self, numbers: Sequence[_Numbers]) -> Chosen:
        """The first layers of a kind get the fewest bytes."""
        found, kept, even, again, even_again = list[Recomputed](), self.beside, self.beside, 0.0, 0.0
        for kind, chosen in zip(self.kinds, numbers, strict=True):
            start = 0
            for choice, count in chosen:
                kept, even = kept + count * choice.kept, even + count * kind.times * kind.even.kept(choice.what)
                if count and choice.what is not None:
                    again = max(again, choice.again)
                    even_again = max(even_again, kind.even.again(choice.what.parts))
                    found.append(replace(choice.what, layers=kind.layers[start : start + count]))
                start += count
        made, even_made = self.whole
        return Chosen(
            recomputed=tuple(found), expected=replace(made, kept=kept, layers=made.layers + again),
            even=replace(even_made, kept=even, layers=even_made.layers + even_again),
        )  # fmt: skip


def prices_of(shape: ModelShape, seconds: Callable[[ModelShape], float]) -> Prices:
    """For each kind of layer: word -> seconds that a step takes longer if that is repeated for one layer."""
    found: list[Mapping[str, float]] = []
    none = replace(shape, layers=tuple(replace(layer, recompute=()) for layer in shape.layers))
    least = seconds(none)
    for place, layer in enumerate(none.layers):
        is_moe = layer.ffn is not None and layer.ffn.experts > 0
        words = ("attention", "layernorm", *(("experts", "moe") if is_moe else ("mlp",)))
        prices = {word: max(0.0, seconds(_with_one(none, place, layer, word)) - least) for word in words}
        found.append(prices)
    return found


def _with_one(shape: ModelShape, place: int, layer: Layer, word: str) -> ModelShape:
    one = replace(layer, count=1, recompute=(word,))
    rest = (replace(layer, count=layer.count - 1),) if layer.count > 1 else ()
    return replace(shape, layers=(*shape.layers[:place], *rest, one, *shape.layers[place + 1 :]))


def _choices(kind: _Kind, prices: Mapping[str, float], keeps_exchanges: bool) -> list[_Choice]:
    names = [part for part, _ in kind.parts]
    modules = dict(kind.parts)
    found = [_Choice(what=None, kept=kind.times * kind.bytes.kept(None), again=0.0, seconds=0.0)]
    sets = [each for number in range(1, len(names) + 1) for each in combinations(names, number)]
    for parts in (*sets, (LAYER,)):
        has_exchanges = kind.bytes.exchanged > 0 and (LAYER in parts or EXPERTS in parts)
        paths = ("",) if parts == (LAYER,) else tuple(path for part in parts for path in modules[part])
        for sends in (False, True) if has_exchanges and keeps_exchanges else (has_exchanges,):
            what = Recomputed(parts=parts, sends=sends, modules=paths, layers=())
            seconds = sum(_price(part, sends, prices) for part in parts)
            kept, again = kind.times * kind.bytes.kept(what), kind.bytes.again(parts)
            found.append(_Choice(what=what, kept=kept, again=again, seconds=seconds))
    return found


def _price(part: str, sends: bool, prices: Mapping[str, float]) -> float:
    if part == LAYER:
        ffn = EXPERTS if EXPERTS in prices else FFN
        return sum(_price(each, sends, prices) for each in (ATTENTION, NORMS, ffn))
    if part == EXPERTS:
        return prices["moe" if sends else "experts"]
    return prices[_WORDS[part]]


_Numbers = list[tuple[_Choice, int]]
"""Choices of a kind, the fewest bytes first, and for how many of its layers."""


@dataclass(frozen=True, kw_only=True)
class _Filled:
    """Choices along the hulls. found: of each kind, choice -> number of layers. left: bytes."""

    found: list[dict[_Choice, int]]
    left: float
    seconds: float


def _filled(kinds: Sequence[_Kind], hulls: Sequence[Sequence[_Choice]], room: float) -> _Filled | None:
    """Step 4, along the hulls; None if there is no room for the fewest bytes."""
    left = room - sum(hull[0].kept * len(kind.layers) for kind, hull in zip(kinds, hulls, strict=True))
    if left < 0:
        return None
    numbers = [[len(kind.layers), *[0] * (len(hull) - 1)] for kind, hull in zip(kinds, hulls, strict=True)]
    steps = [(kind, at) for kind, hull in enumerate(hulls) for at in range(len(hull) - 1)]
    steps.sort(key=lambda step: -_worth(hulls[step[0]], step[1]))
    for kind, at in steps:  # along a hull the worth falls, so a kind's steps come in order
        more = hulls[kind][at + 1].kept - hulls[kind][at].kept
        taken = min(numbers[kind][at], int(left / more))
        numbers[kind][at] -= taken
        numbers[kind][at + 1] += taken
        left -= taken * more
    found = [dict(zip(hull, counts, strict=True)) for hull, counts in zip(hulls, numbers, strict=True)]
    seconds = sum(choice.seconds * count for each in found for choice, count in each.items())
    return _Filled(found=found, left=left, seconds=seconds)


def _topped_up(filled: _Filled, choices: Sequence[Sequence[_Choice]]) -> list[_Numbers]:
    """Step 4, its last part: any change of a layer that still fits."""
    found, left = filled.found, filled.left
    while (last := _last(found, choices, left)) is not None:
        kind, now, then = last
        found[kind][now] -= 1
        found[kind][then] = found[kind].get(then, 0) + 1
        left -= then.kept - now.kept
    return [sorted(each.items(), key=lambda pair: pair[0].kept) for each in found]


def _last(
    found: Sequence[Mapping[_Choice, int]], choices: Sequence[Sequence[_Choice]], left: float
) -> tuple[int, _Choice, _Choice] | None:
    """The change of one layer that saves the most seconds in the room that is left: (kind, from, to)."""
    possible = [
        (now.seconds - then.seconds, kind, now, then)
        for kind, numbers in enumerate(found)
        for now, count in numbers.items()
        if count
        for then in choices[kind]
        if then.kept - now.kept <= left and then.seconds < now.seconds
    ]
    best = max(possible, key=lambda each: each[0], default=None)
    return None if best is None else best[1:]


def _worth(hull: Sequence[_Choice], at: int) -> float:
    return (hull[at].seconds - hull[at + 1].seconds) / (hull[at + 1].kept - hull[at].kept)


def _hull(choices: Sequence[_Choice]) -> list[_Choice]:
    """The lower hull of seconds over bytes, the fewest bytes first."""
    hull: list[_Choice] = []
    for choice in sorted(choices, key=lambda each: (each.kept, each.seconds)):
        if hull and choice.seconds >= hull[-1].seconds:
            continue
        while len(hull) > 1 and _slope(hull[-2], choice) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(left: _Choice, right: _Choice) -> float:
    """Seconds per byte, which falls."""
    return (right.seconds - left.seconds) / (right.kept - left.kept)


@dataclass(frozen=True, kw_only=True)
class Within:
    """A run with what it computes again, and bytes of the fullest rank with the expected and with an even load."""

    run: RunFacts
    expected: int
    even: int


def within(
    budget: Budget, run: RunFacts, states: tuple[int, Gradients, int], buffers: int, even_buffers: int, limit: float
) -> Within:
    """The run with the choices of the least time that fit.

    Args:
        states: bytes of weights, gradients and optimizer. buffers, even_buffers: of exchanges, with the expected and
            with an even load. limit: bytes of a rank, of which `HEADROOM` is left free.
    """
    weights, grads, optimizer = states
    rest = weights + optimizer
    chosen = budget.within(grads, (1 - HEADROOM) * limit - rest, buffers)
    return Within(
        run=replace(run, recomputed=chosen.recomputed),
        expected=rest + together(grads, chosen.expected, buffers),
        even=rest + together(grads, chosen.even, even_buffers),
    )


def fastest(
    ways: Sequence[RunFacts], fit: Callable[[RunFacts], Within], limit: float, seconds: Callable[[RunFacts], float]
) -> Within:
    """Of the ways that fit, the one with the least time; if none does, the one that needs the least.

    Args:
        ways: those that send the fewest bytes first. So what comes after one that fits with nothing computed again is
            not faster, and is not looked at.
    """
    tried = list[Within]()
    for run in ways:
        tried.append(fit(run))
        if tried[-1].expected <= limit and not tried[-1].run.recomputed:
            break
    fitting = [each for each in tried if each.expected <= limit]
    if len(fitting) < 2:
        return fitting[0] if fitting else min(tried, key=lambda each: each.expected)
    return min(fitting, key=lambda each: seconds(each.run))


def rank_prices(inputs: Inputs, places: int) -> Prices:
    """`prices_of` a step: what a rank takes longer, of one of so many places along pp.

    A forecast is of an average rank, which has one of so many layers that are repeated.
    """

    def seconds(shape: ModelShape) -> float:
        return sum(step_of(replace(inputs, model=shape)).values())

    return [{word: places * price for word, price in each.items()} for each in prices_of(inputs.model, seconds)]


def budget_of(
    layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts, shape: ModelShape, prices: Prices
) -> Budget:
    """The budget of the ranks of a place along pp.

    Args:
        run: with the load that is to be expected. prices: from `rank_prices`.

    Raises:
        ConfigError: the model has no list of layers.
    """
    keeps_exchanges = not any(layer.dispatch.backend for layer in layers)
    return Budget(layers, mesh, facts, run, shape, prices, keeps_exchanges=keeps_exchanges)


def together_within(run: RunFacts, places: Sequence[Within], facts: ModelFacts) -> Within:
    """What all places along pp compute again, in the order of the model, and the bytes of the fullest of them."""
    order = {fact.path: i for i, fact in enumerate(facts.layers)}
    layers: dict[Recomputed, list[str]] = {}
    for place in places:
        for each in place.run.recomputed:
            layers.setdefault(replace(each, layers=()), []).extend(each.layers)
    found = [replace(what, layers=tuple(sorted(paths, key=order.__getitem__))) for what, paths in layers.items()]
    recomputed = tuple(sorted(found, key=lambda each: order[each.layers[0]]))
    return Within(
        run=replace(run, recomputed=recomputed), expected=max(each.expected for each in places),
        even=max(each.even for each in places),
    )  # fmt: skip


def costs_of(budgets: Sequence[Budget], recomputed: Sequence[Recomputed]) -> Iterator[Recomputation]:
    """What the choices of a plan cost, for each kind of layer of each place.

    Raises:
        PlanError: a plan that was edited names layers or parts that the model does not have.
    """
    known = {path for budget in budgets for path in budget.layers}
    if strange := [path for each in recomputed for path in each.layers if path not in known]:
        raise PlanError("recomputed.layers", strange[0], "is no layer of the model", _AGAIN)
    for budget in budgets:
        yield from budget.costs(recomputed)
