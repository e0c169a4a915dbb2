"""What a search varies and what it keeps.

1. An axis is searched if `search.axes` names it (all if it is empty) and the caller has not set its key.
2. What would change the result of training is kept, unless `search.model=true`: the node limit and the granularity, and
   the micro-batch where something is computed over it: a capacity, expert choice, a balancing loss.
3. The global batch and the sequence length are always kept.
4. When weights are gathered and gradients reduced is no axis: each layout gets the way that sends the fewest bytes of
   those that fit, as its plan would (planner/schedule.py), unless the config says it. So it does with checkpointing,
   where that is kept and `auto`. Searched, it is a budget, which has all other ways in it: each layout computes again
   what makes it fit with the least time (planner/budget.py). Of a bare graph all its layers alike.
5. Stages, and the schedule of the pipeline with them, are searched where the model can be cut and ranks do not share
   the cores of a CPU. A pipeline that is searched has no tensor parallelism, and its weights have one copy, unless the
   config says how many (dp_replicate).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from moecompile.errors import ConfigError
from moecompile.mesh import AXES as MESH_AXES
from moecompile.mesh import MeshSpec, Part, axes_that_split, divisors
from moecompile.plan import BUDGET, ExpertsSite, LayerPlan
from moecompile.plan import KINDS as DISPATCH_KINDS
from moecompile.planner.params import ModelFacts
from moecompile.planner.pipeline import no_stages
from moecompile.schema import Baseline, Checkpointing, Compiled, Config, is_open
from moecompile.stages import AUTO, EXCHANGES, NONE, SCHEDULES, schedule_of

_OF_MESH = tuple(axis.name for axis in sorted(MESH_AXES, key=lambda axis: axis.dense) if axis.searched)
AXES = {
    **{name: f"mesh.{name}" for name in _OF_MESH}, "stages": "pipeline.stages_per_rank", "dispatch": "dispatch.kind",
    "overlap": "dispatch.overlap", "micro_batch": "data.micro_batch_size", "checkpointing": "trainer.checkpointing",
    "max_nodes": "routing.max_nodes", "granularity": "experts.granularity", "layout": "workload.tp",
}  # fmt: skip
"""Axis -> the key that it sets. `layout`: tp, pp, vpp, cp, etp and zero of `workload`, which are described."""
DESCRIBED = tuple(f"workload.{name}" for name in ("tp", "pp", "vpp", "cp", "etp", "zero"))
_STAGES = ("pp", "stages")
_CHANGE_THE_MODEL = ("max_nodes", "granularity")
KINDS = tuple(kind for kind in DISPATCH_KINDS if kind != "local")
OVERLAPS = (("none", 1), ("shared", 1), ("chunks", 2), ("chunks", 4))
MICRO_BATCHES = (1, 2, 4, 8, 16)
GRANULARITIES = (1, 2, 4, 8)
STAGES_PER_RANK = (1, 2, 4, 8)
Stages = tuple[str, int, str]
"""`pipeline.schedule`, `pipeline.stages_per_rank` and `pipeline.overlap`."""
_NO_STAGES: Stages = (AUTO, 1, NONE)
MOST_STAGES = 64


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The searched values of each axis; an axis that is kept has its one value.

    sharing: axis of the mesh whose ranks share a micro-batch -> its sizes. stages: schedules of a pipeline, as the
    config says them. kept: axis -> why, if it is kept.
    """

    ep: Sequence[int]
    dp_replicate: Sequence[int]
    stages: Sequence[Stages]
    sharing: Mapping[str, Sequence[int]]
    dispatch: Sequence[str]
    overlap: Sequence[tuple[str, int]]
    micro_batch: Sequence[int]
    checkpointing: Sequence[str]
    max_nodes: Sequence[int | None]
    granularity: Sequence[int]
    layout: bool
    kept: dict[str, str]

    def meshes(self) -> Iterator[tuple[dict[str, int], Stages]]:
        """Sizes of the axes of the mesh that change the plan of a layer, and one of `stages`.

        Stages with tp are searched where one of them is given: they are four times as many (understand/pipeline.md).
        """
        for *sizes, ep in product(*self.sharing.values(), self.ep):
            found = {"ep": ep, **dict(zip(self.sharing, sizes, strict=True))}
            if found["pp"] == 1:
                if _NO_STAGES in self.stages:  # else a schedule or a number was given, which needs a pipeline
                    yield found, _NO_STAGES
            elif (
                all(size == 1 or name in ("ep", "pp", *self.kept) for name, size in found.items()) or "pp" in self.kept
            ):
                yield from ((found, stages) for stages in self.stages)

    def chosen(self, settings: Mapping[str, object]) -> dict[str, object]:
        """Settings without those of axes that are kept."""
        kept = {AXES[name] for name in self.kept}
        return {key: value for key, value in settings.items() if key not in kept}


def axes_of(config: Config, layers: Sequence[LayerPlan], ep: int, facts: ModelFacts) -> Axes:
    """The axes of a search.

    Args:
        layers: the plan of the config as it is. ep: its EP size. facts: of the model.

    Raises:
        ConfigError: `search.axes` names something that is not an axis.
    """
    kept = _kept(config, layers, facts)
    mesh, data, searched = config.mesh, config.data, [name for name in AXES if name not in kept]
    world = mesh.num_nodes * mesh.ranks_per_node
    overlap = config.dispatch.overlap.value
    now = layers[0].dispatch if layers else None
    powers = [n for n in (1, 2, 4, 8) if mesh.ranks_per_node % n == 0]
    sharing = [name for name in _OF_MESH if name not in axes_that_split(Part.BATCH, Part.EXPERTS)]
    sizes = {name: [n for n in divisors(world) if n <= MOST_STAGES] if name == "pp" else powers for name in sharing}
    return Axes(
        ep=divisors(world) if "ep" in searched else [ep],
        dp_replicate=divisors(world) if "dp_replicate" in searched else [mesh.dp_replicate],
        sharing={name: sizes[name] if name in searched else [getattr(mesh, name)] for name in sharing},
        stages=_schedules(config) if "stages" in searched else [_said(config)],
        dispatch=KINDS if "dispatch" in searched else [config.dispatch.kind.value],
        overlap=OVERLAPS if "overlap" in searched else [(now.overlap, now.chunks) if now else (overlap, 1)],
        micro_batch=sorted({*MICRO_BATCHES, data.micro_batch_size})
        if "micro_batch" in searched
        else [data.micro_batch_size],
        checkpointing=_computed_again(config, by_layer=bool(facts.layers))
        if "checkpointing" in searched
        else [config.trainer.checkpointing.value],
        max_nodes=[None, *divisors(mesh.num_nodes)] if "max_nodes" in searched else [config.routing.max_nodes],
        granularity=GRANULARITIES if "granularity" in searched else [config.experts.granularity],
        layout="layout" in searched,
        kept=kept,
    )


def _computed_again(config: Config, *, by_layer: bool) -> tuple[str, ...]:
    return (BUDGET,) if by_layer else all_alike(config)


def all_alike(config: Config) -> tuple[str, ...]:
    """What all layers may compute again; rows that a back end received cannot be kept for backward."""
    return ("none", "full", "keep_exchanges") if config.dispatch.backend is None else ("none", "full")


def _kept(config: Config, layers: Sequence[LayerPlan], facts: ModelFacts) -> dict[str, str]:
    """Axes that are not searched, and why."""
    named = config.search.axes
    if unknown := [name for name in named if name not in AXES]:
        raise ConfigError("search.axes", unknown[0], "is not an axis", f"Use some of {', '.join(AXES)}")
    kept: dict[str, str] = {}
    for name, key in sorted(AXES.items(), key=lambda each: each[0] in _STAGES):
        if named and name not in named:
            kept[name] = "search.axes does not name it"
        elif given := [word for word in config.given if word in (DESCRIBED if name == "layout" else (key,))]:
            kept[name] = f"{given[0]} was set"
        elif reason := _unchanged(name, config, layers) or _uncut(name, config, facts, kept):
            kept[name] = reason
    if "layout" not in kept and not config.search.described:
        kept["layout"] = "search.described=false"
    return kept


def _unchanged(name: str, config: Config, layers: Sequence[LayerPlan]) -> str | None:
    """Why an axis that nobody has set is kept (step 2), or is decided by the software stack."""
    stack, others = config.stack, {}
    if stack.dispatcher is not None:
        others["dispatch"] = f"stack.dispatcher={stack.dispatcher}"
    if stack.dispatcher is not None or stack.overlap:
        others["overlap"] = f"stack={stack.name} says what overlaps"
    if stack.recompute is not None:
        others["checkpointing"] = f"stack={stack.name} says what is recomputed"
    changing = "" if config.search.model else "changes {}; search.model=true searches it"
    if any(isinstance(layer.site, ExpertsSite) for layer in layers):
        others |= dict.fromkeys(_CHANGE_THE_MODEL, "the model has its experts and its router already")
    elif changing:
        others |= dict.fromkeys(_CHANGE_THE_MODEL, f"it {changing.format('the model')}")
    if changing and (what := _over_micro_batch(config, layers)):
        others["micro_batch"] = f"{what} is over a micro-batch, so it {changing.format('training')}"
    return others.get(name)


def _said(config: Config) -> Stages:
    return config.pipeline.schedule, config.pipeline.stages_per_rank, config.pipeline.overlap


def _schedules(config: Config) -> list[Stages]:
    """Numbers of stages of the schedule that the config says; else of `auto`, and the schedules that it never is.

    Pairs run at once, unless the config says whether they do.
    """
    word = config.pipeline.schedule
    if word != AUTO:
        found = [(word, n) for n in STAGES_PER_RANK if SCHEDULES[word].has(n)]
    else:
        found = [(AUTO, n) for n in STAGES_PER_RANK]
        others = SCHEDULES.keys() - {schedule_of(*each)[0] for each in found}
        found += [(name, 1) for name in SCHEDULES if name in others]
    return [(*each, _overlap(config, schedule_of(*each)[0])) for each in found]


def _overlap(config: Config, schedule: str) -> str:
    said = "pipeline.overlap" in config.given or config.trainer.compile is not Compiled.none
    return config.pipeline.overlap if said else EXCHANGES if SCHEDULES[schedule].pairs else NONE


def _uncut(name: str, config: Config, facts: ModelFacts, kept: Mapping[str, str]) -> str | None:
    """Why stages are kept as they are, which come last."""
    if name not in _STAGES:
        return None
    if config.pipeline.layout is not None:
        return "pipeline.layout says the stages"
    if config.mesh.pp > 1:
        return None
    if config.hardware.host.cores is not None:
        return "the time of stages on a CPU is not known"
    if config.trainer.baseline is not Baseline.none:
        return "trainer.baseline=dense trains a model that is not cut"
    if "checkpointing" not in kept:
        config = replace(config, trainer=replace(config.trainer, checkpointing=Checkpointing.auto))
    kept_sizes = {axis: getattr(config.mesh, axis) for axis in ("tp", "cp") if axis in kept or axis not in AXES}
    mesh = MeshSpec(num_nodes=2, ranks_per_node=prod(kept_sizes.values()), pp=2, **kept_sizes)
    return no_stages(mesh, config, facts)


def _over_micro_batch(config: Config, layers: Sequence[LayerPlan]) -> str | None:
    """What a layer counts over a micro-batch, as the config asks; a loss that it leaves open follows the layout."""
    is_asked = not is_open(config.balance, "micro_batch") or any(
        "losses" in change.balance for change in config.per_layer.values()
    )
    for layer in layers:
        if layer.routing.capacity_factor is not None:
            return "the capacity of an expert"
        if layer.routing.choice == "expert":
            return "expert choice"
        if layer.balance.micro_batch and is_asked:
            return "balance.losses.micro_batch"
    return None
