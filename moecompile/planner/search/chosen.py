"""`mesh.ep=search`: the layout that is predicted to be fastest, of those that fit and train the same.

1. `mesh.ep` and `mesh.dp_replicate` are searched, and the kind of dispatch and its overlap where they are `auto`.
2. The search starts from the largest EP size that can be planned: its routers are those that layouts must keep.
   task=search, which varies more, starts so where a preset's EP size cannot be planned and nobody gave it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from moecompile.errors import ConfigError
from moecompile.plan import Plan, PlannedSite
from moecompile.planner.build_plan import GIB, draft_plan
from moecompile.planner.cost_model.shapes import ModelShape
from moecompile.planner.params import ModelFacts
from moecompile.planner.search.run import Found, search
from moecompile.schema import (
    SEARCHED,
    Config,
    DispatchKind,
    OverlapKind,
    SearchConfig,
    TaskName,
    commonest,
    mesh_spec,
    meshes,
    with_workload,
)

EP = "mesh.ep"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A config with its layout. settings: what was chosen, as overrides. seconds: predicted, of a step; None: no layout
    fits, and this one needs the least memory. layouts: how many were compared.
    """

    config: Config
    settings: str
    seconds: float | None
    layouts: int


_DESCRIBED = (TaskName.plan, TaskName.search, TaskName.rehearse)  # tasks of a published workload


def choose_layout(
    sites: Sequence[PlannedSite], facts: ModelFacts, config: Config, shape: Callable[[Plan], ModelShape]
) -> Choice | None:
    """The layout that `config` leaves to be searched; None if it names its own.

    Args: those of `search`.

    Raises:
        ConfigError: no layout can be planned, or none fits into memory, which task=plan says by itself.
    """
    if config.mesh.ep != SEARCHED:
        return None
    planned = with_workload(config)[0] if config.task.name in _DESCRIBED else config
    start = replace(_whole(start_of(sites, facts, planned)), search=SearchConfig(axes=list(_axes(config))))
    found = search(sites, facts, start, shape, rounds=False)
    if not found.runs and found.least is not None and config.task.name is TaskName.plan:
        settings = {EP: start.mesh.ep, **found.least[1]}
        text = " ".join(f"{key}={value}" for key, value in settings.items())
        return Choice(config=with_settings(config, settings), settings=text, seconds=None, layouts=found.considered)
    if not found.runs:
        raise ConfigError(EP, SEARCHED, _why_none(found, config), _instead(found))
    best = found.runs[0]
    return Choice(
        config=with_settings(config, {EP: start.mesh.ep, **best.settings}), settings=best.overrides,
        seconds=best.seconds, layouts=found.considered,
    )  # fmt: skip


def _axes(config: Config) -> Iterator[str]:
    """Step 1."""
    yield from ("ep", "dp_replicate")
    if config.dispatch.kind is DispatchKind.auto:
        yield "dispatch"
    if config.dispatch.overlap is OverlapKind.auto:
        yield "overlap"


def start_of(sites: Sequence[PlannedSite], facts: ModelFacts, config: Config) -> Config:
    """The config from which a search starts (step 2): with the first of its `meshes` that can be planned.

    Raises:
        ConfigError: none can.
    """
    if config.mesh.ep == SEARCHED:
        config = replace(config, given=[key for key in config.given if key != EP])
    errors = list[ConfigError]()
    for mesh in meshes(config):
        start = replace(config, mesh=mesh)
        try:
            draft_plan(sites, start, facts)
            return start
        except ConfigError as error:
            errors.append(error)
    raise commonest(errors)


def _whole(config: Config) -> Config:
    """With whole micro-batches on each rank, as a plan counts them; training refuses another batch by itself."""
    data = config.data
    step = data.micro_batch_size * mesh_spec(config.mesh).num_batches
    return replace(config, data=replace(data, global_batch_size=-(-data.global_batch_size // step) * step))


def _why_none(found: Found, config: Config) -> str:
    if found.least is not None:
        needed, limit = found.least[0] / GIB, config.hardware.memory_gib
        return f"the smallest layout needs {needed:.3g} GiB a rank, and hardware.memory_gib={limit:g}"
    return f"no layout can be planned: {found.rejected[0].rule}"


def _instead(found: Found) -> str:
    if found.least is None:
        return "Give a size; task=search varies more than the mesh"
    needed = math.ceil(found.least[0] / GIB)
    return (
        f"Give what a rank really has if it is more, hardware.memory_gib={needed}, a smaller model or batch, or more "
        "ranks; task=search varies more than the mesh"
    )


def with_settings(config: Config, settings: Mapping[str, object]) -> Config:
    """The config with these settings: dotted key of two parts -> value."""
    for key, value in settings.items():
        group, _, name = key.partition(".")
        node = getattr(config, group)
        now = getattr(node, name)
        typed = type(now)(value) if isinstance(now, Enum) else value
        config = replace(config, **{group: replace(node, **{name: typed})})
    return config
