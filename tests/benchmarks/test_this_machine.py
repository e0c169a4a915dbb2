"""benchmarks/this_machine.py: the stored figures are good enough and on the page, and worse ones would be seen."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def test_the_page_shows_the_stored_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    this_machine = importlib.import_module("this_machine")
    found = json.loads(this_machine.RESULTS.read_text(encoding="utf-8"))
    assert this_machine.TABLE.read_text(encoding="utf-8") == this_machine.report(found)
    assert len(found["steps"]) == 2 * len(this_machine.MESHES) and this_machine.holds(found)
    worse = json.loads(json.dumps(found))
    worse["steps"][-1]["predicted"] = 1.3 * worse["steps"][-1]["measured"]
    assert not this_machine.holds(worse)
    slower = json.loads(json.dumps(found))
    (kind,) = found["chosen"]
    slower["wall"][kind] = [2 * wall for wall in found["wall"][kind]]
    assert not this_machine.holds(slower)
