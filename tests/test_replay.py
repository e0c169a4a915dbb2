"""What every config is planned and compiled to is what it was; what changes says so in the golden file's diff."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import replay


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what transformers says of tiny models
def test_plans_and_graphs_are_what_they_were(bless: Callable[[str, str], None]) -> None:
    """`python tests/replay.py --against REV` shows the lines that differ."""
    text = replay.table()
    assert len(text.splitlines()) > 60
    bless("replay.txt", text)


def test_a_difference_is_shown_by_its_lines(tmp_path: Path) -> None:
    for name, plan in (("before", "mesh: 2\nep: 2\n"), ("after", "mesh: 2\nep: 1\n")):
        (tmp_path / name / "case").mkdir(parents=True)
        (tmp_path / name / "case" / "plan.yaml").write_text(plan)
        (tmp_path / name / "case" / "graphs.txt").write_text("%0 = placeholder x\n")
    shown = replay.difference(tmp_path / "before", tmp_path / "after").splitlines()
    assert [line for line in shown if line[0] in "+-"] == [
        "--- before/case/plan.yaml", "+++ after/case/plan.yaml", "-ep: 2", "+ep: 1",
    ]  # fmt: skip
    assert replay.difference(tmp_path / "after", tmp_path / "after") == ""
