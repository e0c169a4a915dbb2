"""What is captured of a model that is not compiled yet, for its plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from moecompile import hub_kernels
from moecompile.capture import Example, Recording
from moecompile.errors import CaptureError
from moecompile.match.boundaries import Boundaries
from moecompile.match.lookups import find_lookups, region_of
from moecompile.match.regions import Captured
from moecompile.match.sites import capture_regions, record_model
from moecompile.nn.scaled_input import standard_calls
from moecompile.passes.context_parallel import eager_on_meta
from moecompile.passes.prove import unproven
from moecompile.passes.run import Log
from moecompile.pipeline.facts import facts_of
from moecompile.plan import ExpertsSite, Plan, PlannedSite
from moecompile.planner import ModelFacts
from moecompile.planner.lookups import is_wanted as is_table_wanted
from moecompile.schema import Config, SiteKind, TaskName
from moecompile.stages import has_stages


def planning_facts(
    model: nn.Module, config: Config, example: Example, plan: Plan | None = None
) -> tuple[Sequence[PlannedSite], ModelFacts]:
    """All that planning needs of a model: its sites (those of `plan`, if it is given), and its sizes."""
    hub_kernels.take_off(model)
    with standard_calls(model, example):
        captured = capture_planned(model, plan, config, example)
        return captured.sites, facts_of(model, example, captured, config.mesh)


def capture_planned(
    model: nn.Module, plan: Plan | None, config: Config, example: Example, log: Log | None = None
) -> Captured:
    """The captured regions of a model that is not compiled yet: those to plan, or those of `plan`.

    Called inside `standard_calls`, which lasts as long as its regions are used.
    """
    log = log or Log()
    with eager_on_meta(model):
        recording = record_model(model, example)
    log.add("capture", {}, {}, f"{len(recording.graph.nodes)} functions recorded")
    kind = config.experts.sites if plan is None else _kind(plan, config)
    captured = capture_regions(recording, unproven, kind, _named(config, plan))
    staged = has_stages(config.mesh.pp, config.pipeline.schedule) if plan is None else plan.pipeline is not None
    if staged or config.task.name is TaskName.search:
        captured.boundaries = Boundaries(recording)
    _find_tables(captured, recording, config, plan)
    log.add("match", captured.regions, captured.regions, captured.summary)
    return captured


def repeated_notes(captured: Captured, plan: Plan) -> list[str]:
    """What is counted once of layers whose dense FFN runs several times in a forward (ALBERT), for the user."""
    notes = []
    for layer in plan.layers:
        path = captured.region_of[layer.site.fqn]
        if (runs := captured.regions[path].runs) > 1:
            losses = ", and balance losses are those of the last" if layer.balance.losses else ""
            notes.append(
                f"{path or 'the model'} runs {runs} times in one forward: rows, memory and seconds are planned for one "
                f"run{losses}"
            )
    return list(dict.fromkeys(notes))


def _find_tables(captured: Captured, recording: Recording, config: Config, plan: Plan | None) -> None:
    """The embedding tables of a model, and the traced modules that read those that are to be spread."""
    planned = None if plan is None else {each.weight for each in plan.lookups}
    for found in find_lookups(recording):
        numbers, table = found.rows * found.width, found
        is_wanted = is_table_wanted(numbers, config.embeddings, computed=found.computed)
        if (found.weight in planned if planned is not None else is_wanted) and not found.refused:
            try:
                captured.readers.setdefault(found.module, region_of(found, recording, captured.regions))
            except CaptureError as error:
                table = replace(found, refused=str(error))
        captured.tables.append(table)


def _named(config: Config, plan: Plan | None = None) -> Callable[[str], bool]:
    """Whether an FFN in an MoE block is selected: by the plan, or by a pattern other than `*`."""
    if plan is not None:
        planned = {layer.site.fqn for layer in plan.layers}
        return planned.__contains__
    pattern = config.experts.match
    return lambda fqn: pattern != "*" and fnmatchcase(fqn, pattern)


def _kind(plan: Plan, config: Config) -> SiteKind:
    """The kind of site that a given plan needs."""
    existing = {isinstance(layer.site, ExpertsSite) for layer in plan.layers}
    if len(existing) != 1:
        return SiteKind.both if existing else config.experts.sites
    return SiteKind.existing if existing.pop() else SiteKind.dense
