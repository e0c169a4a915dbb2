"""task=search: layouts by predicted speed and memory, in one process for any mesh; needs no GPU and no ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from moecompile import plan as plans
from moecompile.errors import DoesNotFit
from moecompile.models.build import example_inputs
from moecompile.models.source import source_model
from moecompile.pipeline.captured import planning_facts
from moecompile.pipeline.shape import shape_of_model
from moecompile.plan import FITS, Plan
from moecompile.planner.build_plan import build_plan
from moecompile.planner.cost_model.shapes import ModelShape
from moecompile.planner.search.chosen import start_of, with_settings
from moecompile.planner.search.found import Candidate
from moecompile.planner.search.run import Found, search
from moecompile.report.plan_tables import print_search
from moecompile.report.result import write_result
from moecompile.rundir import accept
from moecompile.schema import Config, with_workload
from moecompile.tasks.plan import plan_fields, require_layers


def run(config: Config, run_dir: Path) -> None:
    """Prints what was found; writes `result.json`, and `plan.yaml` of the best layout that runs.

    Raises:
        DoesNotFit: no layout that runs fits, and `task.require_fit` asks for it.
    """
    published = config.workload.global_batch_size
    rounds = published is not None and "data.global_batch_size" not in config.given
    batch = published if rounds and published is not None else config.data.global_batch_size
    config, _ = with_workload(config)
    config = replace(config, data=replace(config.data, global_batch_size=batch))
    model = source_model(config)
    sites, facts = planning_facts(model, config, example_inputs(model, config.data.seq_len))

    def shape(plan: Plan) -> ModelShape:
        return shape_of_model(model, plan)

    config = start_of(sites, facts, config)
    require_layers(build_plan(sites, config, facts, shape), config)
    found = search(sites, facts, config, shape, rounds=rounds)
    print_search(found, config, Console())
    accept(run_dir)
    fields = _fields(found)
    if found.runs:
        best = build_plan(sites, with_settings(config, found.runs[0].settings), facts, shape)
        plans.save(best, run_dir / "plan.yaml")
        fields = {**plan_fields(best), **fields}
    write_result(run_dir, "search", config.name, fields)
    if config.task.require_fit and not any(each.fits == FITS for each in found.runs):
        raise DoesNotFit


def _fields(found: Found) -> dict[str, object]:
    """The fields of result.json."""
    return {
        "candidates": found.considered,
        "fitting": found.fitting,
        "fitting_if_even": found.if_even,
        "search_cpu_seconds": found.cpu_seconds,
        "kept": found.kept,
        "best": _field(found.runs[0]) if found.runs else None,
        "front": [_field(each) for each in found.runs],
        "described_front": [_field(each) for each in found.described],
        "rejected": [dataclasses.asdict(reason) for reason in found.rejected],
    }


def _field(candidate: Candidate) -> dict[str, object]:
    return {**dataclasses.asdict(candidate), "overrides": candidate.overrides}
