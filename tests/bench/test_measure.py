"""Kept bytes against what can be counted by hand; medians. The fullest moment of allocations that can be counted by hand."""

from __future__ import annotations

import torch
from torch import nn

from moecompile.bench import Times, kept_bytes
from moecompile.bench.measure import PeakMemory, medians, timed


def test_kept_storages_count_once_and_weights_do_not() -> None:
    linear, x = nn.Linear(4, 6, bias=False), torch.randn(10, 4, requires_grad=True)
    weights = list(linear.parameters())
    assert kept_bytes(lambda: linear(x), weights) == x.nbytes
    assert kept_bytes(lambda: linear(x), []) == x.nbytes + linear.weight.nbytes

    def gated() -> torch.Tensor:
        gate, up = linear(x).chunk(2, 1)  # two views of one storage, which the product keeps
        return gate * up

    assert kept_bytes(gated, weights) == x.nbytes + 10 * 6 * 4
    with torch.no_grad():
        assert kept_bytes(gated, weights) == 0


def test_times_are_of_the_run_and_medians_of_each() -> None:
    x = torch.randn(400, 400)
    found = timed(lambda: [x @ x for _ in range(20)], torch.device("cpu"))
    assert found.cpu_ms > 0 and found.wall_ms > 0 and found.device_ms is None
    assert found.decisive_ms == found.cpu_ms
    rows = [Times(cpu_ms=c, wall_ms=w, device_ms=d) for c, w, d in ((1, 9, 5), (2, 8, 4), (30, 7, 6))]
    assert medians(rows) == Times(cpu_ms=2, wall_ms=8, device_ms=5)
    assert medians(rows).decisive_ms == 5


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
