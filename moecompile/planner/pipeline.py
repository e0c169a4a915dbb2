"""The stages of a pipeline: where the model is cut, and what each rank along pp has.

Algorithm:
  1. Costs: parameters that a token uses, of each unit (layer, head); an embedding is a lookup and costs nothing.
  2. Stages of neighbouring layers whose dearest one is as cheap as possible; of equally cheap ones, those whose sum of
     squares is least. What is called before the layers belongs to the first stage, what comes after them to the last.
     `pipeline.layout` gives the stages in Megatron's words instead.
  3. What crosses each cut follows from the recorded dataflow (moecompile.match.boundaries).
A rank's memory is that of its own layers on the ranks of a stage. For backward it keeps as many micro-batches as the
order of its forwards and backwards has at a time.                                              -> `ranks_of`

    E t*3|(tt|)*2m|L     E embedding, t layer, m further tokens' layer, L head and loss; | between stages, *n times
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain
from operator import mul

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec, Part, divisors
from moecompile.plan import LayerPlan, MemoryEstimate, Plan
from moecompile.planner.lookups import without_tables
from moecompile.planner.memory import ffn_numbers, memory_of_fullest_rank
from moecompile.planner.params import CutFacts, ModelFacts, RunFacts, computed_per_token, layer_params
from moecompile.schema import Compiled, Config, PipelineConfig
from moecompile.stages import NONE, SCHEDULES, Pipeline, Stage, has_stages, schedule_of, simulated, steady


def plan_pipeline(layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, config: Config) -> Pipeline | None:
    """The stages; None without pipeline parallelism.

    Raises:
        ConfigError: the model cannot be cut, or something that is configured is not possible with stages.
    """
    if not has_stages(mesh.pp, config.pipeline.schedule):
        of, none = config.pipeline, PipelineConfig()
        if of != none:
            key = next(key for key, value in vars(none).items() if getattr(of, key) != value)
            raise ConfigError(
                f"pipeline.{key}", getattr(of, key), "there is no pipeline, because mesh.pp=1",
                "Use mesh.pp=2 or more, or pipeline.schedule=dualpipev, or leave it out",
            )  # fmt: skip
        return None
    _check_supported(mesh, config)
    schedule, per_rank = schedule_of(config.pipeline.schedule, config.pipeline.stages_per_rank)
    cut, number = facts.cut, mesh.pp * per_rank
    if cut is None or cut.refused:
        raise _refusal(mesh, config, _uncut(cut))
    if number > (most := len(cut.layers)):
        rule = f"{number} stages need as many layers, and the model has {most}"
        if mesh.pp == 1:
            raise _refusal(mesh, config, rule)
        if config.pipeline.stages_per_rank > 1 and mesh.pp * SCHEDULES[schedule].least <= most:
            raise ConfigError("pipeline.stages_per_rank", per_rank, rule, f"Use at most {most // mesh.pp}")
        pp = max(size for size in divisors(mesh.world_size) if size * per_rank <= most or size == 1)
        raise ConfigError("mesh.pp", mesh.pp, rule, f"Use mesh.pp={pp}")
    if config.pipeline.layout is None:
        counts = balanced(costs(layers, cut.units, cut.layers), number)
    else:
        counts = counts_of(config.pipeline.layout, number, len(cut.layers))
    places = [sum(counts[:i]) for i in range(1, number)]
    try:
        stages = cut.stages(tuple(cut.layers[place] for place in places))
    except ValueError as error:
        raise _refusal(mesh, config, f"the model cannot be cut before {cut.layers[places[0]]}: {error}") from error
    overlap = config.pipeline.overlap
    if overlap != NONE:
        _check_overlap(schedule, mesh, config)
    pipeline = Pipeline(schedule=schedule, ranks=mesh.pp, stages=stages, tied=cut.tied, overlap=overlap)
    micro_batches = max(1, config.data.global_batch_size // (config.data.micro_batch_size * mesh.num_batches))
    _check_order(schedule, mesh.pp, number, steady(mesh.pp, micro_batches), overlap)
    return pipeline


@cache  # a search plans many layouts with the same stages
def _check_order(schedule: str, ranks: int, stages: int, micro_batches: int, overlap: str) -> None:
    empty = (Stage(units=()),) * stages
    simulated(Pipeline(schedule=schedule, ranks=ranks, stages=empty, overlap=overlap), micro_batches)


def _check_overlap(schedule: str, mesh: MeshSpec, config: Config) -> None:
    overlap = config.pipeline.overlap
    if not SCHEDULES[schedule].pairs:
        raise ConfigError(
            "pipeline.overlap", overlap, f"pipeline.schedule={schedule} has no forward beside a backward",
            "Use pipeline.schedule=dualpipev, or pipeline.overlap=none",
        )  # fmt: skip
    if mesh.ep == 1:
        raise ConfigError(
            "pipeline.overlap", overlap, "mesh.ep=1: there are no exchanges",
            "Use mesh.ep=2 or more, or pipeline.overlap=none",
        )  # fmt: skip
    if config.trainer.compile is not Compiled.none:
        raise ConfigError(
            "pipeline.overlap", overlap, "a compiled region hands over in the middle of its code "
            f"(trainer.compile={config.trainer.compile.value})", "Use trainer.compile=none, or pipeline.overlap=none",
        )  # fmt: skip


def _uncut(cut: CutFacts | None) -> str:
    if cut is None:
        return "the plan is made of a graph, which has no layers to cut between"
    return f"the model cannot be cut into stages: {cut.refused}" if cut.refused else ""


def _refusal(mesh: MeshSpec, config: Config, rule: str, fix: str = "") -> ConfigError:
    """Of stages: `mesh.pp`, or the schedule that one rank has them for. fix: another way out."""
    if mesh.pp > 1:
        return ConfigError("mesh.pp", mesh.pp, rule, f"Use mesh.pp=1{fix}")
    return ConfigError("pipeline.schedule", config.pipeline.schedule, rule, f"Use pipeline.schedule=auto{fix}")


def no_stages(mesh: MeshSpec, config: Config, facts: ModelFacts) -> str:
    """Why a config has no pipeline on any mesh like this one; empty: it can have one."""
    try:
        _check_supported(mesh, config)
    except ConfigError as error:
        own = error.path in ("mesh.pp", "pipeline.schedule")
        return error.rule if own else f"{error.path}={error.value} {error.rule}"
    return _uncut(facts.cut)


def _check_supported(mesh: MeshSpec, config: Config) -> None:
    if config.routing.replay is not None:
        rule = f"a rank has the routers of its stages alone ({_why_stages(mesh, config)})"
        raise ConfigError("routing.replay", config.routing.replay, rule, "Use no stages")


def _why_stages(mesh: MeshSpec, config: Config) -> str:
    return f"mesh.pp={mesh.pp}" if mesh.pp > 1 else f"pipeline.schedule={config.pipeline.schedule}"


def costs(layers: Sequence[LayerPlan], units: Mapping[str, int], order: Sequence[str]) -> list[float]:
    """Parameters that a token uses: of each layer, the first and the last with what is called before and after them.

    Args:
        units: path -> parameters, in the order of calls; 0 of embeddings. order: paths of the layers.
    """
    used = dict[str, float](units)
    for layer in layers:
        holder = next((path for path in used if f"{layer.site.fqn}.".startswith(f"{path}.")), None)
        if holder is not None:
            counts = layer_params(layer)
            used[holder] += counts.shared + counts.router + computed_per_token(layer) * counts.expert - counts.dense
    found, place = [0.0] * len(order), 0
    for path, number in used.items():
        place = order.index(path) if path in order else place
        found[place] += number
    return found


def balanced(of: Sequence[float], number: int) -> list[int]:
    """Layers of each of `number` stages of neighbouring layers (step 2)."""
    return list(_balanced(tuple(of), number))


@cache
def _balanced(of: tuple[float, ...], number: int) -> tuple[int, ...]:
    sums = [0.0]
    for cost in of:
        sums.append(sums[-1] + cost)

    @cache
    def best(first: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """Of the layers from `first` on in `left` stages: cost of the dearest, sum of squares, layers of each."""
        if left == 1:
            cost = sums[-1] - sums[first]
            return cost, cost**2, (len(of) - first,)
        found = []
        for count in range(1, len(of) - first - left + 2):
            cost, (dearest, squares, counts) = sums[first + count] - sums[first], best(first + count, left - 1)
            found.append((max(cost, dearest), cost**2 + squares, (count, *counts)))
        return min(found)

    return best(0, number)[2]


def counts_of(layout: str, number: int, layers: int) -> list[int]:
    """Layers of each stage of a layout in Megatron's words.

    Raises:
        ConfigError: it is none, or does not fit the model or the number of stages.
    """

    text = re.sub(r"[\s,]", "", layout)
    group = re.compile(r"\(([^()]*)\)(?:\*(\d+))?")
    while found := group.search(text):
        text = text[: found.start()] + found[1] * int(found[2] or 1) + text[found.end() :]
    text = re.sub(r"([A-Za-z])\*(\d+)", lambda match: match[1] * int(match[2]), text)
    if wrong := next((letter for letter in text if letter not in "EtL|"), None):
        what = (
            "a layer that predicts further tokens, which the model does not have" if wrong == "m" else "no part of it"
        )
        raise ConfigError("pipeline.layout", layout, f"{wrong} is {what}", "Use E, t, L, |, (...)*n and t*n")
    stages = text.split("|")
    if not stages[-1] and len(stages) == number + 1:  # a repeated group ends with its separator
        stages.pop()
    counts = [stage.count("t") for stage in stages]
    if len(stages) != number:
        raise ConfigError(
            "pipeline.layout",
            layout,
            f"has {len(stages)} stages, and mesh.pp * pipeline.stages_per_rank is {number}",
            "Change one of them",
        )
    if sum(counts) != layers:
        raise ConfigError(
            "pipeline.layout", layout, f"has {sum(counts)} layers, and the model has {layers}", f"Use {layers}"
        )
    if not all(counts):
        raise ConfigError("pipeline.layout", layout, f"stage {counts.index(0)} has no layer", "Give each stage a layer")
    if "E" in text.lstrip("E") or "L" in text.rstrip("L"):
        raise ConfigError(
            "pipeline.layout",
            layout,
            "the embedding (E) is in the first stage, and the head (L) in the last one",
            "Move it there",
        )
    return counts


@dataclass(frozen=True, kw_only=True)
class OfRank:
    """What the ranks of one place along pp have: layers, the mesh of a stage, facts of its part of the model, the run.

    index: along pp; stages: its stages. tied: numbers (with tp a rank's part) of a weight that the first and the last
    stage both have, if this is one of them and another rank the other. tied_here: of one that both have on this rank.
    """

    index: int
    layers: tuple[LayerPlan, ...]
    mesh: MeshSpec
    facts: ModelFacts
    stages: tuple[Stage, ...] = ()
    tied: int = 0
    tied_here: int = 0

    @property
    def roots(self) -> int:
        """How many of its stages have weights outside of layers."""
        return sum(stage.has_root for stage in self.stages)

    def run(self, run: RunFacts, pipeline: Pipeline | None, of: OfRank | None = None) -> RunFacts:
        """The run, with the micro-batches that are kept for backward. of: with those of another rank."""
        if pipeline is None:
            return run
        of = of or self
        kept = pipeline.in_flight(of.index, run.accumulation)
        of_each = tuple((path, times) for stage, times in zip(self.stages, kept, strict=True) for path in stage.layers)
        return replace(
            run, in_flight=of.in_flight(pipeline, run.accumulation), in_flight_of=of_each,
            layers_at_once=self.layers_at_once,
        )  # fmt: skip

    @cached_property
    def kinds(self) -> tuple[Hashable, ...]:
        """For each of its stages what its layers are, and which of them are MoE layers."""
        kinds = {fact.path: fact.kind for fact in self.facts.layers}
        moe = [tuple(layer.alike for layer in self.layers if stage.holds(layer.site.fqn)) for stage in self.stages]
        return tuple(
            (tuple(sorted(kinds[path] for path in stage.layers)), of)
            for stage, of in zip(self.stages, moe, strict=True)
        )

    @property
    def layers_at_once(self) -> int:
        """`RunFacts.layers_at_once`."""
        return max(self._layers, default=0)

    def in_flight(self, pipeline: Pipeline, micro_batches: int) -> float:
        """Micro-batches that are kept for backward, a mean over layers."""
        kept, layers = pipeline.in_flight(self.index, micro_batches), self._layers
        return float(sum(map(mul, kept, layers)) / sum(layers))

    @cached_property
    def units(self) -> tuple[str, ...]:
        """Paths of its stages' parts of the model."""
        return tuple(unit.path for stage in self.stages for unit in stage.units)

    @cached_property
    def _layers(self) -> tuple[int, ...]:
        """Of each of its stages."""
        return tuple(len(stage.layers) for stage in self.stages)


def ranks_of(plan: Plan, facts: ModelFacts) -> list[OfRank]:
    """One for each place along pp."""
    if plan.pipeline is None:
        return [OfRank(index=0, layers=plan.layers, mesh=plan.mesh, facts=facts)]
    assert facts.cut is not None
    found: list[OfRank] = []
    ends, tied = {0, plan.pipeline.rank_with_loss}, facts.cut.tied_numbers
    if any(f"{fact.path}.weight" in chain(*plan.pipeline.tied) for fact in facts.split):
        tied //= plan.mesh.size(Part.WEIGHTS)
    known = {fact.path: fact for fact in facts.layers}
    for index in range(plan.pipeline.ranks):
        stages = tuple(plan.pipeline.stages[i] for i in plan.pipeline.stages_of(index))
        is_last = stages[-1] is plan.pipeline.stages[-1]
        its = facts.cut.facts(tuple(unit.path for stage in stages for unit in stage.units), is_last)
        found.append(
            OfRank(
                index=index,
                layers=tuple(layer for layer in plan.layers if any(s.holds(layer.site.fqn) for s in stages)),
                mesh=plan.mesh.stage,
                facts=replace(
                    without_tables(its, plan.lookups),
                    ffn_numbers=ffn_numbers(plan.layers),
                    kept=facts.kept,
                    layers=tuple(known[fact.path] for fact in its.layers),
                    adapters=_adapters(plan, facts, stages),
                ),
                stages=stages,
                tied=tied if index in ends and len(ends) > 1 else 0,
                tied_here=tied if ends == {index} else 0,
            )
        )
    return found


def _adapters(plan: Plan, facts: ModelFacts, stages: Sequence[Stage]) -> tuple[int, bool] | None:
    """`ModelFacts.adapters` of these stages."""
    if plan.adapters is None:
        return None
    linears = [path for path in plan.adapters.linears if any(stage.holds(path) for stage in stages)]
    return plan.adapters.rank * sum(sum(facts.linears[path]) for path in linears), plan.adapters.train_router


def alike(ranks: Sequence[OfRank]) -> list[list[OfRank]]:
    """Those whose parts of the model have the same sizes, so that they differ in what is kept for backward alone."""
    found: list[tuple[object, list[OfRank]]] = []
    for of in ranks:
        sizes = _sizes(of)
        same = next((others for other, others in found if other == sizes), None)
        if same is None:
            found.append((sizes, [of]))
        else:
            same.append(of)
    return [others for _, others in found]


def _sizes(of: OfRank) -> object:
    """The part of the model without names."""
    facts = of.facts
    weights = sorted((w.rows, w.params, w.site is not None, w.is_root, w.split) for w in facts.weights)
    return (
        of.mesh, tuple(layer.alike for layer in of.layers),
        replace(
            facts, frozen={}, linears={}, idle=frozenset(), split=(), matrices={}, routers={}, router_params={},
            attention=(), weights=(), layers=(),
        ),
        sorted(facts.frozen.values()), sorted(facts.linears.values()), sorted(facts.matrices.values()),
        sorted(facts.router_params.values()), weights,
        sorted((split.kind, split.size, split.params, split.width) for split in facts.split),
        of.kinds,
    )  # fmt: skip


def fullest(ranks: Sequence[OfRank], plan: Plan, run: RunFacts) -> tuple[OfRank, MemoryEstimate]:
    """Of these ranks the one that needs the most memory, and what it needs."""
    needed = [(of, memory_of_fullest_rank(of.layers, of.mesh, of.facts, of.run(run, plan.pipeline))) for of in ranks]
    return max(needed, key=lambda each: each[1].total)
