"""benchmarks/search.py: the stored ranks are of this model, and the table is of these ranks."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moecompile.planner.cost_model.forecast import step_of
from tests.counted import counted

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
CALLS = 250  # of a candidate, most of which do not fit


@pytest.fixture(scope="module")
def program() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))  # programs import each other as scripts do
    spec = importlib.util.spec_from_file_location("search_benchmark", BENCHMARKS / "search.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stored() -> Any:
    return json.loads((BENCHMARKS / "results" / "search.json").read_text())


@pytest.mark.slow
def test_the_stored_seconds_and_the_table_are_of_this_code(program: ModuleType, stored: Any) -> None:
    cases = program.cases()
    assert [row["name"] for row in stored] == list(cases)
    assert len(cases) == 8
    for row, case in zip(stored, cases.values(), strict=True):
        assert row["seconds"] == pytest.approx(sum(step_of(case).values()))
        assert row["published"] == program.text(case.layout)
    rows = [program.Ranked(**row) for row in stored]
    assert program.MARKDOWN.read_text() == program.table(rows)
    assert sum(row.holds for row in rows) >= program.WANTED


@pytest.mark.slow
def test_a_stored_rank_is_what_the_search_finds(program: ModuleType, stored: Any) -> None:
    name = "Mixtral 8x7B, 64 H100"
    ranked, calls = counted(program.ranked, name, program.cases()[name])
    row = asdict(ranked)
    expected = next(each for each in stored if each["name"] == name)
    for key in ("best", "candidates", "considered", "rank"):
        assert row[key] == expected[key]
    assert calls / row["considered"] <= CALLS
