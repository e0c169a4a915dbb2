"""benchmarks/placement.py: the stored figures are good and on the page, and a small run."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import forked

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"


def test_the_page_shows_the_stored_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    placement = importlib.import_module("placement")
    found = json.loads((BENCHMARKS / "results" / "placement.json").read_text(encoding="utf-8"))
    shown = (REPOSITORY / "docs" / "assets" / "placement.txt").read_text(encoding="utf-8")
    assert shown == placement.report(found) + "\n"
    assert {row["kind"] for row in found} == set(placement.KINDS)
    assert placement.holds(found)
    assert not placement.holds([{**row, "after": row["before"]} for row in found])


@pytest.mark.slow
def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    placement = importlib.import_module("placement")
    monkeypatch.setattr(placement, "KINDS", {"zipf": placement.KINDS["zipf"]})
    monkeypatch.setattr(placement, "subprocess", SimpleNamespace(run=forked.run))
    small = ["model.config.num_hidden_layers=2", "mesh=cpu_1x2", "data.seq_len=32", "data.global_batch_size=8"]
    found = placement.measure(12, tmp_path, [*small, "data.micro_batch_size=4"])
    assert len(found) == 1 and placement.holds(found)
    assert "zipf, model.layers.1.mlp" in placement.report(found)
