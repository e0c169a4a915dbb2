"""benchmarks/overlap.py: a small run on a real link, and that the page shows what was stored."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from moecompile.planner.cost_model.seconds import LEAST_ROWS, PRICE

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"


def test_the_page_shows_the_stored_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    overlap = importlib.import_module("overlap")
    found = json.loads((BENCHMARKS / "results" / "overlap.json").read_text(encoding="utf-8"))
    shown = (REPOSITORY / "docs" / "assets" / "overlap.txt").read_text(encoding="utf-8")
    assert shown == overlap.report(found) + "\n"
    assert set(found["seconds"]) == {*overlap.SCHEDULES, *overlap.ALONE}
    rows = json.loads((BENCHMARKS / "results" / "rows.json").read_text(encoding="utf-8"))
    assert (REPOSITORY / "docs" / "assets" / "rows.txt").read_text(encoding="utf-8") == overlap.report(rows) + "\n"
    assert set(rows["seconds"]) == set(overlap.FORMATS)


def test_the_price_of_chunks_is_the_measured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the planner allows chunks, none of the stored figures is above its price; below, some are far above."""
    stored = json.loads((BENCHMARKS / "results" / "chunks.json").read_text(encoding="utf-8"))
    allowed = [row for row in stored if row["chunks"] > 1 and row["rows"] / row["chunks"] >= LEAST_ROWS]
    assert len(allowed) >= 5
    assert max(row["price"] for row in allowed) <= PRICE
    assert max(row["price"] for row in stored) > 2 * PRICE
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    chunks = importlib.import_module("chunks")
    rows = chunks.measure(1, sizes=((4, 32, 8),))
    assert [(row["rows"], row["chunks"]) for row in rows] == [(8, 1), (8, 2), (8, 4)]
    assert {(row["experts"], row["width"], row["rows"]) for row in stored} == set(chunks.SIZES)
    assert all(row["ratio"] > 0 for row in rows)


@pytest.mark.slow
def test_a_small_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes as without overlap, whatever the schedule; the price of two halves is not looked at here."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    overlap, nodes = (importlib.import_module(name) for name in ("overlap", "nodes"))
    if reason := nodes.why_not():
        pytest.skip(reason)
    sizes = overlap.Sizes(rate_mbit=1000, hidden=64, width=64, tokens=512, rounds=1)
    found = overlap.measure(sizes, timeout_s=150)
    for name, sent in found["sent"].items():
        beside = "no shared" if name in overlap.ALONE else "none"
        assert abs(sent / found["sent"][beside] - 1) < 0.05, (name, found["sent"])
    assert "2 " in overlap.report(found)


@pytest.mark.slow
def test_rows_in_eight_bits_on_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.758 of the bytes, and enough of the output; what is gained in time is not looked at here."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    overlap, nodes = (importlib.import_module(name) for name in ("overlap", "nodes"))
    if reason := nodes.why_not():
        pytest.skip(reason)
    sizes = overlap.Sizes(rate_mbit=1000, rows=True, hidden=256, width=128, tokens=2048, rounds=1)
    found = overlap.measure(sizes, timeout_s=150)
    for name in ("fp8", "fp8_128", "fp8 by torch"):
        assert found["sent"][name] / found["sent"]["bf16"] == pytest.approx(0.758, abs=0.02)
        assert found["decibels"][name][0] > 28 and min(found["decibels"][name]) > 24
