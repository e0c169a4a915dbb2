"""What task=bench measures of a machine that computes on its CPU, and the `hardware` file that it writes of it."""

from __future__ import annotations

import copy
import dataclasses
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.nn import functional as F

from moecompile import waiting
from moecompile.atomic import write_text
from moecompile.bench import (
    SHORT,
    MachineCost,
    Sizes,
    StepCost,
    calibrated,
    cpu_parts,
    hardware_config,
    hardware_of,
    host_before,
    measure_machine,
    sharded_seconds,
    with_messages,
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
from moecompile.runtime.data.cache import cache_folder, key_of
from moecompile.schema import Calibrate, Config, DispatchConfig, HardwareConfig, MeshConfig
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
        host = dataclasses.replace(host, one_machine=local == plan.mesh.world_size)
        content = hardware_of(self.cost, host, config.hardware, local)
        return {
            **dataclasses.asdict(self.cost),
            "hardware": content,
            "path": str(write_hardware(run_dir, content)),
            "message_factor": factor,
            "predicted_cpu_ms": 1e3 * sum(cpu_parts(inputs, host).values()),
        }


def measured_machine(job: Job, config: Config, group: dist.ProcessGroup) -> Measured | None:
    """All ranks call it. None on all but rank 0, on a GPU, and for a model that a rank cannot run alone."""
    if device_of().type != "cpu" or is_meta(job.model) or count_params(job.model) > _MOST_PARAMS:
        return None
    example = example_inputs(job.model, config.data.seq_len, longest=config.data.seq_len)
    plan = make_plan(job.model, config, example=example)
    shape = shape_of_model(job.model, plan)
    run = _forward_backward(job.model, plan, config)
    cost = measure_machine(run, _sizes(shape, plan, config), group, _TIMEOUT)
    return None if cost is None else Measured(cost=cost, shape=shape)


# -- a short measurement before a run, for its report ------------------------------------------------------------------

_SIZES = (1_000_000, 200_000_000)  # parameters of models with which it is done without being asked
FOLDER = "MOECOMPILE_MACHINE_DIR"


def this_machine(job: Job, config: Config) -> HardwareConfig | None:
    """The machine of a run whose ranks all compute on the CPU of one, for a forecast; all ranks call it.

    It is measured before the first run with a model of about this size, and kept for others (`trainer.calibrate`).
    """
    if not _asked(job, config):
        return None
    path = _kept_file(job)
    known: list[Any] = [read_kept(path) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(known)
    if known[0] is not None:
        return hardware_config(known[0])
    start = time.perf_counter()
    waiting.show("measuring this machine once, for the report's forecast", line=False)
    with torch.random.fork_rng(devices=[]):  # the run is the same
        content = _short(job, config)
    waiting.done()
    if content is None:
        return None
    with suppress(OSError):  # a full disk
        write_text(path, yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120))
    seconds = time.perf_counter() - start
    print(f"measured this machine once, in {seconds:.1f} s, for the report's forecast: {path}", flush=True)
    return hardware_config(content)


def _asked(job: Job, config: Config) -> bool:
    asked, world = config.trainer.calibrate, dist.get_world_size()
    if asked is Calibrate.never or device_of().type != "cpu":
        return False
    if int(os.environ.get("LOCAL_WORLD_SIZE", world)) != world or config.hardware.name != HardwareConfig().name:
        return False
    return asked is Calibrate.always or _SIZES[0] <= count_params(job.model) <= _SIZES[1]


def _kept_file(job: Job) -> Path:
    """By processor, version of torch, threads, ranks, and the size of the model as a power of two."""
    key = key_of(
        _processor(), len(os.sched_getaffinity(0)), torch.__version__, torch.get_num_threads(), dist.get_world_size(),
        count_params(job.model).bit_length(),
    )  # fmt: skip
    return cache_folder(os.environ.get(FOLDER), "machine") / f"{key}.yaml"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def read_kept(path: Path) -> dict[str, Any] | None:
    """What was measured before; None: nothing, or nothing that can be read."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        hardware_config(content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return None
    found: dict[str, Any] = content
    return found


def _short(job: Job, config: Config) -> dict[str, Any] | None:
    """The content of a `hardware` file; None on all but rank 0, or if the model has no layer to plan."""
    rank, world = dist.get_rank(), dist.get_world_size()
    told: list[Any] = [None]
    if rank == 0:
        model = job.model if job.importing is None else job.importing.stand_in()
        example = example_inputs(model, config.data.seq_len, longest=config.data.seq_len)
        plan = make_plan(model, config, example=example)
        if plan.layers:
            shape = shape_of_model(model, plan)
            told = [_sizes(shape, plan, config)]
            run = _forward_backward(model, plan, config)
    dist.broadcast_object_list(told)
    sizes = told[0]
    if sizes is None:
        return None
    cost = measure_machine(run if rank == 0 else lambda: None, sizes, _everyone(), _TIMEOUT, SHORT)
    message = sharded_seconds(SHORT) if world > 1 else 0.0
    if cost is None:
        return None
    inputs = inputs_of(shape, plan, config)
    inputs = dataclasses.replace(inputs, software=dataclasses.replace(inputs.software, fused=True))
    host = dataclasses.replace(host_before(cost, _one(inputs)), one_machine=True)
    if host.messages and host.messages[0][1] > 0:
        host = with_messages(host, max(1.0, message / host.messages[0][1]))
    return hardware_of(cost, host, config.hardware, world, by="in short before a run")


def _everyone() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


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
