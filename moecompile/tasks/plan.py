"""task=plan: only the plan and the forecast of its step, in one process for any mesh; needs no GPU and no ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console

from moecompile import plan as plans
from moecompile.errors import ConfigError
from moecompile.models.build import build_model, example_inputs
from moecompile.passes.trained import frozen_notes
from moecompile.pipeline import make_plan
from moecompile.pipeline.shape import shape_of_model
from moecompile.plan import Plan
from moecompile.planner.existing import notes
from moecompile.planner.foresight.forecast import Forecast
from moecompile.planner.foresight.memory import memory_of
from moecompile.planner.foresight.planned import case_of, forecast_plan
from moecompile.planner.foresight.shapes import ModelShape
from moecompile.report.forecast import print_forecast
from moecompile.report.plan_tables import print_plan
from moecompile.report.result import write_result
from moecompile.report.text import bytes_text
from moecompile.rundir import accept
from moecompile.schema import Config, is_described, with_workload


def run(config: Config, run_dir: Path) -> None:
    """Prints the plan and writes `plan.yaml` and `result.json`."""
    config, workload_notes = with_workload(config)
    model = build_model(config.model, config.seed)
    plan = make_plan(model, config, example=example_inputs(model, config.data.seq_len))
    require_layers(plan, config)
    shape = shape_of_model(model, plan)
    forecast, memory = forecast_plan(shape, plan, config), _memory(shape, plan, config)
    plan_notes = [*workload_notes, *_described(config, memory), *notes(plan, config), *frozen_notes(model, plan)]
    console = Console()
    print_plan(plan, console, plan_notes)
    print_forecast(forecast, console)
    accept(run_dir)
    plans.save(plan, run_dir / "plan.yaml")
    write_result(run_dir, "plan", config.name, {**plan_fields(plan), **_fields(forecast, memory), "notes": plan_notes})


def _memory(shape: ModelShape, plan: Plan, config: Config) -> int | None:
    """Bytes of the fullest rank of a described layout, if there is one."""
    if not is_described(config.workload):
        return None
    case = case_of(shape, plan, config)
    return round(memory_of(case.model, case.layout, case.software).total)


def _described(config: Config, memory: int | None) -> list[str]:
    if memory is None:
        return []
    return [
        f"the time is that of the layout which workload={config.workload.name} describes; this package runs expert, "
        "tensor and data parallelism, and the memory above is that of `mesh`; the described layout needs about "
        f"{bytes_text(memory)} a rank"
    ]


def _fields(forecast: Forecast, memory: int | None) -> dict[str, object]:
    """The fields of result.json about the forecast; memory: of a described layout."""
    described = {} if memory is None else {"described_memory_bytes": memory}
    return {
        **described,
        "step_seconds": forecast.seconds,
        "tokens_per_second_per_rank": forecast.tokens_per_second_per_rank,
        "tflops_per_rank": forecast.tflops_per_rank,
        "mfu": forecast.mfu,
        "step_parts": dict(forecast.parts),
        "imbalance": [dataclasses.asdict(price) for price in forecast.prices],
        "changes": [dataclasses.asdict(change) for change in forecast.changes],
    }


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
