"""Kept bytes against what can be counted by hand; medians."""

from __future__ import annotations

import torch
from torch import nn

from moecompile.bench import Times, kept_bytes
from moecompile.bench.measure import medians, timed


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
