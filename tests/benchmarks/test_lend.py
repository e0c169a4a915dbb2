"""benchmarks/lend.py: the stored figures are good enough and on the page, and a small run."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"


def test_the_page_shows_the_stored_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    lend = importlib.import_module("lend")
    found = json.loads((BENCHMARKS / "results" / "lend.json").read_text(encoding="utf-8"))
    shown = (REPOSITORY / "docs" / "assets" / "lend.txt").read_text(encoding="utf-8")
    assert shown == lend.report(found) + "\n"
    assert {row["workload"] for row in found["rows"]} == set(lend.WORKLOADS)
    assert lend.holds(found, "cpu") and lend.holds(found, "wall")
    worse = json.loads(json.dumps(found))
    worse["cpu"]["hot lend"] = found["cpu"]["hot"]
    assert not lend.holds(worse, "cpu")


@pytest.mark.slow
def test_a_small_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    lend = importlib.import_module("lend")
    found = lend.measure(lend.Sizes(hidden=64, width=64, tokens=256, rounds=2), timeout_s=150)
    assert set(found["wall"]) == set(lend.LAYERS) and all(len(seconds) == 2 for seconds in found["cpu"].values())
    assert "hot lend / balanced" in lend.report({"rows": lend.rows(tokens=64), **found})
