"""The fullest moment of allocations that can be counted by hand."""

from __future__ import annotations

import torch
from torch import nn

from moecompile.bench.measure import PeakMemory

MIB = 2**20


def _mib(number: int) -> torch.Tensor:
    return torch.zeros(number * MIB // 4)


def test_the_fullest_moment_counts() -> None:
    before = [nn.Parameter(_mib(5)), _mib(3)]
    views = [before[1][:10], before[1].view(-1, 4)]  # no more bytes
    peak, empty = PeakMemory(torch.device("cpu")), PeakMemory(torch.device("cpu"))
    empty.watch()
    empty.start()
    nothing = empty.stop()
    assert nothing >= 8 * MIB
    peak.watch()
    first = _mib(9)  # before the measured part
    del first
    before.pop()  # three that the profiler does not see freed
    views.clear()
    peak.start()
    second = [_mib(4), _mib(3)]
    second.pop()
    assert peak.stop() == nothing - 3 * MIB + 7 * MIB
