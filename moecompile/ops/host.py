"""Numbers that the host must know of the device: their copy is started early and waited for where they are read.

A plain copy to the host waits for everything queued on the device, and until then the host queues nothing more. Here
the copy goes to pinned memory, the host goes on queueing work, and the wait ends with the copy, not with that work.
"""

from __future__ import annotations

import torch
from torch import Tensor

_started: list[torch.Event] = []


def start_read(values: Tensor) -> Tensor:
    """A CPU tensor of these values. Before its values are looked at, it must have gone through `finish_read`."""
    if values.device.type == "cpu":
        return values
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    done = torch.Event(values.device)
    done.record()
    _started.append(done)
    return copy


def finish_read(copy: Tensor) -> Tensor:
    """Waits for all copies that were started: the first reader of a layer does, later ones find none."""
    while _started:
        _started.pop().synchronize()
    return copy
