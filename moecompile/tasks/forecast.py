"""The forecast of a training run's step, for its report: `forecast.json`, with the keys of task=plan's result.json."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import torch
from torch import nn

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.pipeline.shape import shape_of_model
from moecompile.plan import Plan
from moecompile.planner.cost_model.forecast import Forecast, forecast_plan
from moecompile.planner.cost_model.shapes import ModelShape, training_flops
from moecompile.rundir import FORECAST, output_dir
from moecompile.schema import Config


def outline(model: nn.Module) -> nn.Module | None:
    """A copy of a model before compilation, weights on the meta device; None, and a message, if it cannot be made."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in model.parameters()
    }
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:  # what it holds cannot be copied
        _show(f"the model cannot be copied: {error}")
        return None


def shape_of(model: nn.Module | None, plan: Plan) -> ModelShape | None:
    """The shape of an outline; None: there is no outline, or no layer was planned."""
    return None if model is None or not plan.layers else shape_of_model(model, plan)


def flops_per_token(model: nn.Module | None, plan: Plan, seq_len: int) -> tuple[float | None, float | None]:
    """Model FLOPs per token, forward and backward, of the planned model and of the dense one; None: no outline."""
    shape = shape_of(model, plan)
    if model is None or shape is None:
        return None, None
    dense = shape_of_model(model, Plan(mesh=MeshSpec(), layers=(), reductions=()))  # which FLOPs do not depend on
    return training_flops(shape, seq_len), training_flops(dense, seq_len)


def write_forecast(
    shape: ModelShape | None, plan: Plan, config: Config, run_dir: Path, load: Path | None = None
) -> None:
    """Writes the forecast, or prints why there is none: the hardware has no figures for it, or the disk no room.

    Args:
        load: the load of the run, whose imbalance is priced too.
    """
    if shape is None:
        return
    if load is not None and load.exists():
        config = dataclasses.replace(config, workload=dataclasses.replace(config.workload, load=str(load)))
    try:
        fields = {"hardware": config.hardware.name, **forecast_fields(forecast_plan(shape, plan, config))}
        text = json.dumps(fields, indent=2) + "\n"
        (output_dir(run_dir) / FORECAST).write_text(text, encoding="utf-8")
    except (ConfigError, OSError) as error:
        _show(str(error))


def _show(reason: str) -> None:
    print(f"no forecast of a step: {reason}", flush=True)


def forecast_fields(forecast: Forecast) -> dict[str, object]:
    """The fields of result.json about a forecast."""
    return {
        "step_seconds": forecast.seconds,
        "tokens_per_second_per_rank": forecast.tokens_per_second_per_rank,
        "tflops_per_rank": forecast.tflops_per_rank,
        "mfu": forecast.mfu,
        "step_parts": dict(forecast.parts),
        "imbalance": [dataclasses.asdict(price) for price in forecast.prices],
        "changes": [dataclasses.asdict(change) for change in forecast.changes],
    }
