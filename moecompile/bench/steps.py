"""Measures whole optimizer steps of a compiled model on all ranks, as `task=train` runs them, and shares of our ops.

Steps are timed from the end of one to the end of the next: data, forward, backward, reductions, optimizer. After the
timed steps, rank 0 runs two more under torch's profiler, which measures the time of each of our ops. The time of an
exchange includes waiting for other ranks.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from moecompile.bench.measure import PeakMemory, Times, medians
from moecompile.mesh import Part
from moecompile.plan import EXCHANGE_OPS, WAIT_OPS, Plan
from moecompile.runtime.data import TextData, mean_length, train_loader
from moecompile.runtime.module import LanguageModule
from moecompile.runtime.observer import StepObserver
from moecompile.runtime.strategy import ExpertParallelStrategy
from moecompile.runtime.training import make_trainer
from moecompile.schema import Config

PROFILED_STEPS, MEMORY_STEPS = 2, 2
_OURS = "moecompile::"
_EXCHANGES = EXCHANGE_OPS | WAIT_OPS | {"read_tables", "wire_cast", "wire_uncast"}
_EXPERTS = ("expert_ffn", "grouped_mm", "expert_bias", "sum_experts")  # prefixes, for their backward ops too


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The cost of an optimizer step. step: of rank 0; its CPU time is the mean over ranks. tokens: of the global batch.

    exchanges, experts, rows: fraction of the profiled steps that rank 0 spends in exchanges, in the experts'
    computation, and in our other ops (top-k, sorting, packing and summing rows, counting). peak_bytes: of the tensors
    of the fullest rank, in one more step (peak.py); planned_bytes: what the plan says of it.
    """

    world_size: int
    tokens: int
    step: Times
    exchanges: float
    experts: float
    rows: float
    peak_bytes: int
    planned_bytes: int | None

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks."""
        return 1e3 * self.tokens / self.step.wall_ms


def measure_steps(
    model: nn.Module,
    plan: Plan,
    config: Config,
    data: TextData,
    run_dir: Path,
    materialize: Callable[[torch.device], None] | None = None,
) -> StepCost:
    """Trains `bench.warmup` steps, `bench.rounds` timed ones and two profiled ones; all ranks call it.

    Args:
        model, plan, data, materialize: as for `runtime.training.train`. run_dir: where Lightning's loggers write.
    """
    mesh, rank = plan.mesh, dist.get_rank()
    num_steps = config.bench.warmup + config.bench.rounds + PROFILED_STEPS + MEMORY_STEPS
    config = copy.deepcopy(config)
    config.trainer = dataclasses.replace(
        config.trainer, max_steps=num_steps, progress_bar=False, resume=None, loggers=[]
    )
    loader = train_loader(
        data.train,
        config.data,
        seed=config.seed,
        rank=mesh.batch_index(rank),
        world_size=mesh.num_batches,
        num_steps=num_steps,
        multiple=mesh.size(Part.SEQUENCE),
    )
    clock = _Clock(config.bench.warmup, config.bench.rounds)
    trainer = make_trainer(config, plan, run_dir, [clock], materialize=materialize)
    trainer.fit(LanguageModule(model, config.optimizer, num_steps), loader)
    step = medians(clock.measured)
    found: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(found, (step.cpu_ms, clock.peak_bytes))
    cpu_ms, peaks = zip(*found, strict=True)
    return StepCost(
        world_size=mesh.world_size,
        tokens=round(config.data.global_batch_size * mean_length(data.train, config.data.seq_len)),
        step=dataclasses.replace(step, cpu_ms=sum(cpu_ms) / len(cpu_ms)),
        **clock.shares,
        peak_bytes=max(peaks),
        planned_bytes=plan.estimate.memory_bytes_per_rank.total if plan.estimate else None,
    )


class _Clock(StepObserver):
    """Times some steps, then profiles some, then measures the memory of one."""

    def __init__(self, warmup: int, rounds: int) -> None:
        self.warmup, self.rounds = warmup, rounds
        self.measured: list[Times] = []
        self.shares = {"exchanges": 0.0, "experts": 0.0, "rows": 0.0}
        self._steps_done = 0
        self._last = (0.0, 0.0)
        self.peak_bytes = 0
        self._profiler: profile | None = None
        self._memory: PeakMemory | None = None

    def step_ended(self, module: LanguageModule, strategy: ExpertParallelStrategy) -> None:
        """Records the time of the step; the profiler runs from the last timed step to the last step."""
        self._steps_done += 1
        on_gpu = strategy.root_device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(strategy.root_device)
        now, cpu = time.perf_counter(), time.process_time()
        wall_ms, cpu_ms = 1e3 * (now - self._last[0]), 1e3 * (cpu - self._last[1])
        timed = self._steps_done - self.warmup
        if 0 < timed <= self.rounds:
            self.measured.append(Times(cpu_ms=cpu_ms, wall_ms=wall_ms))
        if dist.get_rank() == 0 and timed == self.rounds:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages of the profiler
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
            self._profiler = profile(activities=activities)
            self._profiler.__enter__()
            self._began = time.perf_counter()
        if self._profiler is not None and timed == self.rounds + PROFILED_STEPS:
            microseconds = 1e6 * (now - self._began)
            self._profiler.__exit__(None, None, None)
            self.shares = _shares(self._profiler.events() or (), microseconds, on_gpu=on_gpu)
            self._profiler = None
        if timed == self.rounds + PROFILED_STEPS:
            self._memory = PeakMemory(strategy.root_device)
            self._memory.watch()
        elif self._memory is not None and timed < self.rounds + PROFILED_STEPS + MEMORY_STEPS:
            self._memory.start()
        elif self._memory is not None:
            self.peak_bytes = self._memory.stop()
        self._last = (time.perf_counter(), time.process_time())


def _shares(events: Iterable[Any], microseconds: float, *, on_gpu: bool) -> dict[str, float]:
    """Time of our outermost ops by kind, as a fraction of the time of the steps."""
    spent = {"exchanges": 0.0, "experts": 0.0, "rows": 0.0}
    for event in events:
        if event.name.startswith(_OURS) and not _is_inside(event):
            spent[_kind(event.name.removeprefix(_OURS))] += event.device_time_total if on_gpu else event.cpu_time_total
    return {kind: time / microseconds for kind, time in spent.items()}


def _is_inside(event: Any) -> bool:
    """Whether one of our ops, or the autograd wrapper of the same op, called it."""
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith(_OURS):
            return True
        parent = parent.cpu_parent
    return False


def _kind(name: str) -> str:
    if name in _EXCHANGES:
        return "exchanges"
    return "experts" if name.startswith(_EXPERTS) else "rows"
