"""Peak of the bytes in a rank's tensors, of a CPU too, whose allocator keeps no such figure.

On a CPU torch's profiler tells what is allocated and freed, but not that memory is freed which was allocated before it
began. So the bytes of all storages that are alive at the end anchor its sums, and it begins a step too early: what is
freed in the measured step was allocated under its eyes. On a GPU the figure is that of torch's allocator.
"""

from __future__ import annotations

import gc
import os
import time
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


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
