"""benchmarks/widen.py: a small run."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_a_small_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import widen

    program: Any = widen
    monkeypatch.setattr(program, "HELD_OUT", 1)
    found = program.run(0, 2)
    assert list(found) == list(program.WAYS)
    start = found["not widened"]["start"]
    assert found["top-k scaled"]["start"] == pytest.approx(start, rel=1e-5)  # step 0 is equal
    assert found["top-k kept, noise"]["start"] != pytest.approx(start, rel=1e-5)
    assert all(each["end"] != each["start"] for each in found.values())


def test_the_page_has_the_stored_figures() -> None:
    runs = json.loads((BENCHMARKS / "results" / "widen.json").read_text())["runs"]
    page = (BENCHMARKS.parent / "docs" / "understand" / "widening.md").read_text()
    for way in runs[0]:
        start, end = (fmean(each[way][when] for each in runs) for when in ("start", "end"))
        assert f"| {way} | {start:.4f} | {end:.4f} |" in page
