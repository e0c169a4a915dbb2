"""Tests that need a GPU: `pytest -m gpu`. Without CUDA, that skips them, and other selections leave them out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    mine = [item for item in items if item.get_closest_marker("gpu")]
    if "gpu" in config.getoption("markexpr"):
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=f"torch {torch.__version__} finds no GPU"))
    elif mine:
        config.hook.pytest_deselected(items=mine)
        items[:] = [item for item in items if item not in mine]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs of benchmarks/ import each other as scripts do."""
    monkeypatch.syspath_prepend(BENCHMARKS)
