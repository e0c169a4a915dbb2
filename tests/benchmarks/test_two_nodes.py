"""benchmarks/two_nodes.py on a small model and a slow link: what crosses it, and that nothing is left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "two_nodes.py"


@pytest.fixture(scope="module")
def two_nodes() -> ModuleType:
    """The program, which is no module of a package."""
    sys.path.insert(0, str(PROGRAM.parent))  # for nodes.py
    spec = importlib.util.spec_from_file_location("two_nodes", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["two_nodes"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_bytes_on_the_link_are_the_predicted_ones_and_hierarchical_sends_half(two_nodes: ModuleType) -> None:
    if reason := two_nodes.why_not():
        pytest.skip(reason)
    sizes = two_nodes.Sizes(rate_mbit=200, hidden=256, sequences=8, steps=2, rounds=1)
    rows = two_nodes.summary(two_nodes.measure(sizes, timeout_s=250))
    for kind, row in rows.items():
        assert row["counted"] == pytest.approx(row["predicted"], rel=0.03), (kind, row)
    assert rows["hierarchical"]["counted"] <= 0.5 * rows["flat"]["counted"]
    assert rows["hierarchical"]["counted"] <= 1.03 * rows["dedup"]["counted"]
    assert rows["hierarchical"]["seconds"] < rows["flat"]["seconds"]
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    ours = f"{sys.modules['nodes'].PREFIX}-{os.getpid()}-"  # another test beside this one has its own
    assert not any(line.startswith(ours) for line in listed.splitlines())


def test_the_page_shows_what_is_stored() -> None:
    stored = json.loads((PROGRAM.parent / "results" / "two_nodes.json").read_text())["kinds"]
    page = (PROGRAM.parents[1] / "docs" / "understand" / "meshes.md").read_text()
    for kind, row in stored.items():
        counted, predicted = row["counted"] / 2**20, row["predicted"] / 2**20
        share = row["counted"] / stored["flat"]["counted"]
        line = f"| `{kind}` | {counted:.1f} MiB | {predicted:.1f} MiB | {counted / predicted:.3f} | {share:.2f} | {row['seconds']:.1f} s |"
        assert line in page
    assert stored["hierarchical"]["counted"] < 0.5 * stored["flat"]["counted"]
    assert stored["hierarchical"]["seconds"] < stored["flat"]["seconds"]


def test_the_table_takes_medians_and_subtracts_what_does_not_depend_on_tokens(two_nodes: ModuleType) -> None:
    def step(kind: str, sequences: int, counted: float, seconds: float) -> dict[str, float | str]:
        return {"kind": kind, "sequences": sequences, "counted": counted, "predicted": counted - 7, "planned": 5.0,
                "seconds": seconds}  # fmt: skip

    steps = [step(kind, 8, 100 + n, n) for kind in two_nodes.KINDS for n in (1, 2, 9)] + [step("flat", 1, 10, 1)]
    rows = two_nodes.summary({"sizes": {"sequences": 8}, "steps": steps})
    assert rows["dedup"] == {"counted": 92, "predicted": 92, "planned": 5.0, "seconds": 2}
