"""What a run reports of its load, from counts written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moecompile.nn import LayerLoad
from moecompile.runtime.callbacks import Metrics, of_layer, over_layers
from moecompile.runtime.history import LoadHistory


def layer(name: str, load: list[int], *, dropped: int = 0, entropy: float | None = 1.0) -> LayerLoad:
    """8 tokens on two nodes: 5 reach the first one, 7 the second."""
    return LayerLoad(
        name=name, load=torch.tensor(load), tokens=8, dropped=dropped, entropy=entropy, node_tokens=torch.tensor([5, 7])
    )


def test_the_columns_of_a_layer() -> None:
    assert of_layer(layer("a.router", [6, 2, 4, 4], dropped=4, entropy=0.5)) == {
        "max_violation/a.router": 0.5, "drop_rate/a.router": 0.25, "entropy/a.router": 0.5,
        "nodes_per_token/a.router": 1.5, "load/a.router/0": 6, "load/a.router/1": 2, "load/a.router/2": 4,
        "load/a.router/3": 4, "node_tokens/a.router/0": 5, "node_tokens/a.router/1": 7,
    }  # fmt: skip


def test_expert_numbers_sort_as_text_and_an_unknown_entropy_has_no_column() -> None:
    columns = of_layer(layer("a", list(range(12)), entropy=None))
    assert [name for name in sorted(columns) if name.startswith("load")] == [f"load/a/{i:02d}" for i in range(12)]
    assert "entropy/a" not in columns


def test_a_step_over_layers() -> None:
    """MaxVio 0.5 and 0, drops 4 of 16 and none; only the second layer knows its entropy."""
    step = over_layers([layer("a", [6, 2, 4, 4], dropped=4, entropy=None), layer("b", [4, 4, 4, 4], entropy=0.25)])
    assert step == {"max_violation": 0.25, "entropy": 0.25, "nodes_per_token": 1.5, "drop_rate": 0.125}
    assert "entropy" not in over_layers([layer("a", [1, 1], entropy=None)])


@pytest.mark.parametrize(("num_steps", "mean"), [(1, 0.0), (10, 9.0), (11, 9.5), (30, 28.0)])
def test_the_last_tenth_is_at_least_one_step(num_steps: int, mean: float) -> None:
    metrics = Metrics(1, num_steps)
    metrics._steps = [{"drop_rate": float(step)} for step in range(num_steps)]
    assert metrics.mean_of_last("drop_rate") == mean
    assert metrics.mean_of_last("entropy") is None
    assert Metrics(1, 1).mean_of_last("drop_rate") is None


def test_a_run_that_fails_leaves_its_history(tmp_path: Path) -> None:
    nobody: Any = None
    metrics = Metrics(1, 9, history_path=tmp_path / "load.npz")
    metrics.on_exception(nobody, nobody, RuntimeError())
    assert not list(tmp_path.iterdir())  # it failed before the first row
    metrics.history.add(1, {"a": [3, 4]})
    metrics.on_exception(nobody, nobody, RuntimeError())
    assert LoadHistory.read(tmp_path / "load.npz").steps == [1]
