"""benchmarks/scale.py: a small point, what it concludes, and what the page says of the stored results."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scale

    return scale


def rows(scale: Any, of_ranks: float, groups: float = 0) -> dict[str, list[dict[str, Any]]]:
    """What a program would have shown whose seconds grow so with the ranks, and linearly with layers."""
    return {
        axis: [
            {**asdict(s), "seconds": dict.fromkeys(scale.STEPS, s.ranks**of_ranks * s.layers),
             "mib": dict.fromkeys(scale.STEPS, 1.0), "groups": round(3 * s.ranks**groups), "entries": 47 * s.layers,
             "sent_bytes": 1, "index_bytes": s.ranks * s.layers}
            for s in sizes
        ]
        for axis, sizes in scale.AXES.items()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("of_ranks", "groups", "missed"),
    [
        (0.1, 0, set()),
        (0.5, 0, {"plan", "compile", "start", "save"}),
        (0.1, 0.5, {"groups"}),
    ],
)
def test_what_grows_faster_than_it_must_is_told(scale: Any, of_ranks: float, groups: float, missed: set[str]) -> None:
    found = scale.findings(rows(scale, of_ranks, groups))
    assert {each["figure"] for each in found if not each["holds"]} == missed
    exponents = {(each["axis"], each["figure"]): each["exponent"] for each in found}
    assert exponents["layers", "start"] == pytest.approx(1) and exponents["ranks", "save"] == pytest.approx(of_ranks)
    assert ("ranks", "start MiB") not in exponents  # too small to say


@pytest.mark.slow
def test_a_rank_is_measured(scale: Any) -> None:
    """With the places of the other ranks, whose parts cover each entry once, or DCP would refuse the index."""
    row = scale.in_a_process(scale.Size(ranks=16, layers=1, experts=16))
    assert set(row["seconds"]) == set(scale.STEPS) and all(value > 0 for value in row["seconds"].values())
    assert row["groups"] == 3 and row["member_of"] == 4
    assert row["entries"] < row["chunks"] <= 16 * row["entries"]


def test_the_stored_results_hold_and_are_those_of_the_page(scale: Any) -> None:
    stored = json.loads(scale.RESULTS.read_text())
    assert {axis: [row[axis] for row in found] for axis, found in stored["rows"].items()} == {
        axis: [getattr(size, axis) for size in sizes] for axis, sizes in scale.AXES.items()
    }
    assert stored["findings"] == scale.findings(stored["rows"])
    assert all(each["holds"] for each in stored["findings"])
    assert scale.MARKDOWN.read_text() == scale.tables(stored["rows"])
    assert scale.PICTURE.is_file()
