"""The correction-bias rule, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moecompile.nn import LayerLoad, Router, routers_of, update_balance
from tests.models import one_rank, tokens


def model(*loads: list[int]) -> nn.Module:
    """One router per list, with that load; paths are `0`, `1` ..."""
    routers = nn.Sequential(*(Router(8, len(load), top_k=1) for load in loads))
    for router, load in zip(routers, loads, strict=True):
        nn.init.normal_(router.weight)
        router.load.copy_(torch.tensor(load))
    return routers


def test_bias_moves_towards_the_mean_by_its_sign() -> None:
    routers = model([6, 2, 4, 4])
    update_balance(routers, {"0": 0.5})
    assert routers[0].correction_bias.tolist() == [-0.5, 0.5, 0.0, 0.0]  # mean 4: too full, too empty, just right
    routers[0].load.copy_(torch.tensor([10, 0, 0, 0]))
    update_balance(routers, {"0": 0.25})
    assert routers[0].correction_bias.tolist() == [-0.75, 0.75, 0.25, 0.25]


def test_a_router_without_a_rate_keeps_its_bias() -> None:
    routers = model([5, 1], [5, 1], [5, 1])
    loads = update_balance(routers, {"0": 0.5, "1": 0.0})
    assert [router.correction_bias.tolist() for router in routers] == [[-0.5, 0.5], [0, 0], [0, 0]]
    assert [load.name for load in loads] == ["0", "1", "2"]


def test_counters_start_again_and_the_loads_are_returned() -> None:
    routers = model([5, 1], [0, 3, 3])
    loads = update_balance(routers, {})
    assert [load.load.tolist() for load in loads] == [[5, 1], [0, 3, 3]]
    assert all(router.load.sum() == 0 for router in routers)
    assert [load.load.sum().item() for load in update_balance(routers, {})] == [0, 0]


def test_accumulated_micro_batches_count_as_one_step() -> None:
    routers = model([0, 0, 0])
    for seed in range(3):
        routers[0](tokens(seed=seed))
    (load,) = update_balance(routers, {"0": 1.0})
    assert load.load.sum() == 18
    assert routers[0].correction_bias.tolist() == (6 - load.load).sign().tolist()


def test_counts_are_summed_over_a_group(tmp_path: Path) -> None:
    with one_rank(tmp_path):
        (load,) = update_balance(model([3, 1]), {}, dist.group.WORLD)
    assert load.load.tolist() == [3, 1]


@pytest.mark.parametrize(("load", "violation"), [([4, 4], 0.0), ([8, 0], 1.0), ([6, 2, 4, 4], 0.5), ([0, 0], 0.0)])
def test_max_violation(load: list[int], violation: float) -> None:
    assert LayerLoad(name="x", load=torch.tensor(load)).max_violation == pytest.approx(violation)


def test_a_model_without_routers() -> None:
    assert update_balance(nn.Linear(2, 2), {"x": 1.0}) == []


def test_routers_are_named_by_their_path() -> None:
    parent = nn.ModuleDict({"layer": model([1, 1]), "other": nn.Linear(2, 2)})
    assert [name for name, _ in routers_of(parent)] == ["layer.0"]


def test_the_rule_balances_a_skewed_router() -> None:
    """Constant tokens that all prefer two experts: after some steps all are used about equally."""
    router = Router(8, 4, top_k=2, score="sigmoid")
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    router.correction_bias.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    routers, violations = nn.Sequential(router), []
    for step in range(200):
        router(tokens(64, seed=step))
        violations += [load.max_violation for load in update_balance(routers, {"0": 0.02})]
    assert violations[0] == pytest.approx(1.0, abs=0.05)
    assert sum(violations[-20:]) / 20 < 0.25
