"""tests/minutes.py: sums of what pytest reports, and a page that is renewed in place."""

from __future__ import annotations

from pathlib import Path

from tests import minutes

CASE = '<testcase classname="tests.{name}" name="test_{i}" time="{time}" />'


def test_tables_are_sums_of_the_reports(tmp_path: Path) -> None:
    (tmp_path / "steps").write_text("lint 90\nslow 600\n")
    cases = [("nn.test_router", 60), ("nn.test_router", 30), ("test_docs", 240)]
    text = "".join(CASE.format(name=name, i=i, time=time) for i, (name, time) in enumerate(cases))
    (tmp_path / "slow.xml").write_text(f"<testsuites><testsuite>{text}</testsuite></testsuites>")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{minutes.BEGIN}\nold\n{minutes.END}\nafter\n")
    for _ in range(2):
        assert minutes.main([str(tmp_path), "--write", str(page)]) == 0
    assert page.read_text().splitlines() == [
        "before", minutes.BEGIN,
        "| step of `.ci/run` | minutes |", "|---|---|", "| lint | 1.5 |", "| slow | 10.0 |", "| all (ended at 90) | 11.5 |",
        "", "| dearest files | minutes of a worker | tests |", "|---|---|---|",
        "| `tests/test_docs.py` | 4.0 | 1 |", "| `tests/nn/test_router.py` | 1.5 | 2 |",
        minutes.END, "after",
    ]  # fmt: skip
