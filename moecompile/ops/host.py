"""Numbers that the host must know of the device: their copy is started early and waited for where they are read.

A plain copy to the host waits for everything queued on the device, and until then the host queues nothing more. Here
the copy goes to pinned memory, the host goes on queueing work, and the wait ends with the copy, not with that work.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

_started: dict[int, torch.Event] = {}
_numbers = itertools.count()


def start_read(values: Tensor) -> Tensor:
    """A CPU tensor of these values. Before its values are looked at, it must have gone through `finish_read`."""
    if values.device.type == "cpu":
        return values
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    done = torch.Event(values.device)
    done.record(torch.accelerator.current_stream(values.device))
    _started[next(_numbers)] = done
    return copy


def finish_read(copy: Tensor) -> Tensor:
    """Waits for all copies that were started: the first reader of a layer does, later ones find none."""
    for number, done in reversed(tuple(_started.items())):  # the newest first: then the others are done as well
        done.synchronize()
        _started.pop(number, None)  # only now: another thread may ask for the same copy
    return copy
