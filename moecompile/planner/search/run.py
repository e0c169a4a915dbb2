"""The whole search: candidates that run and described ones, their fronts, and what was kept.

Algorithm:
  1. The plan of the config as it is: what training must not change.
  2. Layouts that this package runs, then described ones (described.py).
  3. The front of speed against memory of each kind, of those that fit with the load that is to be expected; the fastest
     of each is best.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from heapq import heapify, heappop, heappush
from itertools import product
from math import inf
from typing import Any

from moecompile.collector import uncollected
from moecompile.errors import ConfigError, MoecompileError
from moecompile.mesh import MeshSpec
from moecompile.plan import BUDGET, FITS, IN_FLIGHT, LayerPlan, Plan, PlannedSite, fit_of
from moecompile.planner.budget import (
    Budget,
    Prices,
    Within,
    budget_of,
    fastest,
    rank_prices,
    together_within,
    within,
)
from moecompile.planner.build_plan import GIB, draft_plan, run_facts
from moecompile.planner.cost_model.forecast import expected_load, step_of
from moecompile.planner.cost_model.inputs import DESCRIBED_SCHEDULE, REPEATED, Inputs, inputs_of
from moecompile.planner.cost_model.shapes import ModelShape, with_recomputed
from moecompile.planner.memory import (
    SEVERAL,
    Activations,
    Gradients,
    Known,
    activations,
    buffer_bytes,
    model_state_bytes,
    together,
    tokens_of_a_rank,
)
from moecompile.planner.params import ModelFacts, RunFacts
from moecompile.planner.pipeline import OfRank, alike, ranks_of
from moecompile.planner.schedule import Sharded, choose, sharded, ways
from moecompile.planner.search.axes import KINDS, Axes, Stages, all_alike, axes_of
from moecompile.planner.search.described import Described, Space, described, memory_of, settings_of, space_of
from moecompile.planner.search.found import Candidate, Reason, Rejected, front, tight
from moecompile.schema import (
    Checkpointing,
    Config,
    DispatchBalance,
    DispatchConfig,
    DispatchKind,
    OverlapKind,
    WireDtype,
    WorkloadConfig,
)
from moecompile.stages import NONE, schedule_of

# -- layouts that this package runs: plan, memory and seconds are those that task=plan gives ------------------------
#
# Algorithm:
#   1. A structure is what changes the plan: EP and TP size, stages, kind of dispatch, and what changes the model.
#      Each is planned once; what cannot be planned is rejected by the plan's own rule. A plan whose router, experts or
#      balance differ from those of the config would train another model, and is rejected too, unless that is searched.
#   2. Within a structure, micro-batch, recomputation, overlap and replicas change numbers alone:
#        states        by EP and TP size, replicas, whether micro-batches accumulate, and when weights are gathered
#                      and gradients reduced                                                            -> `_States`
#        activations   by structure, overlap (yes or no), micro-batch and recomputation
#        seconds       by all of them, of what fits                                        (cost_model/forecast.py)
#   3. Of a pipeline, memory is that of its fullest rank; ranks whose parts have the same sizes are counted once. Where
#      each of them has a budget, layouts are tried last: those that would be the fastest if nothing were computed
#      again, in the order of what they would take if all did as the first or the last place must, while that is so.

MOST_ROUNDED = 0.1  # of a published batch, which task=plan rounds up to whole micro-batches


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is searched. sites, facts: of the model. config: its `data.global_batch_size` is the batch before rounding.

    layers: the plan of the config as it is. shape: a plan's shape for the time model. rounds: whether the batch may be
    rounded up, as a published one is. loads: routers -> EP size -> load that is to be expected, as they become known.
    """

    sites: Sequence[PlannedSite]
    facts: ModelFacts
    config: Config
    layers: Sequence[LayerPlan]
    shape: Callable[[Plan], ModelShape]
    axes: Axes
    rounds: bool
    loads: dict[object, dict[int, float]] = field(default_factory=dict)

    def load_of(self, plan: Plan, config: Config) -> Callable[[int], float]:
        """EP size -> the load that is to be expected, which changes with it and with the routers alone."""
        of_layers = {id(layer.routing): (layer.experts.num_routed, layer.routing) for layer in plan.layers}
        known = self.loads.setdefault(frozenset(of_layers.values()), {})

        def load(ep: int) -> float:
            if ep not in known:
                known[ep] = expected_load(plan, config, ep).load
            return known[ep]

        return load


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """Ranks along pp whose parts have the same sizes. of: one of them."""

    of: OfRank
    ranks: Sequence[OfRank]

    @cached_property
    def overlapped(self) -> tuple[LayerPlan, ...]:
        """Its layers with exchanges in flight."""
        return _overlapped(self.of.layers)


@dataclass(frozen=True, kw_only=True)
class _Structure:
    """A planned structure (step 1). load: that is to be expected. kinds: of ranks along pp (step 3)."""

    config: Config
    plan: Plan
    facts: ModelFacts
    inputs: Inputs
    load: float
    kinds: Sequence[_Kind]

    def runs(self, kind: _Kind, run: RunFacts) -> list[RunFacts]:
        """Of its ranks those that can keep the most for backward: where its stages are alike, the one of the most."""
        pipeline, ranks = self.plan.pipeline, kind.ranks
        if pipeline is None:
            return [run]
        if len(set(kind.of.kinds)) == 1:
            ranks = [max(ranks, key=lambda of: of.in_flight(pipeline, run.accumulation))]
        return [kind.of.run(run, pipeline, of) for of in ranks]


def runnable(search: Search, rejected: Rejected) -> Iterator[Candidate]:
    """The candidates that fit, with an even load at least; the others are counted in `rejected`."""
    shapes: dict[object, ModelShape] = {}
    states = _States()
    for structure in _structures(search, shapes, rejected):
        yield from _inside(search, structure, states, rejected)
    yield from _later(search, states, rejected)


def _structures(search: Search, shapes: dict[object, ModelShape], rejected: Rejected) -> Iterator[_Structure]:
    """Step 1."""
    axes = search.axes
    inside = len(axes.micro_batch) * len(axes.checkpointing)
    for granularity, nodes, (sizes, stages) in product(axes.granularity, axes.max_nodes, axes.meshes()):
        config = _with(search.config, sizes, granularity=granularity, max_nodes=nodes, stages=stages)
        if "checkpointing" not in axes.kept:
            config = replace(config, trainer=replace(config.trainer, checkpointing=Checkpointing.auto))
        kinds = ("local",) if sizes["ep"] == 1 and len(axes.dispatch) > 1 else axes.dispatch
        for kind in kinds:
            text = f"{' '.join(f'mesh.{name}={size}' for name, size in sizes.items())} dispatch.kind={kind}"
            try:
                planned = _planned(search, _dispatched(config, kind), shapes)
            except MoecompileError as error:
                rejected.add(_rule(error), text, inside)
                continue
            if kind == "hierarchical" and planned.plan.mesh.nodes_per_ep_group == 1 and len(kinds) > 1:
                continue  # it is dedup there
            if change := _changed(search, planned.plan):
                rejected.add(f"would change the model: {change}; search.model=true allows it", text, inside)
                continue
            yield planned


def _with(
    config: Config, sizes: Mapping[str, Any], *, granularity: int, max_nodes: int | None, stages: Stages
) -> Config:
    schedule, number, overlap = stages
    mesh = replace(config.mesh, **sizes, dp_replicate=1, dp_shard="auto")
    return replace(
        config, mesh=mesh, experts=replace(config.experts, granularity=granularity),
        routing=replace(config.routing, max_nodes=max_nodes), workload=as_run(config.workload),
        pipeline=replace(
            config.pipeline, schedule=schedule, stages_per_rank=number, overlap=overlap if sizes["ep"] > 1 else NONE
        ),
    )  # fmt: skip


def as_run(workload: WorkloadConfig) -> WorkloadConfig:
    """The workload without what is described."""
    return replace(workload, tp=1, pp=1, vpp=1, cp=1, etp=1, zero=3, mtp=0)


def _dispatched(config: Config, kind: str) -> Config:
    dispatch = replace(config.dispatch, kind=DispatchKind(kind), overlap=OverlapKind.none, chunks="auto")
    return replace(config, dispatch=dispatch)


def _planned(search: Search, config: Config, shapes: dict[object, ModelShape]) -> _Structure:
    plan, facts = draft_plan(search.sites, config, search.facts)
    key = (frozenset((layer.experts, layer.routing) for layer in plan.layers), config.experts.granularity)
    if key not in shapes:
        shapes[key] = search.shape(plan)
    kinds = [_Kind(of=ranks[0], ranks=ranks) for ranks in alike(ranks_of(plan, facts))]
    return _Structure(
        config=config, plan=plan, facts=facts, inputs=inputs_of(shapes[key], plan, config),
        load=search.load_of(plan, config)(plan.mesh.ep), kinds=kinds,
    )  # fmt: skip


def _overlapped(layers: Sequence[LayerPlan]) -> tuple[LayerPlan, ...]:
    dispatches = {id(layer.dispatch): layer.dispatch for layer in layers if _in_flight(layer)}
    flying = {key: replace(dispatch, overlap="shared") for key, dispatch in dispatches.items()}  # one, as it was
    return tuple(
        replace(layer, dispatch=flying[id(layer.dispatch)]) if id(layer.dispatch) in flying else layer
        for layer in layers
    )


def _in_flight(layer: LayerPlan) -> bool:
    """Whether exchanges of a layer may be in flight."""
    return layer.dispatch.kind in IN_FLIGHT and not layer.dispatch.backend


def _changed(search: Search, plan: Plan) -> str | None:
    """What a plan would train differently from the plan of the config."""
    if search.config.search.model:
        return None
    for name in ("experts", "routing", "balance"):
        if any(getattr(a, name) != getattr(b, name) for a, b in zip(plan.layers, search.layers, strict=True)):
            return name if name != "routing" else "the router's groups follow the nodes of an EP group"
    return None


def _rule(error: MoecompileError) -> str:
    path, rule = getattr(error, "path", ""), getattr(error, "rule", str(error))
    return f"{path}: {rule.split(' (')[0]}" if path else str(rule)


def _inside(search: Search, structure: _Structure, states: _States, rejected: Rejected) -> Iterator[Candidate]:
    """Step 2."""
    axes, config, mesh = search.axes, structure.config, structure.plan.mesh
    limit = config.hardware.memory_gib * GIB
    replicas = [n for n in axes.dp_replicate if not mesh.edp % n and not mesh.num_batches % n]
    checkpointing = axes.checkpointing
    if structure.plan.pipeline is not None:
        replicas = replicas[:1]
        checkpointing = (*all_alike(config), *checkpointing) if "checkpointing" not in axes.kept else checkpointing
    for micro_batch in axes.micro_batch:
        inner = len(checkpointing) * len(replicas)
        batch = _batch(search, micro_batch * mesh.num_batches)
        if batch is None:
            rule = f"the batch of {search.config.data.global_batch_size:,} sequences must be a whole number of " \
                "micro-batches on every rank"  # fmt: skip
            rejected.add(rule, f"{mesh.setting(*axes.sharing)} data.micro_batch_size={micro_batch}", inner)
            continue
        data = replace(config.data, micro_batch_size=micro_batch, global_batch_size=batch)
        given, placed = replace(config, data=data), structure
        if _follows_tokens(config.dispatch):
            placed = _planned(search, given, {})
        run = run_facts(given, mesh, structure.facts)
        memory = _memory(placed, run, states)
        for again in checkpointing:
            one = replace(run, checkpointing=again)
            yield from _of_micro_batch(search, placed, one, batch, replicas, states, memory, limit, rejected)


def _follows_tokens(dispatch: DispatchConfig) -> bool:
    """Whether the micro-batch decides what a plan chooses: the kind, numbers on the wire, what a loan is worth."""
    return (
        dispatch.kind is DispatchKind.auto or dispatch.wire_dtype is WireDtype.fp8_if_faster
        or dispatch.balance is not DispatchBalance.none
    )  # fmt: skip


def _batch(search: Search, step: int) -> int | None:
    """The batch, rounded up as task=plan rounds a published one; None if it is not a whole number of micro-batches."""
    given = search.config.data.global_batch_size
    batch = -(-given // step) * step
    return batch if batch == given or (search.rounds and batch <= given * (1 + MOST_ROUNDED)) else None


def _of_micro_batch(
    search: Search, structure: _Structure, run: RunFacts, batch: int, replicas: Sequence[int], states: _States,
    memory: _Memory, limit: float, rejected: Rejected,
) -> Iterator[Candidate]:  # fmt: skip
    overlaps = [each for each in search.axes.overlap if _possible(each, structure, run)]
    of = _MicroBatch(structure, run, batch, states, memory, limit)
    is_dear = run.checkpointing == BUDGET and structure.plan.pipeline is not None
    for number, overlap in product(replicas, overlaps):
        if is_dear and "checkpointing" not in search.axes.kept:
            if of.may_fit(number, overlap):
                states.later.append((of.bare(number, overlap)[0][0], of, number, overlap))
        elif (found := _candidate(search, of, number, overlap, rejected)) is not None:
            yield found


def _later(search: Search, states: _States, rejected: Rejected) -> Iterator[Candidate]:
    """Those that are dear to plan, while they may be the fastest."""
    left = [(least, False, i) for i, (least, *_) in enumerate(states.later)]
    heapify(left)
    while left and (nearest := heappop(left))[0] < states.fastest:
        _, is_bounded, i = nearest
        _, of, number, overlap = states.later[i]
        if not is_bounded:
            heappush(left, (of.of_the_ends(number, overlap), True, i))
        elif (found := _candidate(search, of, number, overlap, rejected)) is not None:
            yield found


def _candidate(
    search: Search, of: _MicroBatch, number: int, overlap: tuple[str, int], rejected: Rejected
) -> Candidate | None:  # fmt: skip
    """None: it does not fit."""
    again, needed, uneven = of.fitted(number, overlap)
    settings = _settings(search, of.structure, again, number, overlap, of.batch)
    if needed > of.limit:
        rejected.too_large(needed, of.limit, settings)
        return None
    seconds, fits = of.seconds(number, overlap, again), fit_of(needed, uneven, of.limit)
    if fits == FITS:
        of.states.fastest = min(of.states.fastest, seconds)
    speed = of.batch * of.structure.inputs.layout.seq / of.structure.plan.mesh.world_size / seconds
    return Candidate(
        settings=settings, runs=True, seconds=seconds, tokens_per_second_per_rank=speed, memory_bytes=needed,
        memory_bytes_uneven=uneven, fits=fits,
    )  # fmt: skip


_Memory = Callable[[int, RunFacts, float, bool], int]


class _MicroBatch:
    """A structure with a micro-batch and a way of checkpointing: memory and seconds by replicas and overlap.

    Args:
        batch: of a step. memory: of this micro-batch. limit: bytes of a rank.
    """

    def __init__(
        self, structure: _Structure, run: RunFacts, batch: int, states: _States, memory: _Memory, limit: float
    ) -> None:  # fmt: skip
        self.structure, self.run, self.states, self.limit, self.batch = structure, run, states, limit, batch
        self.memory, self.step = memory, partial(_step, structure, batch)
        self.ranks = sorted((of for kind in structure.kinds for of in kind.ranks), key=lambda of: of.index)
        self._budgets: dict[object, Budget] = {}
        self._prices: dict[tuple[str, int], Prices] = {}
        self._ways: dict[int, list[RunFacts]] = {}
        self._bare: dict[tuple[int, tuple[str, int]], list[tuple[float, RunFacts]]] = {}

    @cached_property
    def _of_exchanges(self) -> list[list[int]]:
        """Bytes of buffers of each place along pp, with the load that is to be expected and with an even one."""
        loads = [replace(self.run, row_load=load) for load in (self.structure.load, 1.0)]
        return [[buffer_bytes(of.layers, of.mesh, each) for each in loads] for of in self.ranks]

    def seconds(self, replicas: int, overlap: tuple[str, int], run: RunFacts) -> float:
        """Of a step."""
        return sum(step_of(self.step(replicas, overlap, run)).values())

    def bare(self, replicas: int, overlap: tuple[str, int]) -> list[tuple[float, RunFacts]]:
        """Seconds of a step with each way, if nothing were computed again; the fewest first."""
        if (replicas, overlap) not in self._bare:
            found = [(self.seconds(replicas, overlap, way), way) for way in self.ways(replicas)]
            self._bare[replicas, overlap] = sorted(found, key=lambda each: each[0])
        return self._bare[replicas, overlap]

    def may_fit(self, replicas: int, overlap: tuple[str, int]) -> bool:
        """Whether there is room with all layers computed again."""
        runs, load = (replace(way, checkpointing="full") for way in self.ways(replicas)), self.structure.load
        return any(self.memory(replicas, run, load, overlap[0] != "none") <= self.limit for run in runs)

    def ways(self, replicas: int) -> list[RunFacts]:
        """When weights are gathered and gradients reduced."""
        if replicas not in self._ways:
            self._ways[replicas] = ways(self.states.sharded(self.structure.kinds[0].of, replicas), self.run)
        return self._ways[replicas]

    def budget(self, of: OfRank, overlap: tuple[str, int], way: RunFacts) -> Budget:
        """Of a place along pp."""
        key = of.index, overlap, way.reduce, way.gather
        if overlap not in self._prices:
            self._prices[overlap] = rank_prices(self.step(1, overlap, self.ways(1)[0]), len(self.ranks))
        if key not in self._budgets:
            given = of.run(replace(way, row_load=self.structure.load), self.structure.plan.pipeline)
            layers = of.layers if overlap[0] == "none" else _overlapped(of.layers)
            self._budgets[key] = budget_of(
                layers, of.mesh, of.facts, given, self.structure.inputs.model, self._prices[overlap]
            )
        return self._budgets[key]

    def within(self, of: OfRank, replicas: int, overlap: tuple[str, int], way: RunFacts) -> Within:
        """What a place along pp computes again."""
        uneven, even = self._of_exchanges[of.index]
        return within(self.budget(of, overlap, way), way, self.states(of, replicas, way), uneven, even, self.limit)

    def of_the_ends(self, replicas: int, overlap: tuple[str, int]) -> float:
        """Seconds of a step in which all repeat what the first or the last place along pp must; inf: it has no room."""
        best = inf
        for least, way in self.bare(replicas, overlap):
            if least < best:
                ends = [self.within(of, replicas, overlap, way) for of in (self.ranks[0], self.ranks[-1])]
                if all(end.expected <= self.limit for end in ends):
                    best = min(best, max(self.seconds(replicas, overlap, end.run) for end in ends))
        return best

    def fitted(self, replicas: int, overlap: tuple[str, int]) -> tuple[RunFacts, int, int]:
        """What runs, and the bytes of a rank with an even and with the expected load."""
        flies = overlap[0] != "none"

        def uneven_of(run: RunFacts) -> int:
            return self.memory(replicas, run, self.structure.load, flies)

        if self.run.checkpointing != BUDGET:
            again = choose(self.ways(replicas), uneven_of, self.limit)
            return again, self.memory(replicas, again, 1.0, flies), uneven_of(again)

        def fit(run: RunFacts) -> Within:
            places = [self.within(of, replicas, overlap, run) for of in self.ranks]
            return together_within(run, places, self.structure.facts)

        best = fastest(self.ways(replicas), fit, self.limit, partial(self.seconds, replicas, overlap))
        return best.run, best.even, best.expected


def _step(structure: _Structure, batch: int, number: int, overlap: tuple[str, int], again: RunFacts) -> Inputs:
    """What is forecast for a run with so many replicas and this overlap."""
    inputs, stack = structure.inputs, structure.config.stack
    own = stack.dispatcher is None and not stack.overlap
    in_flight, chunks = overlap if own else ("none", 1)
    own_recompute = stack.recompute is None
    repeated = REPEATED[again.checkpointing] if own_recompute else inputs.software.recompute
    layout = replace(
        inputs.layout, micro_batch=again.micro_batch_size, global_batch=batch, replicas=number,
        reduce=again.reduce, gather=again.gather,
    )  # fmt: skip
    pipeline = structure.plan.pipeline
    paired = pipeline.paired(layout.num_micro) if own and pipeline is not None else 0.0
    return replace(
        inputs,
        layout=layout,
        software=replace(inputs.software, recompute=repeated, in_flight=in_flight, chunks=chunks, paired=paired),
        model=with_recomputed(inputs.model, again.recomputed if own_recompute else (), pipeline),
    )  # fmt: skip


def _possible(overlap: tuple[str, int], structure: _Structure, run: RunFacts) -> bool:
    """Whether a kind of dispatch has this overlap; a micro-batch has at least as many tokens as chunks."""
    kind, chunks = overlap
    tokens = tokens_of_a_rank(structure.plan.mesh, run)
    return kind == "none" or (all(map(_in_flight, structure.plan.layers)) and chunks <= tokens)


def _settings(
    search: Search, structure: _Structure, run: RunFacts, replicas: int, overlap: tuple[str, int], batch: int
) -> dict[str, object]:
    """The keys that make a plan of a candidate: those of searched axes, and others only where they must change."""
    config, mesh = structure.config, structure.plan.mesh
    kinds = {layer.dispatch.kind for layer in structure.plan.layers}
    settings: dict[str, object] = {
        "mesh.ep": mesh.ep, "mesh.dp_replicate": replicas,
        **{f"mesh.{name}": mesh.size(name) for name in search.axes.sharing},
        "pipeline.schedule": config.pipeline.schedule, "pipeline.stages_per_rank": config.pipeline.stages_per_rank,
        "pipeline.overlap": config.pipeline.overlap,
        "dispatch.kind": kinds.pop() if len(kinds) == 1 else config.dispatch.kind.value,
        "dispatch.overlap": overlap[0], "dispatch.chunks": overlap[1] if overlap[1] > 1 else "auto",
        "data.micro_batch_size": run.micro_batch_size, "trainer.checkpointing": run.checkpointing,
        "routing.max_nodes": config.routing.max_nodes, "experts.granularity": config.experts.granularity,
    }  # fmt: skip
    given, of_overlap = search.config.dispatch, {key: settings[key] for key in ("dispatch.overlap", "dispatch.chunks")}
    settings = search.axes.chosen(settings)
    if given.overlap is OverlapKind.auto or (given.overlap is OverlapKind.chunks and given.chunks == "auto"):
        settings |= of_overlap  # kept or not: a plan of these sizes might choose another
    if "dispatch.overlap" not in settings or given.chunks == settings["dispatch.chunks"]:
        settings.pop("dispatch.chunks", None)
    for name in ("schedule", "stages_per_rank", "overlap"):
        if settings.get(f"pipeline.{name}") == getattr(search.config.pipeline, name):
            del settings[f"pipeline.{name}"]
    if search.config.mesh.dp_shard != "auto":
        settings["mesh.dp_shard"] = "auto"
    if batch != search.config.data.global_batch_size:
        settings["data.global_batch_size"] = batch
    described = vars(search.config.workload)
    settings |= {f"workload.{key}": value for key, value in vars(config.workload).items() if value != described[key]}
    return settings


class _States:
    """Bytes of weights, gradients and optimizer, by what they depend on.

    Attributes:
        fastest: seconds of the fastest candidate that fits. later: candidates that are dear to plan, with the least
            seconds that they could take.
    """

    def __init__(self) -> None:
        self.fastest = inf
        self.later: list[tuple[float, _MicroBatch, int, tuple[str, int]]] = []
        self._known: dict[object, tuple[int, Gradients, int]] = {}
        self._sharded: dict[object, Sharded] = {}

    def sharded(self, of: OfRank, replicas: int) -> Sharded | None:
        """What FSDP shards; None on one rank."""
        if of.mesh.world_size == 1:
            return None
        key = self._key(of, replicas)
        if key not in self._sharded:
            self._sharded[key] = sharded(of.layers, replace(of.mesh, dp_replicate=replicas), of.facts)
        return self._sharded[key]

    def __call__(self, of: OfRank, replicas: int, run: RunFacts) -> tuple[int, Gradients, int]:
        times = min(run.accumulation, SEVERAL)
        key = (*self._key(of, replicas), of.layers_at_once, times, run.reduce, run.gather)
        if key not in self._known:
            mesh, given = replace(of.mesh, dp_replicate=replicas), replace(run, layers_at_once=of.layers_at_once)
            self._known[key] = model_state_bytes(of.layers, mesh, of.facts, given)
        return self._known[key]

    @staticmethod
    def _key(of: OfRank, replicas: int) -> tuple[object, ...]:
        return of.mesh, replicas, of.layers[0].experts if of.layers else None, len(of.layers), of.units


def _memory(structure: _Structure, run: RunFacts, states: _States) -> _Memory:
    """Bytes of the fullest rank, by replicas, run, load and whether exchanges are in flight.

    Args:
        run: with the micro-batch; others differ from it in checkpointing, and in when they gather and reduce.
    """
    of_layers = defaultdict[float, Known](Known)
    runs = [structure.runs(kind, run) for kind in structure.kinds]
    made: dict[object, list[list[Activations]]] = {}  # of each kind, of its ranks
    sent: dict[object, list[int]] = {}
    held: dict[object, list[tuple[int, Gradients, int]]] = {}
    totals: dict[object, int] = {}

    def made_in(run: RunFacts, load: float, in_flight: bool) -> list[list[Activations]]:
        key = run.checkpointing, load, in_flight
        if key not in made:
            made[key], known = [], of_layers[load]
            for kind, given in zip(structure.kinds, runs, strict=True):
                layers, of = kind.overlapped if in_flight else kind.of.layers, kind.of
                each = [replace(one, checkpointing=run.checkpointing, row_load=load) for one in given]
                made[key].append([activations(layers, of.mesh, of.facts, one, known) for one in each])
        return made[key]

    def sent_in(run: RunFacts, load: float) -> list[int]:
        key = run.checkpointing, load
        if key not in sent:
            known, given = of_layers[load], replace(run, row_load=load)
            sent[key] = [buffer_bytes(kind.of.layers, kind.of.mesh, given, known) for kind in structure.kinds]
        return sent[key]

    def held_by(replicas: int, run: RunFacts) -> list[tuple[int, Gradients, int]]:
        key = replicas, run.reduce, run.gather
        if key not in held:
            held[key] = [states(kind.of, replicas, run) for kind in structure.kinds]
        return held[key]

    def total(replicas: int, run: RunFacts, load: float, in_flight: bool) -> int:
        key = replicas, run.reduce, run.gather, run.checkpointing, load, in_flight
        if key not in totals:
            parts = held_by(replicas, run), made_in(run, load, in_flight), sent_in(run, load)
            totals[key] = max(
                weights + optimizer + together(grads, each, buffers)
                for (weights, grads, optimizer), made, buffers in zip(*parts, strict=True)
                for each in made
            )
        return totals[key]

    return total


# -- the search -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result. considered: candidates. fitting: those that fit with the load that is to be expected, and if_even:
    those that fit only with an even one. cpu_seconds: of the search. kept: axis -> why it was not searched.

    runs, described: fronts, the fastest first, of those that fit only if the load is even where no others do. tight:
    the fastest of these that runs, if it is faster than the best. rejected: reasons, the most frequent first. least:
    (bytes, settings) of the smallest layout that this package runs and that does not fit.
    """

    considered: int
    fitting: int
    if_even: int
    cpu_seconds: float
    kept: dict[str, str]
    runs: list[Candidate]
    described: list[Candidate]
    tight: Candidate | None
    rejected: list[Reason]
    least: tuple[int, dict[str, object]] | None


def search(
    sites: Sequence[PlannedSite],
    facts: ModelFacts,
    config: Config,
    shape: Callable[[Plan], ModelShape],
    *,
    rounds: bool,
) -> Found:
    """Searches for layouts.

    Args:
        sites, facts: of the model. config: with `data` of the workload, and its batch before rounding.
        shape: a plan's shape for the time model. rounds: whether the batch may be rounded up, as a published one is.

    Raises:
        ConfigError: the config itself cannot be planned, or `search.axes` names something else.
    """
    start = time.process_time()
    plan, _ = draft_plan(sites, config, facts)  # Step 1
    axes = axes_of(config, plan.layers, plan.mesh.ep, facts)
    rejected = Rejected()
    searched = Search(
        sites=sites, facts=facts, config=config, layers=plan.layers, shape=shape, axes=axes, rounds=rounds
    )
    with uncollected():  # a seventh of the time
        ours = list(runnable(searched, rejected))  # Step 2
        others = list(_described(searched, plan, rejected)) if axes.layout else []
    least = None if rejected.least is None else (rejected.least[0], dict(rejected.least[1]))
    fitting, runs = sum(each.fits == FITS for each in (*ours, *others)), front(ours)  # Step 3
    return Found(
        considered=len(ours) + len(others) + rejected.total, fitting=fitting,
        if_even=len(ours) + len(others) - fitting, cpu_seconds=time.process_time() - start, kept=axes.kept, runs=runs,
        described=front(others), tight=tight(ours, runs[0] if runs else None), rejected=rejected.listed, least=least,
    )  # fmt: skip


def _described(search: Search, plan: Plan, rejected: Rejected) -> Iterator[Candidate]:
    config, axes = search.config, search.axes
    batches = config.data.micro_batch_size * plan.mesh.num_batches  # each described layout has its own
    whole = replace(config.data, global_batch_size=-(-config.data.global_batch_size // batches) * batches)
    as_config = replace(config, data=whole, workload=replace(as_run(config.workload), mtp=config.workload.mtp))
    inputs = inputs_of(search.shape(plan), plan, as_config, described=True)
    space = _space(search, plan, inputs)
    if "overlap" not in axes.kept:
        inputs = replace(inputs, software=replace(inputs.software, in_flight="none", chunks=1))
    if plan.pipeline is not None:
        inputs = replace(inputs, software=replace(inputs.software, schedule=DESCRIBED_SCHEDULE, paired=0.0))
    limit, load = config.hardware.memory_gib * GIB, search.load_of(plan, config)
    for each in described(inputs, space, limit, rejected):
        step = replace(inputs, layout=each.layout, software=each.software)
        uneven = round(sum(memory_of(step, load(each.layout.ep)).values()))
        yield Candidate(
            settings=_described_settings(each, search), runs=False, seconds=each.seconds, memory_bytes=each.memory,
            memory_bytes_uneven=uneven, fits=fit_of(each.memory, uneven, limit),
            tokens_per_second_per_rank=each.layout.global_batch * each.layout.seq / each.layout.gpus / each.seconds,
        )  # fmt: skip


def _space(search: Search, plan: Plan, inputs: Inputs) -> Space:
    """The sizes that are searched: those of the axes that are not kept."""
    config, axes = search.config, search.axes
    space = space_of(inputs, config.data.global_batch_size)
    kinds: Sequence[str] = [kind for kind in KINDS if kind in IN_FLIGHT or inputs.software.in_flight == "none"]
    if "dispatch" in axes.kept:
        kinds = [inputs.software.dispatcher]
    said, mesh = _said(search), config.mesh
    tp = mesh.tp if "tp" in said else 1
    recompute = {"": inputs.software.recompute}
    if "checkpointing" not in axes.kept:
        recompute = {name: words for name, words in REPEATED.items() if name != BUDGET}
    split = [tp for tp in axes.sharing["tp"] if _splits(search, tp)]
    return replace(
        space, ep=[ep for ep in axes.ep if _on_nodes(plan.mesh, ep, tp)], kinds=kinds, recompute=recompute,
        micro_batch=[n for n in axes.micro_batch if n <= 8 or len(axes.micro_batch) == 1],
        ran={(size["tp"], size["pp"]) for size, _ in axes.meshes() if size["tp"] in split},
        tp=[tp] if "tp" in said else space.tp, cp=[mesh.cp] if "cp" in said else space.cp, ran_cp=mesh.cp,
        pp=[mesh.pp] if "pp" in said else space.pp, vpp=_numbers(axes) if "pp" in said else (),
    )  # fmt: skip


def _numbers(axes: Axes) -> list[int]:
    """Stages of a rank."""
    return list(dict.fromkeys(schedule_of(word, number)[1] for word, number, _ in axes.stages))


def _said(search: Search) -> list[str]:
    """Sizes that the mesh says and keeps; a described layout has them too, and does not say them again."""
    kept = {"tp": "tp" in search.axes.kept, "cp": True, "pp": "pp" in search.axes.kept}
    return [name for name, is_kept in kept.items() if is_kept and getattr(search.config.mesh, name) > 1]


def _on_nodes(mesh: MeshSpec, ep: int, tp: int) -> bool:
    """Whether a mesh may have these sizes."""
    with suppress(ConfigError):
        replace(mesh, ep=ep, tp=tp, dp_replicate=1)
        return True
    return False


def _splits(search: Search, tp: int) -> bool:
    """Whether the runtime splits this model over tp."""
    config = replace(search.config, mesh=replace(search.config.mesh, tp=tp, ep=1, dp_replicate=1, dp_shard="auto"))
    with suppress(ConfigError):
        draft_plan(search.sites, config, search.facts)
        return True
    return False


def _described_settings(found: Described, search: Search) -> dict[str, object]:
    settings = {"mesh.tp": 1, "mesh.dp_replicate": 1, **settings_of(found.layout), "dispatch.overlap": "none"}
    settings["dispatch.kind"] = found.software.dispatcher
    if found.recompute:
        settings["trainer.checkpointing"] = found.recompute
    settings |= {f"workload.{name}": 1 for name in _said(search) if name != "pp"}
    chosen = search.axes.chosen(settings)
    if "pp" in _said(search):  # a pipeline that runs has its own stages of a rank
        chosen["mesh.pp"] = 1
    return {**chosen, **{key: value for key, value in settings.items() if key.startswith("workload.")}}
