"""task=plan: only the plan and the forecast of its step, in one process for any mesh; needs no GPU and no ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text
from torch import nn

from moecompile import plan as plans
from moecompile.compose import RESOLVED, load_resolved
from moecompile.errors import ConfigError, DoesNotFit
from moecompile.export.huggingface import export_notes
from moecompile.models.build import example_inputs
from moecompile.models.source import source_model
from moecompile.nn.own_router import own_losses
from moecompile.passes.trained import frozen_notes, rounding_notes
from moecompile.pipeline import new_plan
from moecompile.pipeline.captured import planning_facts
from moecompile.pipeline.facts import WIDENED
from moecompile.pipeline.shape import shape_of_model
from moecompile.plan import FITS, Plan, check_sites, fit_of
from moecompile.planner import ModelFacts
from moecompile.planner.build_plan import GIB, build_plan, with_estimate
from moecompile.planner.cost_model.forecast import expected_load, forecast_plan
from moecompile.planner.cost_model.inputs import inputs_of
from moecompile.planner.cost_model.shapes import ModelShape
from moecompile.planner.existing import notes
from moecompile.planner.given import given_plan, left_notes, plan_file, scheduled
from moecompile.planner.lookups import without_tables
from moecompile.planner.memory import reason_not_counted
from moecompile.planner.params import checkpointing_of
from moecompile.planner.placement import read_placement
from moecompile.planner.search.described import memory_of
from moecompile.planner.search.remedies import with_changes, with_remedies
from moecompile.report.console import print_data
from moecompile.report.plan_tables import (
    Compared,
    Described,
    costs,
    differences,
    placement_fields,
    print_comparison,
    print_forecast,
    print_placement,
    print_plan,
    verdict,
)
from moecompile.report.result import write_result
from moecompile.report.text import bytes_text
from moecompile.rundir import accept
from moecompile.schema import Config, DataKind, is_described, with_workload
from moecompile.tasks.data import data_fields, read_data
from moecompile.tasks.forecast import flops_per_token, forecast_fields

_READ = ("data", "hardware", "stack", "workload")  # config groups


def run(config: Config, run_dir: Path) -> None:
    """Prints the plan and writes `plan.yaml` and `result.json`.

    Raises:
        DoesNotFit: it does not fit, and `task.require_fit` asks for it.
    """
    config, workload_notes = with_workload(config)
    console, of_data = Console(), data_fields(read_data(config), config) if _reads_data(config) else {}
    model = source_model(config)
    of_config = planned(model, config, given_plan(config))
    plan = of_config.plan
    require_layers(plan, config)
    shape = shape_of_model(model, plan)
    forecast, described = forecast_plan(shape, plan, config), _described(shape, plan, config)
    forecast = with_changes(forecast, plan, config, lambda each: shape_of_model(model, each), of_config.again)
    plan_notes = [
        *of_config.notes,
        *workload_notes,
        *([] if described is None else [_described_note(described, config)]),
        *notes(plan, config, getattr(model, WIDENED, ""), own_losses(model)),
        *frozen_notes(model, plan),
        *rounding_notes(model, config),
        *export_notes(model, plan, config),
    ]
    if of_data:
        print_data(of_data, console)
    print_plan(plan, console, plan_notes)
    where = read_placement(Path(config.mesh.placement)) if config.mesh.placement else []
    if where:
        print_placement(where, console)
    dense_flops = _dense_flops(model, shape, plan, config)
    print_forecast(forecast, console, dense_flops)
    compared = _compare(model, Compared(plan=plan, forecast=forecast, config=flat(config, plan)), config, console)
    accept(run_dir)
    plans.save(plan, run_dir / "plan.yaml")
    write_result(
        run_dir,
        "plan",
        config.name,
        {
            **plan_fields(plan),
            **_described_fields(described),
            **forecast_fields(forecast),
            "flops_per_token": forecast.flops_per_token,
            "dense_flops_per_token": dense_flops,
            **compared,
            **(placement_fields(where) if where else {}),
            "notes": plan_notes,
            **of_data,
        },
    )
    if plan.estimate is not None:
        console.print()
        console.print(Text(verdict(plan.estimate, described)), soft_wrap=True)
        if config.task.require_fit and (described or plan.estimate).fits != FITS:
            raise DoesNotFit


def _dense_flops(model: nn.Module, shape: ModelShape, plan: Plan, config: Config) -> float | None:
    """Of the dense model, per token, forward and backward; None: the model has experts of its own."""
    if any(isinstance(layer.site, plans.ExpertsSite) for layer in plan.layers):
        return None
    return flops_per_token(model, plan, inputs_of(shape, plan, config).layout.seq)[1]


def _reads_data(config: Config) -> bool:
    """Whether the data are looked at: those that are named, but a corpus, which takes long, only for its epochs."""
    data = config.data
    return data.epochs is not None or (data.path is not None and data.kind is not DataKind.corpus)


@dataclasses.dataclass(frozen=True)
class Planned:
    """plan: with the estimate for a config. again: plans a changed one. notes: of what a given plan decides."""

    plan: Plan
    again: Callable[[Config], Plan]
    notes: list[str]


def planned(model: nn.Module, config: Config, plan: Plan | None) -> Planned:
    """The given plan, or without one a new plan.

    Raises:
        PlanError: the given plan does not fit the model.
    """
    example = example_inputs(model, config.data.seq_len)
    sites, facts = planning_facts(model, config, example, plan)

    def shape(of: Plan) -> ModelShape:
        return shape_of_model(model, of)

    if plan is None:
        made = new_plan(model, sites, config, facts)
        return Planned(made, lambda changed: build_plan(sites, changed, facts, shape), [])
    check_sites(plan.layers, sites)
    facts = as_planned(facts, plan)

    def again(changed: Config) -> Plan:
        if (changed.mesh, changed.dispatch) != (config.mesh, config.dispatch):
            raise ConfigError("plan", config.plan, "decides the mesh and the dispatch", "Plan again without it")
        return with_estimate(plan, changed, facts, shape)

    given = with_estimate(plan, config, facts, shape)
    decides = f"{config.plan} decides: mesh, layers, dispatch and adapters are those of this plan"
    notes = [decides, *left_notes(plan, sites)]
    return Planned(with_remedies(given, sites, facts, config, shape, again), again, notes)


def as_planned(facts: ModelFacts, plan: Plan) -> ModelFacts:
    """The facts with the adapters that are planned, and without the tables whose rows are spread."""
    facts = without_tables(facts, plan.lookups)
    if plan.adapters is None:
        return facts
    numbers = sum(plan.adapters.rank * sum(facts.linears[path]) for path in plan.adapters.linears)
    return dataclasses.replace(facts, adapters=(numbers, plan.adapters.train_router))


def flat(config: Config, plan: Plan) -> dict[str, object]:
    """The values of the config that a forecast reads beside the plan: dotted key -> value."""
    found: dict[str, object] = {}
    for group in _READ:
        for name, value in vars(getattr(config, group)).items():
            if not dataclasses.is_dataclass(value):
                found[f"{group}.{name}"] = getattr(value, "value", value)
    return found | {"trainer.checkpointing": checkpointing_of(config, plan), "model.name": config.model.name}


def _compare(model: nn.Module, this: Compared, config: Config, console: Console) -> dict[str, object]:
    """Prints and returns what differs from another plan, which is forecast with the config of its run, if it has one.

    Raises:
        ConfigError: there is no such plan, or it is not of this model.
    """
    if config.compare is None:
        return {}
    file = plan_file(config.compare, "compare")
    resolved = file.with_name(RESOLVED)
    theirs, _ = with_workload(load_resolved(resolved, runs=())) if resolved.is_file() else (config, [])
    theirs = dataclasses.replace(theirs, plan=str(file), workload=dataclasses.replace(theirs.workload, load=None))
    other = plans.read(file)
    plan = planned(model, scheduled(theirs, other), other).plan
    shape = shape_of_model(model, plan)
    them = Compared(plan=plan, forecast=forecast_plan(shape, plan, theirs), config=flat(theirs, plan))
    print_comparison(this, them, console)
    pairs = {"differences": differences(this, them), "costs": costs(this, them)}
    return {"compared": {name: {key: list(pair) for key, pair in rows.items()} for name, rows in pairs.items()}}


def _described(shape: ModelShape, plan: Plan, config: Config) -> Described | None:
    """The memory of a described layout, if there is one."""
    if not is_described(config.workload):
        return None
    inputs = inputs_of(shape, plan, config)
    even, uneven = (round(sum(memory_of(inputs, load).values())) for load in (1.0, expected_load(plan, config).load))
    fits = fit_of(even, uneven, config.hardware.memory_gib * GIB)
    return Described(memory_bytes=even, memory_bytes_uneven=uneven, fits=fits)


def _described_note(described: Described, config: Config) -> str:
    return (
        f"the time is that of the layout which workload={config.workload.name} describes; this package runs expert, "
        "tensor, context, pipeline and data parallelism as `mesh` says, of which the memory above is; the described "
        "layout needs about "
        f"{bytes_text(described.memory_bytes)} a rank"
    )


def _described_fields(described: Described | None) -> dict[str, object]:
    """The fields of result.json about a described layout."""
    return {} if described is None else {f"described_{name}": value for name, value in vars(described).items()}


def plan_fields(plan: Plan) -> dict[str, object]:
    """The fields of result.json about a plan."""
    fields: dict[str, object] = {
        "plan_hash": plan.hash,
        "world_size": plan.mesh.world_size,
        "num_rewritten": len(plan.layers),
        "dispatch": sorted({layer.dispatch.kind for layer in plan.layers}),
    }
    if plan.estimate is not None:
        estimate = dataclasses.asdict(plan.estimate)
        estimate["memory_bytes_per_rank"]["total"] = plan.estimate.memory_bytes_per_rank.total
        fields |= {name: value for name, value in estimate.items() if value is not None}  # None: no layer lends
        fields["layers_not_counted"] = reason_not_counted(plan.estimate.largest)
    return fields


def require_layers(plan: Plan, config: Config) -> None:
    """Refuses a plan without layers, which the Python API allows, but not the command line.

    Raises:
        ConfigError: nothing would be rewritten.
    """
    if not plan.layers:
        raise ConfigError(
            "model", config.model.name, "no dense FFN and no experts were found, so there is nothing to rewrite",
            "Use another model; task=compile lists near misses with their reasons",
        )  # fmt: skip
