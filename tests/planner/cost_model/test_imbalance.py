"""Fullest rank over mean, of loads worked out by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.load_history import LoadHistory
from moecompile.planner.build_plan import build_plan
from moecompile.planner.cost_model.forecast import expected_load, measured, synthetic
from moecompile.planner.search.run import Search
from tests.planner.test_placement import FACTS, SITES


def test_the_load_to_expect_is_that_of_a_layer_that_may_be_uneven() -> None:
    def found(*overrides: str, ep: int | None = None) -> float:
        base = ["mesh=cpu_1x4", "experts.num_routed=8", "routing.top_k=4", "dispatch=flat", "routing.groups=4"]
        config = compose_config([*base, *overrides])
        return expected_load(build_plan(SITES, config, FACTS), config, ep).load

    even = "routing.even_groups=true"
    plain = found()
    assert plain > 1.01 and found(even) == 1
    assert found("+per_layer.a={layers: ':1', routing: {even_groups: true}}") == plain  # the second is not
    assert found("routing=expert_choice", "routing.allow_future=true", "routing.groups=1") == 1
    assert found(even, ep=8) > 1  # a group on two ranks
    assert found(even, ep=2) == 1


def test_a_search_keeps_the_load_of_each_router() -> None:
    search: Any = SimpleNamespace(loads={})

    def found(*overrides: str) -> float:
        config = compose_config(["mesh=cpu_1x4", "routing.top_k=4", "routing.groups=4", *overrides])
        return Search.load_of(search, build_plan(SITES, config, FACTS), config)(4)

    plain, even = found(), found("routing.even_groups=true")
    assert plain > 1.01 and even == 1 and found() == plain and len(search.loads) == 2


def test_a_run_by_hand(tmp_path: Path) -> None:
    history = LoadHistory()
    history.add(1, {"a": [6, 2, 2, 2], "b": [3, 3, 3, 3]})
    history.add(2, {"a": [8, 0, 0, 0], "b": [1, 1, 3, 3]})
    history.save(tmp_path / "load.npz")
    load = measured(tmp_path / "load.npz", [4, 4], 2)
    # Ranks hold two experts: 8 of 12, 6 of 12, 8 of 8, 6 of 8 -> 4/3, 1, 2, 3/2 times the mean.
    assert load.p50 == pytest.approx((4 / 3 + 3 / 2) / 2)
    assert load.p99 == pytest.approx(2, rel=0.01)
    (tmp_path / "metrics.csv").write_text("step,max_violation/a,max_violation/b\n1,0.5,0.1\n")
    assert measured(tmp_path / "metrics.csv", [4, 4], 2) == load  # beside it
    with pytest.raises(ConfigError) as error:
        measured(tmp_path / "load.npz", [8, 8], 2)
    assert "is of another model: experts per layer are 2 x 4, not 2 x 8" in str(error.value)


def test_metrics_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,max_violation/a,max_violation/b\n1,3.0,0.5,0.1\n2,2.0,,\n")
    load = measured(path, [4, 4], 2)
    assert load.p50 == pytest.approx(1.3)
    with pytest.raises(ConfigError, match="it has 2 MoE layers, the plan has 3"):
        measured(path, [4, 4, 4], 2)
    path.write_text("step,loss\n1,3.0\n")
    with pytest.raises(ConfigError, match="has no columns max_violation/LAYER"):
        measured(path, [4], 2)
    with pytest.raises(ConfigError, match="is not a file"):
        measured(tmp_path / "none.csv", [4], 2)
    (tmp_path / "bad.npz").write_text("no")
    with pytest.raises(ConfigError, match="cannot be read"):
        measured(tmp_path / "bad.npz", [4], 2)


def test_synthetic() -> None:
    assert synthetic("balanced", 64, 8, 6).p99 == synthetic("zipf", 64, 1, 6).p99 == 1
    hot = synthetic("hot", 8, 8, 2)
    # Every other token takes the hot expert: 1/2 of its rows; the others share 3/2: 3/14 each. Mean 1/4.
    assert hot.p50 == hot.p99 == pytest.approx(2)
    zipf = synthetic("zipf", 64, 8, 6)
    assert 1 < zipf.p50 < zipf.p99 <= 8
    assert synthetic("zipf", 64, 8, 6, skew=2.0).p50 > zipf.p50


def test_synthetic_loads_of_even_groups() -> None:
    for kind in ("zipf", "hot"):
        assert synthetic(kind, 16, 4, 4, groups=4).p99 == synthetic(kind, 16, 2, 8, groups=4).p99 == 1  # whole
        assert synthetic(kind, 4, 4, 4, groups=4).p99 == synthetic(kind, 8, 8, 8, groups=2).p99 == 1  # no choice
        assert synthetic(kind, 8, 2, 2, groups=2, order=(0, 4, 1, 5, 2, 6, 3, 7)).p50 > 1.01
    hot = synthetic("hot", 8, 4, 2, groups=2)
    # A group of four experts on two ranks has a row of each token: the hot expert 1/2, the others 1/6; mean of a rank 1/2.
    assert (hot.p50, hot.p99) == pytest.approx((4 / 3, 4 / 3))
    # One of each pair, each on a rank of its own: of experts as popular as 1 / (i + 1) and 1 / (j + 1), i takes
    # (j + 1) / (i + j + 2).
    rng = np.random.default_rng(7)
    ranks = [rng.permutation(8).reshape(4, 2) + 1 for _ in range(4000)]
    shares = [(pairs.max(1) / pairs.sum(1)).max() * 2 for pairs in ranks]
    assert synthetic("zipf", 8, 8, 4, groups=4).p50 == pytest.approx(float(np.median(shares)), rel=0.05)
