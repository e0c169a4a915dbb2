"""What a run writes of its load, from counts written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moecompile.load_history import LoadHistory
from moecompile.nn import LayerLoad
from moecompile.runtime.metrics import Metrics, of_layer


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


def test_a_run_that_fails_leaves_its_history(tmp_path: Path) -> None:
    nobody: Any = None
    metrics = Metrics(1, 9, history_path=tmp_path / "load.npz")
    metrics.history.add(1, {"a": [3, 4]})  # as read from a checkpoint's run
    metrics.on_exception(nobody, nobody, RuntimeError())
    assert not list(tmp_path.iterdir())  # it failed before the first row
    metrics.rows = 1
    metrics.on_exception(nobody, nobody, RuntimeError())
    assert LoadHistory.read(tmp_path / "load.npz").steps == [1]
