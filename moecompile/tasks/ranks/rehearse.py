"""Ranks of task=rehearse, which no other rank answers: `python -m moecompile.tasks.ranks.rehearse RUN_DIR LOAD RANKS`.

The model is compiled once. Each rank is a fork of this process, and at most two of them compute at a time. A rank of a
pipeline waits until the one before has told it what crosses the cut (`_Post`): shapes are values, which fake tensors do
not have.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Semaphore
from pathlib import Path

import torch
from torch import nn

from moecompile import atomic
from moecompile import plan as plans
from moecompile.compose import RESOLVED, load_resolved
from moecompile.errors import MoecompileError
from moecompile.mesh import Part
from moecompile.models.build import build_empty, example_inputs, pretrained_folder
from moecompile.models.initial import materialise
from moecompile.models.source import source_structure
from moecompile.models.stored import Stored
from moecompile.named_code import VARIABLE, from_launcher, load_plugins, named_in
from moecompile.pipeline import compile_with_report
from moecompile.plan import Plan
from moecompile.planner.given import FILE
from moecompile.rundir import output_dir
from moecompile.runtime.pipeline import Shape
from moecompile.runtime.rehearsal import Post, Rehearsal, load_of, rehearse
from moecompile.schema import Config, ModelDevice, accumulation_steps, with_workload
from moecompile.stages import Pipeline
from moecompile.torch_private import fake_group

FOLDER = "rehearsed"
"""Of the run directory: what each rank has seen."""
AT_ONCE = 2
"""Ranks that compute at a time."""
_POLL_S, _STUCK_S = 0.02, 5.0


def structure_of(config: Config) -> nn.Module:
    """The model on the meta device.

    Raises:
        ConfigError: it cannot be built there.
    """
    folder = pretrained_folder(config.model)
    if folder is not None:
        return build_empty(config.model, Stored(folder).dtype())
    return source_structure(
        dataclasses.replace(config, model=dataclasses.replace(config.model, device=ModelDevice.meta))
    )


def micro_batches(config: Config, plan: Plan) -> int:
    """Micro-batches of the rehearsed step.

    Those of a pipeline have as many in flight as the step of the config, and that again beside the gradients of the
    first one.
    """
    number, enough = accumulation_steps(config, plan.mesh), config.rehearse.micro_batches
    if plan.pipeline is not None:
        flights = (_in_flight(plan.pipeline, each) for each in range(1, number))
        most = _in_flight(plan.pipeline, number)
        enough = max(enough, 1 + next((i for i, each in enumerate(flights, 1) if each == most), number))
    return min(enough, number)


def _in_flight(pipeline: Pipeline, number: int) -> list[tuple[int, ...]]:
    return [pipeline.in_flight(place, number) for place in range(pipeline.ranks)]


def shortened(config: Config, plan: Plan) -> Config:
    """The config of the step that is rehearsed: of one step, and of no more micro-batches than that needs."""
    batch = config.data.micro_batch_size * plan.mesh.num_batches * micro_batches(config, plan)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, global_batch_size=batch),
        trainer=dataclasses.replace(config.trainer, max_steps=1, progress_bar=False),
    )


def result_of(run_dir: Path, rank: int) -> Path:
    """Where a rank writes what it has seen, or why it could not."""
    return output_dir(run_dir) / FOLDER / f"rank-{rank}.json"


def compiled_for(config: Config, plan: Plan) -> nn.Module:
    """The model of the config, compiled by the plan, which any number of ranks may be forked with."""
    model = structure_of(config)
    compiled = compile_with_report(model, config, example=example_inputs(model, config.data.seq_len), plan=plan)
    compiled.regions.clear()
    return compiled.model


def rehearsed(
    config: Config, plan: Plan, rank: int, fullest: float, run_dir: Path, *, model: nn.Module | None = None,
    beside: Sequence[int] = (), post: Post | None = None,
) -> Rehearsal:  # fmt: skip
    """Makes this process a rank of the plan's mesh and rehearses a step.

    Args:
        fullest: rows of the rank's experts over the mean. model: `compiled_for`, which the rank changes; None: it is
            made. beside, post: as for `rehearse`.
    """
    fake_group(rank, plan.mesh.world_size)
    model = compiled_for(config, plan) if model is None else model
    return rehearse(
        model, plan, shortened(config, plan), rank, load_of(plan, fullest), run_dir,
        materialize=partial(materialise, model), beside=beside, post=post,
    )  # fmt: skip


class _Post:
    """What crosses each cut, told through files.

    Args:
        slots: one of them is held by each rank that computes. first: ranks of the pipeline that is rehearsed.
    """

    def __init__(self, run_dir: Path, plan: Plan, rank: int, first: Sequence[int], slots: Semaphore) -> None:
        self.run_dir, self.pipeline, self.rank, self.first, self.slots = run_dir, plan.pipeline, rank, first, slots

    def _file(self, stage: int) -> Path:
        return output_dir(self.run_dir) / FOLDER / f"stage-{stage}.json"

    def tells(self, stage: int, shapes: list[Shape]) -> None:
        """`Witness.tells`."""
        if self.rank in self.first:
            words = [(shape, str(dtype).removeprefix("torch."), has_grad) for shape, dtype, has_grad in shapes]
            atomic.write_text(self._file(stage), json.dumps(words))

    def told(self, stage: int) -> list[Shape]:
        """`Witness.told`; other ranks compute until it is there.

        Raises:
            MoecompileError: nobody will tell it.
        """
        file = self._file(stage)
        if not file.exists():
            self.slots.release()
            self._wait(file, stage)
            self.slots.acquire()
        words = json.loads(file.read_text(encoding="utf-8"))
        return [(tuple(shape), getattr(torch, dtype), has_grad) for shape, dtype, has_grad in words]

    def _wait(self, file: Path, stage: int) -> None:
        assert self.pipeline is not None
        sender, idle = self.first[self.pipeline.rank_of(stage - 1)], 0.0
        while not file.exists():
            has_ended = result_of(self.run_dir, sender).exists()
            idle = idle + _POLL_S if self.slots.get_value() == AT_ONCE else 0.0
            if (has_ended and not file.exists()) or idle > _STUCK_S:
                why = "has ended its step" if has_ended else "waits too"
                raise MoecompileError(f"waits for what crosses the cut before stage {stage}, and rank {sender} {why}")
            time.sleep(_POLL_S)


def rehearse_all(config: Config, plan: Plan, ranks: Sequence[int], fullest: float, run_dir: Path) -> None:
    """Rehearses ranks, the first ones those of a pipeline if the plan has one; the first failure ends all."""
    model = compiled_for(config, plan)
    gc.collect()  # what the ranks do not touch stays shared
    context, first = multiprocessing.get_context("fork"), ranks[: plan.mesh.size(Part.LAYERS)]
    slots, running = context.Semaphore(AT_ONCE), dict[int, BaseProcess]()
    try:
        for rank in ranks:
            while not slots.acquire(timeout=_POLL_S):
                if _has_failed(running):
                    return
            post = _Post(run_dir, plan, rank, first, slots)
            beside = first if len(first) > 1 and rank in first else ()
            running[rank] = context.Process(
                target=_run_rank, args=(config, plan, rank, fullest, run_dir, model, beside, post), daemon=True
            )
            running[rank].start()
        while not _has_failed(running) and (alive := [each.sentinel for each in running.values() if each.is_alive()]):
            wait(alive)
    finally:
        for each in running.values():
            each.kill()
            each.join()


def _has_failed(running: dict[int, BaseProcess]) -> bool:
    return any(each.exitcode for each in running.values())


def _run_rank(
    config: Config, plan: Plan, rank: int, fullest: float, run_dir: Path, model: nn.Module, beside: Sequence[int],
    post: _Post,
) -> None:  # fmt: skip
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        seen = rehearsed(config, plan, rank, fullest, run_dir, model=model, beside=beside, post=post)
        found = dataclasses.asdict(seen)
    except MoecompileError as error:
        found = {"error": str(error)}
    except Exception:
        found = {"failure": traceback.format_exc()}
    atomic.write_text(result_of(run_dir, rank), json.dumps(found))
    post.slots.release()
    sys.stdout.flush()
    os._exit("seen" not in found)


def main(run_dir: Path, fullest: float, ranks: Sequence[int]) -> None:
    """Rehearses ranks of the config and plan in a run directory."""
    config = load_resolved(output_dir(run_dir) / RESOLVED, named=from_launcher(os.environ.get(VARIABLE)))
    load_plugins(config.plugins)
    config, _ = with_workload(config)
    plan = plans.load(output_dir(run_dir) / FILE, named=named_in(config))
    try:
        rehearse_all(config, plan, ranks, fullest, run_dir)
    except MoecompileError as error:
        atomic.write_text(result_of(run_dir, ranks[0]), json.dumps({"error": str(error)}))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and its ranks with it
    main(Path(sys.argv[1]), float(sys.argv[2]), [*map(int, sys.argv[3:])])
    sys.stdout.flush()
    os._exit(0)
