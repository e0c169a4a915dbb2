"""Measures time, and memory saved for backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True, kw_only=True)
class Times:
    """Milliseconds. cpu_ms: of this process, all threads. device_ms: on a GPU, from CUDA events; None on a CPU."""

    cpu_ms: float
    wall_ms: float
    device_ms: float | None = None

    @property
    def decisive_ms(self) -> float:
        """The time by which layers are compared: GPU time, or on a CPU, which may be shared, CPU time."""
        return self.cpu_ms if self.device_ms is None else self.device_ms


def timed(run: Callable[[], object], device: torch.device) -> Times:
    """Times one call of `run`; on a GPU until all of its kernels are done."""
    if device.type != "cuda":
        cpu, wall = time.process_time(), time.perf_counter()
        run()
        return Times(cpu_ms=1e3 * (time.process_time() - cpu), wall_ms=1e3 * (time.perf_counter() - wall))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    events[0].record()
    run()
    events[1].record()
    torch.cuda.synchronize(device)
    seconds = time.process_time() - cpu, time.perf_counter() - wall
    return Times(cpu_ms=1e3 * seconds[0], wall_ms=1e3 * seconds[1], device_ms=events[0].elapsed_time(events[1]))


def medians(measured: Sequence[Times]) -> Times:
    """The median of each kind of time."""

    def median(values: list[float]) -> float:
        return float(statistics.median(values))

    device = [times.device_ms for times in measured if times.device_ms is not None]
    return Times(
        cpu_ms=median([times.cpu_ms for times in measured]),
        wall_ms=median([times.wall_ms for times in measured]),
        device_ms=median(device) if device else None,
    )


def kept_bytes(run: Callable[[], Any], weights: Iterable[Tensor]) -> int:
    """Bytes that the forward `run` saves for backward, including its input.

    A storage is counted once and completely, for any number of saved views; storages of `weights` are not counted.
    """
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()  # kept until all are counted, or their memory would be reused
    del kept
    return sum(sizes.values())
