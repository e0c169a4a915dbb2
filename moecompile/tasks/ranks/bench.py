"""A rank of task=bench: measures each distinct MoE layer against a dense FFN, and whole optimizer steps."""

from __future__ import annotations

import dataclasses
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from moecompile.bench import LayerCost, StepCost, measure_layers, measure_steps
from moecompile.models.build import example_inputs
from moecompile.pipeline import make_plan
from moecompile.report.console import print_bench
from moecompile.report.result import write_result
from moecompile.rundir import accept, note_accepted
from moecompile.runtime.groups import init_process_group
from moecompile.schema import Config
from moecompile.tasks.job import Job, load_job
from moecompile.tasks.plan import require_layers
from moecompile.tasks.ranks.bench_machine import measured_machine
from moecompile.tasks.show import show_compiled
from moecompile.torch_private import device_of
from moecompile.version import versions

BENCH = "bench.json"
_LAYERS_TIMEOUT = timedelta(hours=4)


def run_rank(config: Config, run_dir: Path) -> None:
    """Runs one rank: rank 0 measures the layers while others wait, then all run steps; rank 0 writes the results."""
    init_process_group(config)
    job, console = load_job(config, run_dir), Console(soft_wrap=False)
    waiting = dist.new_group(backend="gloo", timeout=_LAYERS_TIMEOUT)
    layers = _layers(job, config, waiting)
    machine = measured_machine(job, config, waiting) if config.bench.machine else None
    compiled = job.compile(config)
    if dist.get_rank() == 0:
        accept(run_dir)
        show_compiled(compiled, run_dir, console)
    dist.barrier()
    note_accepted(run_dir)
    materialize = job.materialize(compiled)
    step = measure_steps(compiled.model, compiled.plan, config, job.data, run_dir / "steps", materialize)
    if dist.get_rank() == 0:
        found = None if machine is None else machine.write(compiled.plan, config, step, run_dir)
        _write(config, compiled.plan.hash, run_dir, layers, step, found, console)


def _write(
    config: Config,
    plan_hash: str,
    run_dir: Path,
    layers: list[LayerCost],
    step: StepCost,
    machine: dict[str, Any] | None,
    console: Console,
) -> None:
    """Prints the tables and writes `bench.json` and `result.json`."""
    measured = {
        "device": device_of().type,
        "threads": torch.get_num_threads(),
        "precision": config.trainer.precision.value,
        "layers": [_layer_row(cost) for cost in layers],
        "step": _step_row(step),
        "machine": machine,
    }
    body = {"recipe": config.name, "plan_hash": plan_hash, "versions": versions(), **measured}
    path = run_dir / BENCH
    path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    fields = {"plan_hash": plan_hash, "world_size": step.world_size, **measured}
    result = write_result(run_dir, "bench", config.name, fields)
    print_bench(measured, console)
    console.print(f"\n{config.name}  ok  {result['seconds']:.1f} s  {path}", soft_wrap=True)


def _layers(job: Job, config: Config, waiting: dist.ProcessGroup) -> list[LayerCost]:
    """Measures the layers on rank 0 while the others wait; empty on other ranks."""
    costs = _measured_layers(job, config) if dist.get_rank() == 0 else []
    dist.barrier(waiting)
    return costs


def _measured_layers(job: Job, config: Config) -> list[LayerCost]:
    seq_len = config.data.seq_len
    example = example_inputs(job.model, seq_len, longest=seq_len)  # measure the length that is trained
    plan = make_plan(job.model, config, example=example)
    require_layers(plan, config)
    return measure_layers(job.model, plan, config, example, device_of())


def _layer_row(cost: LayerCost) -> dict[str, Any]:
    return {**dataclasses.asdict(cost), "kept_ratio": cost.kept_ratio}


def _step_row(cost: StepCost) -> dict[str, Any]:
    row = dataclasses.asdict(cost)
    times = row.pop("step")
    return {**row, "wall_ms": times["wall_ms"], "cpu_ms": times["cpu_ms"], "tokens_per_second": cost.tokens_per_second}
