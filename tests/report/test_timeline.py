"""The timeline of exchanges in flight: read from graphs, printed and written."""

from __future__ import annotations

from pathlib import Path

import pytest

from moecompile.passes.delay_gradients import DelayWeightGradients
from moecompile.passes.fuse import Fuse
from moecompile.passes.lower import Lower
from moecompile.passes.overlap import Overlap
from moecompile.passes.rewrite import Rewrite
from moecompile.report.graphs import timeline, write_graphs
from tests.passes.test_overlap import overlapped, planned
from tests.tiny import Gated, only_region, passed

TWO_CHUNKS = """\
rows 0 ->  ├────────────┤
rows 1 ->     ├──────────────────┤
rows 0 <-                     ├───────────┤
rows 1 <-                              ├─────┤
computing        shared    0        1"""

SHARED = """\
rows 0 ->  ├─────────┤
rows 0 <-                  ├──┤
computing     shared    0"""

# Weight gradients: after the last chunk's gradients are on their way back, and before any is waited for.
TWO_CHUNKS_BACK = """\
grads 1 ->  ├─────┤
grads 0 ->     ├───────────┤
grads 1 <-              ├──────────────────────────┤
grads 0 <-                       ├────────────────────┤
computing            1        0     weights shared"""

SHARED_BACK = """\
grads 0 ->  ├──┤
grads 0 <-           ├─────────────────┤
computing         0     weights shared"""


@pytest.mark.parametrize(("chunks", "lines", "back"), [(2, TWO_CHUNKS, TWO_CHUNKS_BACK), (1, SHARED, SHARED_BACK)])
def test_a_bar_for_each_exchange(chunks: int, lines: str, back: str, tmp_path: Path) -> None:
    _, region, layer = overlapped("dedup", chunks)
    assert timeline(region.graph) == lines
    collected = passed(region, layer, DelayWeightGradients())
    assert timeline(collected.graph) == f"{lines}\n\n{back}"
    fused = passed(collected, layer, Fuse()).graph
    assert timeline(fused) == f"{lines}\n\n{back}"
    write_graphs({"fused": fused}, tmp_path, "ffn")
    assert lines in (tmp_path / "ffn.fused.txt").read_text(encoding="utf-8")


def test_two_levels_are_told_apart() -> None:
    _, region, _ = overlapped("hierarchical", 2)
    names = [line.split("  ")[0] for line in timeline(region.graph).splitlines()]
    assert names[:4] == ["rows 0 -> inter", "rows 1 -> inter", "rows 0 -> intra", "rows 1 -> intra"]


def test_nothing_where_nothing_is_in_flight() -> None:
    layer = planned("dedup")
    assert timeline(passed(only_region(Gated()), layer, Rewrite(), Lower(), Overlap()).graph) == ""
