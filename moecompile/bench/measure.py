"""Measures time, memory saved for backward, and the peak of a rank's memory.

The peak is of the bytes in a rank's tensors, of a CPU too, whose allocator keeps no such figure.

On a CPU torch's profiler tells what is allocated and freed, but not that memory is freed which was allocated before it
began. So the bytes of all storages that are alive at the end anchor its sums, and it begins a step too early: what is
freed in the measured step was allocated under its eyes. On a GPU the figure is that of torch's allocator.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile


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


class PeakMemory:
    """Measures from `start` to `stop`, on one device; `watch` comes before it, by a step like the measured one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._start_ns = 0

    def watch(self) -> None:
        """Sees allocations from here on."""
        if self._device.type != "cuda":
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages of the profiler
            self._profiler.__enter__()

    def start(self) -> None:
        """The peak counts from here on."""
        self._start_ns = time.time_ns()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def stop(self) -> int:
        """Bytes of tensors at the fullest moment since `start`."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        self._profiler.__exit__(None, None, None)
        found: Any = self._profiler.profiler  # its events are not typed
        changes = sorted((e.start_ns(), e.nbytes()) for e in found.kineto_results.events() if e.name() == "[memory]")
        now = largest = 0
        for at_ns, size in changes:
            now += size
            if at_ns >= self._start_ns:
                largest = max(largest, now)
        return _alive() + max(0, largest - now)


def _alive() -> int:
    """Bytes of the storages of all tensors of floats, each once: integers between steps are the tokens of the text."""
    gc.collect()
    sizes: dict[int, int] = {}
    for thing in gc.get_objects():
        if (
            issubclass(type(thing), Tensor)
            and thing.device.type == "cpu"
            and thing.is_floating_point()
            and not _is_wrapper(thing)
        ):
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _is_wrapper(tensor: Tensor) -> bool:
    """Whether its storage is of another tensor that is found by itself: a DTensor, a fake tensor."""
    return type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
