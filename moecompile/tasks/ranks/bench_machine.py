"""What task=bench measures of a machine that computes on its CPU, and the `hardware` file that it writes of it."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from moecompile.bench import (
    MachineCost,
    Sizes,
    StepCost,
    calibrated,
    cpu_parts,
    hardware_of,
    measure_machine,
    write_hardware,
)
from moecompile.capture import is_meta
from moecompile.errors import ConfigError
from moecompile.models.build import example_inputs
from moecompile.pipeline import compile_model, make_plan
from moecompile.pipeline.shape import shape_of_model
from moecompile.plan import Plan, on_one_process
from moecompile.planner.cost_model.inputs import Inputs, Layout, inputs_of
from moecompile.planner.cost_model.shapes import Attention, ModelShape
from moecompile.schema import Config, DispatchConfig, MeshConfig
from moecompile.tasks.job import Job
from moecompile.torch_private import device_of

_TIMEOUT = timedelta(minutes=10)
_MOST_PARAMS = 500_000_000  # each rank has a second copy while it measures


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What rank 0 knows before the steps: the machine's cost, and the model that it was measured with."""

    cost: MachineCost
    shape: ModelShape

    def write(self, plan: Plan, config: Config, step: StepCost, run_dir: Path) -> dict[str, Any]:
        """Writes the file, and returns what bench.json has of it; without a file a `reason`."""
        try:
            inputs = inputs_of(self.shape, plan, config)
        except ConfigError as error:  # the run's own hardware has no figures, or its layout cannot be described
            return {**dataclasses.asdict(self.cost), "reason": str(error)}
        seconds = 1e-3 * step.step.cpu_ms
        # More than the ranks of a node, if this machine plays several.
        local = int(os.environ.get("LOCAL_WORLD_SIZE", plan.mesh.world_size))
        inputs = dataclasses.replace(
            inputs,
            software=dataclasses.replace(inputs.software, fused=True),
            machine=dataclasses.replace(inputs.machine, domain=local),
        )
        host, factor = calibrated(self.cost, _one(inputs), inputs, seconds)
        content = hardware_of(self.cost, host, config.hardware, local)
        return {
            **dataclasses.asdict(self.cost),
            "hardware": content,
            "path": str(write_hardware(run_dir, content)),
            "message_factor": factor,
            "predicted_cpu_ms": 1e3 * sum(cpu_parts(inputs, host).values()),
        }


def measured_machine(job: Job, config: Config, waiting: dist.ProcessGroup) -> Measured | None:
    """All ranks call it. None on all but rank 0, on a GPU, and for a model that a rank cannot run alone."""
    if device_of().type != "cpu" or is_meta(job.model) or count_params(job.model) > _MOST_PARAMS:
        return None
    example = example_inputs(job.model, config.data.seq_len, longest=config.data.seq_len)
    plan = make_plan(job.model, config, example=example)
    shape = shape_of_model(job.model, plan)
    run = _forward_backward(job.model, plan, config)
    cost = measure_machine(run, _sizes(shape, plan, config), waiting, _TIMEOUT)
    return None if cost is None else Measured(cost=cost, shape=shape)


def count_params(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def _sizes(shape: ModelShape, plan: Plan, config: Config) -> Sizes:
    layer = plan.layers[0]
    attention = next((each.mixer for each in shape.layers if isinstance(each.mixer, Attention)), None)
    return Sizes(
        d_model=shape.hidden,
        heads=0 if attention is None else attention.heads,
        d_qk=0 if attention is None else attention.d_qk,
        d_v=0 if attention is None else attention.d_v,
        seq=config.data.seq_len,
        row=layer.row_site.d_model,
        experts=layer.placement.experts_per_rank,
        d_expert=layer.experts.d_expert,
        tokens=config.data.micro_batch_size * config.data.seq_len,
    )


def _one(inputs: Inputs) -> Inputs:
    """A micro-batch on one rank, with all experts."""
    layout = inputs.layout
    one = Layout(gpus=1, seq=layout.seq, global_batch=layout.micro_batch, micro_batch=layout.micro_batch)
    software = dataclasses.replace(inputs.software, dispatcher="flat", in_flight="none", chunks=1, recompute=())
    return dataclasses.replace(
        inputs, layout=one, software=software, machine=dataclasses.replace(inputs.machine, domain=1)
    )


def _forward_backward(model: nn.Module, plan: Plan, config: Config) -> Callable[[], None]:
    """One micro-batch through the compiled model on this rank alone, with the loss of predicting its input."""
    seq_len, alone = config.data.seq_len, dataclasses.replace(config, mesh=MeshConfig(), dispatch=DispatchConfig())
    short = example_inputs(model, seq_len)
    compiled = compile_model(copy.deepcopy(model), alone, example=short, plan=on_one_process(plan))
    whole = example_inputs(model, seq_len, longest=seq_len)
    batch = {name: ids.repeat(config.data.micro_batch_size, 1) for name, ids in whole.items()}
    labels = next(reversed(batch.values()))  # of the decoder, if there is one

    def step() -> None:
        logits = compiled(**batch, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten()).backward()
        compiled.zero_grad()

    return step
