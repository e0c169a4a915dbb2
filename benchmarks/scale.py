"""What one rank costs to plan, compile, start, rehearse and save, as ranks, layers and experts grow; needs no ranks.

    python benchmarks/scale.py                       # about eight minutes of one core
    python benchmarks/scale.py --axes ranks          # of ranks, layers, experts

Qwen3-30B-A3B with its own sizes and some of its layers, EP groups of 8 on nodes of 8, a step of one micro-batch of 64
tokens. Each point is rank 0 of its mesh in a process of its own, as `task=rehearse` runs it: meta and fake tensors, and
process groups without connections. Along an axis the others stay. Steps:
  plan     capture and match the model on the meta device, and make the plan
  compile  capture, match, rewrite, lower
  start    from the lowered model to the first forward: process groups, shards, FSDP2, optimizer
  step     forward, backward and optimizer step
  save     the rank's entries of a checkpoint, and its part of the save plan
  index    on the rank that coordinates: from the parts of all ranks to the checkpoint's index, as bytes
CPU seconds, and MiB of the process's memory beyond that at the step's begin. `groups`: calls by which this rank makes
process groups, each of which walks over its ranks, and of how many of them it is a member. `entries`: what this rank
writes into a checkpoint, and the bytes that it sends to the rank that coordinates.

The exponent is the slope of a line through the logarithms of the three largest sizes. Writes
benchmarks/results/scale.json, docs/assets/scale.md and scale.svg if all axes are measured, and exits with 1 if an
exponent is above its bound (`BOUNDS`, with the reason).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results") / "scale.json"
MARKDOWN, PICTURE = (REPOSITORY / "docs" / "assets" / name for name in ("scale.md", "scale.svg"))
EP = PER_NODE = 8
MOST_INDEXED = 2048
"""Ranks up to which the index of a checkpoint is made: all ranks' parts are in this process's memory."""
STEPS = ("plan", "compile", "start", "step", "save", "index")


@dataclass(frozen=True)
class Size:
    """A point."""

    ranks: int = 64
    layers: int = 4
    experts: int = 64


AXES = {
    "ranks": [Size(ranks=n) for n in (8, 64, 512, 2048, 16384)],
    "layers": [Size(layers=n) for n in (4, 16, 32, 64, 128)],
    "experts": [Size(experts=n) for n in (8, 32, 128, 512)],
}

_ONCE = "what a rank does does not depend on"
_EACH = "a layer is a layer"
BOUNDS = {
    "ranks": {
        **dict.fromkeys(("plan", "compile", "start", "step", "save"), (0.15, f"{_ONCE} how many there are")),
        "index": (1.15, "torch DCP's index has a line for each shard of each rank"),
        "groups": (0.0, "a rank makes the groups in which it is"),
        "entries": (0.0, f"{_ONCE} how many there are"),
        "index_bytes": (1.05, "torch DCP's index has a line for each shard of each rank"),
    },
    "layers": {
        **dict.fromkeys(("plan", "compile", "start", "step", "save", "index"), (1.15, _EACH)),
        "groups": (0.0, "layers share groups"),
        "entries": (1.05, _EACH),
        "index_bytes": (1.05, _EACH),
    },
    "experts": {
        **dict.fromkeys(STEPS, (0.15, "the experts of a layer are one weight")),
        "groups": (0.0, "experts share groups"),
        "entries": (0.0, "the experts of a layer are one weight"),
        "index_bytes": (0.05, "the experts of a layer are one weight"),
    },
}  # fmt: skip
"""For each axis: the largest exponent, and why it must not be larger."""
MIB_BOUNDS = {
    "ranks": 0.3,
    "layers": 1.15,
    "experts": 0.3,
}
LEAST_SECONDS, LEAST_MIB = 0.05, 32.0
"""What is below is all noise, and has no exponent."""


# -- one point, in a process of its own -------------------------------------------------------------------------------


class Clock:
    """CPU seconds and memory of steps that follow one another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.mib: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measures what is done within."""
        self.begin()
        yield
        self.end(name)

    def begin(self) -> None:
        """Begins a step: the peak of memory is counted from here."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._memory, self._start = _status("VmRSS"), time.process_time()

    def end(self, name: str) -> None:
        """Ends a step."""
        self.seconds[name] = time.process_time() - self._start
        self.mib[name] = (_status("VmHWM") - self._memory) / 2**10


def _status(name: str) -> int:
    """KiB"""
    return int(Path("/proc/self/status").read_text(encoding="ascii").split(f"{name}:")[1].split()[0])


def overrides(size: Size) -> list[str]:
    """The config of a point."""
    return [
        "model=qwen3_30b_a3b", "mesh=h100_2x8", f"mesh.num_nodes={size.ranks // PER_NODE}", f"mesh.ep={EP}",
        f"model.config.num_hidden_layers={size.layers}", f"model.config.num_experts={size.experts}",
        "data.seq_len=64", "data.micro_batch_size=1", f"data.global_batch_size={size.ranks}",
        "trainer.progress_bar=false", "trainer.reduce=each", "trainer.gather=layer",
    ]  # fmt: skip


def measure(size: Size) -> dict[str, Any]:
    """Rank 0 of a point: what `task=rehearse` does for a rank, in steps."""
    import torch
    import torch.distributed as dist

    from moecompile.compose import compose_config
    from moecompile.models.build import example_inputs
    from moecompile.models.initial import materialise
    from moecompile.pipeline import compile_with_report
    from moecompile.runtime.rehearsal import load_of, rehearse
    from moecompile.tasks.plan import planned
    from moecompile.tasks.ranks.rehearse import structure_of
    from moecompile.torch_private import fake_group

    torch.set_num_threads(1)
    clock, config = Clock(), compose_config(overrides(size))
    with clock.step("plan"):
        plan, _ = planned(structure_of(config), config, None)
    model = structure_of(config)
    example = example_inputs(model, config.data.seq_len)
    with clock.step("compile"):
        compiled = compile_with_report(model, config, example=example, plan=plan)
    compiled.regions.clear()
    fake_group(0, plan.mesh.world_size)
    stops = stopping(clock)
    limited = replace(config, trainer=replace(config.trainer, max_steps=1))
    with counted_groups() as made, tempfile.TemporaryDirectory() as folder:
        clock.begin()
        rehearse(
            compiled.model, plan, limited, 0, load_of(plan, 1.0), Path(folder),
            materialize=partial(materialise, compiled.model), callbacks=[stops],
        )  # fmt: skip
    saved = save(clock, stops.trainer, plan.mesh)  # beyond the fake tensors' mode, in which offsets have no values
    member = len(dist.distributed_c10d._world.pg_map)
    dist.destroy_process_group()
    return {
        **asdict(size), "seconds": clock.seconds, "mib": clock.mib, "groups": made["calls"], "member_of": member,
        "groups_seconds": made["seconds"], **saved,
    }  # fmt: skip


def stopping(clock: Clock) -> Any:
    """A callback that ends `start` at the first forward and `step` after the optimizer step, and keeps the trainer."""
    from lightning.pytorch import Callback

    class Stops(Callback):
        trainer: Any

        def on_train_batch_start(self, *_: Any) -> None:
            clock.end("start")
            clock.begin()

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            clock.end("step")
            self.trainer = trainer

    return Stops()


def save(clock: Clock, trainer: Any, mesh: Any) -> dict[str, Any]:
    """A checkpoint without its data: the part of this rank, and the index that the coordinating rank makes of all."""
    from moecompile.checkpoint.placed import SaveById, orders_of
    from moecompile.checkpoint.tensors import tensors_of

    model = trainer.lightning_module.model
    with clock.step("save"):
        tensors = tensors_of(model, trainer.strategy.optimizers)
        planner = SaveById(orders_of(model, tensors))
        planner.set_up_planner(dict(tensors), is_coordinator=True)
        part = planner.create_local_plan()
        sent = pickle.dumps(part)
    found: dict[str, Any] = {"entries": len(part.items), "sent_bytes": len(sent)}
    if mesh.world_size <= MOST_INDEXED:
        parts = [part, *(part_of(planner, rank, mesh) for rank in range(1, mesh.world_size))]
        with clock.step("index"):
            _, index = planner.create_global_plan(parts)
            found["index_bytes"] = len(pickle.dumps(index))
        found["chunks"] = sum(len(each.chunks) for each in index.state_dict_metadata.values())
    return found


def part_of(planner: Any, rank: int, mesh: Any) -> Any:
    """The part of another rank: what the planner makes on this one, at that rank's places in the device meshes."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    def place(of: DeviceMesh) -> tuple[int, ...]:
        return tuple(mesh.index(rank, *_axes(name)) for name in of.mesh_dim_names or ())

    with (
        mock.patch.object(DeviceMesh, "get_coordinate", place),
        mock.patch.object(DeviceMesh, "_sym_get_coordinate", lambda of, dim: place(of)[dim]),
        mock.patch.object(dist, "get_rank", lambda *_: rank),
    ):
        return planner.create_local_plan()


@cache
def _axes(name: str) -> tuple[str, ...]:
    """`dp_shard_cp` -> its axes."""
    from moecompile.mesh import AXES as OF_MESHES

    return tuple(axis.name for axis in OF_MESHES if f"_{axis.name}_" in f"_{name}_")


@contextmanager
def counted_groups() -> Iterator[dict[str, float]]:
    """Counts the calls that make process groups, also those of groups without this rank."""
    from torch.distributed import distributed_c10d

    new_group, made = distributed_c10d._new_group_with_tag, {"calls": 0, "seconds": 0.0}

    def counted(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        group = new_group(*args, **kwargs)
        made["seconds"] += time.process_time() - start
        made["calls"] += 1
        return group

    with mock.patch.object(distributed_c10d, "_new_group_with_tag", counted):
        yield made
