"""Reads numbers from the device: starts the copy to the host early and waits for it only where they are read.

A plain copy to the host waits for all queued work of the device, and the host queues nothing meanwhile. Here the copy
goes to pinned memory, the host keeps queueing work, and the wait ends with the copy, not with that work.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

_started: dict[int, torch.Event] = {}
_numbers = itertools.count()


def start_read(values: Tensor) -> Tensor:
    """Starts the copy and returns the CPU tensor. Call `finish_read` before reading its values."""
    if values.device.type == "cpu":
        return values
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    done = torch.Event(values.device)
    done.record(torch.accelerator.current_stream(values.device))
    _started[next(_numbers)] = done
    return copy


def finish_read(copy: Tensor) -> Tensor:
    """Waits for all started copies. Only the first reader of a layer has to wait."""
    for number, done in reversed(tuple(_started.items())):  # the newest first: the others are done before it
        done.synchronize()
        _started.pop(number, None)  # only now: another thread may wait for the same copy
    return copy
