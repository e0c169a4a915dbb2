"""Gradients of one rank: nothing is summed, and no copies are made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moecompile.bench.measure import PeakMemory
from moecompile.runtime.gradients import WideSums, all_finite, clip_by_global_norm, sum_replicated
from tests.tiny import one_rank

MIB = 2**20


def _peak(weights: list[nn.Parameter], *, clipped: bool) -> int:
    assert dist.group.WORLD is not None
    peak = PeakMemory(torch.device("cpu"))
    peak.watch()
    peak.start()
    if clipped:
        clip_by_global_norm(weights, 1.0, dist.group.WORLD)
    else:
        sum_replicated(weights, dist.group.WORLD)
    return peak.stop()


@pytest.mark.slow
def test_one_rank_copies_nothing(tmp_path: Path) -> None:
    with one_rank(tmp_path):
        _check()


def _check() -> None:
    weights = [nn.Parameter(torch.randn(MIB // 4)) for _ in range(4)]  # 1 MiB each
    for weight in weights[:3]:
        weight.grad = torch.randn_like(weight)
    before = [weight.grad for weight in weights]
    least = _peak([], clipped=False)
    assert _peak(weights, clipped=False) - least < MIB // 8
    assert all(weight.grad is grad for weight, grad in zip(weights, before, strict=True))
    wanted = torch.stack([w.grad.double().square().sum() for w in weights[:3] if w.grad is not None]).sum().sqrt()
    assert _peak(weights, clipped=True) - least < 2.2 * MIB  # one gradient in fp64
    assert weights[3].grad is None
    got = torch.stack([w.grad.double().square().sum() for w in weights[:3] if w.grad is not None]).sum().sqrt()
    assert float(got) == pytest.approx(1.0, rel=1e-5) and float(wanted) > 1


@pytest.mark.parametrize(("entry", "finite"), [(1e30, True), (torch.inf, False), (torch.nan, False)])
def test_a_large_gradient_is_finite_and_its_square_need_not_be(entry: float, finite: bool) -> None:
    weights = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(0))]
    for weight in weights:
        weight.grad = torch.full_like(weight, entry)
    assert bool(all_finite(weights)) is finite


def test_narrow_gradients_are_summed_wide_and_rounded_once(tmp_path: Path) -> None:
    """1 and 256 times 2^-8 is 2; in bf16, each addition of 2^-8 to 1 would be lost."""
    with one_rank(tmp_path):
        mesh = init_device_mesh("cpu", (1,))
        narrow, wide = (
            nn.Parameter(distribute_tensor(torch.zeros(4, dtype=dtype), mesh, [Shard(0)]))
            for dtype in (torch.bfloat16, torch.float32)
        )
        plain, sums = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)), WideSums()
        for value in (1.0, *[2.0**-8] * 256):
            for weight in (narrow, wide, plain):
                weight.grad = torch.full_like(weight, value)
            sums.take([narrow, wide, plain])
            assert narrow.grad is None and wide.grad is not None and plain.grad is not None
        narrow.grad = torch.full_like(narrow, 0.5)
        sums.give()
        assert isinstance(narrow.grad, DTensor) and narrow.grad.to_local().tolist() == [2.5] * 4
        narrow.grad = None
        sums.give()
        assert narrow.grad is None
