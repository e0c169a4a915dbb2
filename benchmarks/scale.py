"""What one rank costs to plan, compile, start, rehearse and save, as ranks, layers and experts grow; needs no ranks.

    python benchmarks/scale.py                       # eight minutes of one core
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
CPU seconds, the least of three processes, because what else runs only adds to them, and MiB of the process's memory
beyond that at the step's begin. `groups`: calls by which this rank makes process groups, each of which walks over its
ranks, and of how many of them it is a member. `entries`: what this rank writes into a checkpoint, and the bytes that it
sends to the rank that coordinates.

The exponent is the slope of a line through the logarithms of the three largest sizes. Writes
benchmarks/results/scale.json, docs/assets/scale.md and scale.svg (axes that are not measured stay), and exits with 1 if
an exponent is above its bound (`BOUNDS`, with the reason).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
ROUNDS = 3
STEPS = ("plan", "compile", "start", "step", "save", "index")


@dataclass(frozen=True)
class Size:
    """A point."""

    ranks: int = 64
    layers: int = 4
    experts: int = 64


AXES = {
    "ranks": [Size(ranks=n) for n in (8, 64, 512, 2048, 16384)],
    "layers": [Size(layers=n) for n in (4, 8, 16, 32, 64)],
    "experts": [Size(experts=n) for n in (8, 32, 128, 512)],
}

WARM_UP = Size(ranks=8, layers=1, experts=16)

_ONCE = "a rank's work does not depend on how many others there are"
_INDEX = "the index of torch DCP has a line for each shard of each rank"
_CUT = "FSDP2 cuts and joins a weight of experts in as many pieces as ranks share it"
_LAYER = "layers are alike"
_STACK = "the experts of a layer are one weight"
BOUNDS: dict[str, dict[str, tuple[float, str]]] = {
    "ranks": {
        **dict.fromkeys(("plan", "compile", "start", "save"), (0.2, _ONCE)), "step": (0.6, _CUT),
        "index": (1.2, _INDEX), "index_bytes": (1.05, _INDEX),
        "groups": (0, "a rank makes the groups that it is in"), "entries": (0, _ONCE),
        **dict.fromkeys((f"{name} MiB" for name in STEPS), (1.2, _CUT)),
    },
    "layers": {
        **dict.fromkeys(STEPS, (1.2, _LAYER)), "index": (1.2, _LAYER), "index_bytes": (1.05, _LAYER),
        "groups": (0, "layers share groups"), "entries": (1.05, _LAYER),
        **dict.fromkeys((f"{name} MiB" for name in STEPS), (1.2, _LAYER)),
    },
    "experts": {
        **dict.fromkeys(STEPS, (0.25, _STACK)), "groups": (0, _STACK), "entries": (0, _STACK),
        "index_bytes": (0.05, _STACK), **dict.fromkeys((f"{name} MiB" for name in STEPS), (0.25, _STACK)),
    },
}  # fmt: skip
"""For each axis and figure: the largest exponent, and why."""
ROUNDING = 1e-9
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
        plan = planned(structure_of(config), config, None).plan
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
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

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
        cut = cache(_compute_local_shape_and_global_offset)
        planner.state_dict = {name: without_values(tensor) for name, tensor in tensors.items()}
        gc.disable()  # it would look at the parts again and again
        parts = [part, *(part_of(planner, rank, mesh, cut) for rank in range(1, mesh.world_size))]
        gc.enable()
        with clock.step("index"):
            _, index = planner.create_global_plan(parts)
            found["index_bytes"] = len(pickle.dumps(index))
        found["chunks"] = sum(len(each.chunks) for each in index.state_dict_metadata.values())
    return found


def without_values(tensor: Any) -> Any:
    """A fake tensor on the meta device, where the planner is as quick as with real ones."""
    import torch
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    local = tensor.to_local()
    return DTensor.from_local(
        torch.empty(local.shape, dtype=local.dtype, device="meta"), tensor.device_mesh, tensor.placements,
        run_check=False, shape=tensor.shape, stride=tensor.stride(),
    )  # fmt: skip


def part_of(planner: Any, rank: int, mesh: Any, cut: Callable[..., Any]) -> Any:
    """The part of another rank: what the planner makes on this one, at that rank's places in the device meshes.

    Args:
        cut: torch's function that says what a rank has of a tensor, from its place. Entries of one shape are cut alike.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint import planner_helpers
    from torch.distributed.device_mesh import DeviceMesh

    def place(of: DeviceMesh) -> tuple[int, ...]:
        return tuple(mesh.index(rank, *_axes(name)) for name in of.mesh_dim_names or ())

    def cut_here(shape: Any, of: DeviceMesh, placements: Any) -> Any:
        return cut(tuple(shape), of.shape, place(of), tuple(placements))

    with (
        mock.patch.object(DeviceMesh, "get_coordinate", place),
        mock.patch.object(planner_helpers, "compute_local_shape_and_global_offset", cut_here),
        mock.patch.object(dist, "get_rank", lambda *_: rank),
    ):
        return planner.create_local_plan()


@cache
def _axes(name: str) -> tuple[str, ...]:
    """`dp_shard_cp` -> its axes."""
    from moecompile.mesh import dense_axes, expert_axes

    return tuple(axis for axis in dict.fromkeys((*dense_axes(), *expert_axes())) if f"_{axis}_" in f"_{name}_")


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


# -- all points -------------------------------------------------------------------------------------------------------


def least(size: Size) -> dict[str, Any]:
    """A point, each of its steps as it was in the fastest of `ROUNDS` processes."""
    rows = [in_a_process(size) for _ in range(ROUNDS)]
    seconds = {name: min(row["seconds"][name] for row in rows) for name in rows[0]["seconds"]}
    return {**rows[0], "seconds": seconds}


def in_a_process(size: Size) -> dict[str, Any]:
    """A point in a process that is forked from this one, which has imported and warmed what all of them need.

    Raises:
        RuntimeError: it ended without a result.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        sender.send(measure(size))
        sender.close()
        os._exit(0)

    process = context.Process(target=run)
    process.start()
    sender.close()
    try:
        row: dict[str, Any] = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{size} could not be measured") from None
    finally:
        process.join()
    return row


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """What is held against a bound, by name."""
    return {
        **row["seconds"], **{f"{name} MiB": value for name, value in row["mib"].items()},
        **{name: row[name] for name in ("groups", "entries", "index_bytes") if name in row},
    }  # fmt: skip


def exponent(axis: str, rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """How a figure grows along an axis; None: too small to say, or not measured thrice."""
    points = [(row[axis], value) for row in rows if (value := figures(row).get(name)) is not None][-3:]
    least = LEAST_MIB if name.endswith(" MiB") else LEAST_SECONDS if name in STEPS else 1
    if len(points) < 3 or points[-1][1] < least:
        return None
    xs, ys = [math.log(x) for x, _ in points], [math.log(max(y, least / 10)) for _, y in points]
    middle_x, middle_y = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    # Least squares with exact sums: those of `statistics` depend on the Python, and stored results are compared.
    rise = math.fsum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys, strict=True))
    return rise / math.fsum((x - middle_x) ** 2 for x in xs)


def findings(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """For each axis and figure: its exponent, the bound, why, and whether it holds."""
    found = []
    for axis, of_axis in rows.items():
        for name, (bound, why) in BOUNDS[axis].items():
            slope = exponent(axis, of_axis, name)
            if slope is not None:
                found.append(
                    {"axis": axis, "figure": name, "exponent": slope, "bound": bound, "why": why,
                     "holds": slope <= bound + ROUNDING}
                )  # fmt: skip
    return found


def table(axis: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each point, then the exponents and their bounds."""
    found = {each["figure"]: each for each in findings({axis: rows})}
    heads = [axis, *STEPS, "most MiB", "groups", "entries", "sent", "index"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        seconds = [f"{row['seconds'][name]:.2f} s" if name in row["seconds"] else "" for name in STEPS]
        index = f"{row['index_bytes'] / 2**20:,.1f} MiB" if "index_bytes" in row else ""
        cells = [f"{row[axis]:,}", *seconds, f"{max(row['mib'].values()):,.0f}", row["groups"], f"{row['entries']:,}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['sent_bytes'] / 2**10:,.0f} KiB", index])) + " |")
    for what in ("exponent", "bound"):
        cells = [f"{found[name][what]:.2f}" if name in found else "" for name in STEPS]
        more = [f"{found[name][what]:.2f}" if name in found else "" for name in ("groups", "entries", "index_bytes")]
        lines.append("| " + " | ".join([f"*{what}*", *cells, "", more[0], more[1], "", more[2]]) + " |")
    return "\n".join(lines) + "\n"


def tables(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A table for each axis."""
    return "\n".join(table(axis, of_axis) for axis, of_axis in rows.items())


def plot(rows: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """A panel for each axis: CPU seconds of the steps, both scales logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(rows), figsize=(3.2 * len(rows), 3.0), sharey=True, squeeze=False)
    for panel, (axis, of_axis) in zip(panels[0], rows.items(), strict=True):
        for name, mark in zip(STEPS, "o^sD*v", strict=True):
            points = [(row[axis], row["seconds"][name]) for row in of_axis if name in row["seconds"]]
            panel.plot(*zip(*points, strict=True), f"{mark}-", markersize=4, label=name)
        xs = [row[axis] for row in of_axis]
        panel.set(xscale="log", yscale="log", xlabel=axis, xticks=xs, xticklabels=[f"{x:,}" for x in xs])
        panel.minorticks_off()
    panels[0][0].set(ylabel="CPU seconds")
    panels[0][-1].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def write(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Results, tables and picture; axes that were not measured now stay as they were."""
    before = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.is_file() else {}
    every = {axis: rows.get(axis) or before[axis] for axis in AXES if axis in rows or axis in before}
    RESULTS.write_text(json.dumps({"rows": every, "findings": findings(every)}, indent=1) + "\n", encoding="utf-8")
    MARKDOWN.write_text(tables(every), encoding="utf-8")
    plot(every, PICTURE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument(
        "--points", type=int, default=99, help="measure the smallest so many of an axis, for a quick look"
    )
    given = parser.parse_args(arguments)
    measure(WARM_UP)
    rows: dict[str, list[dict[str, Any]]] = {}
    for axis in given.axes:
        rows[axis] = []
        for size in AXES[axis][: given.points]:
            row = least(size)
            rows[axis].append(row)
            seconds = "  ".join(f"{name} {value:7.2f} s" for name, value in row["seconds"].items())
            print(f"{axis:8}{row[axis]:7,}  {seconds}", flush=True)
    found = findings(rows)
    print(f"\n{tables(rows)}")
    for each in found:
        if not each["holds"]:
            grows = f"{each['figure']} grows as {each['axis']}^{each['exponent']:.2f}"
            print(f"{grows}, above {each['bound']}: {each['why']}")
    if given.points >= max(map(len, AXES.values())):
        write(rows)
    return int(not all(each["holds"] for each in found))


if __name__ == "__main__":
    sys.exit(main())
