"""Listings, summaries and pictures of small graphs."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moecompile import ops  # noqa: F401  (registers the ops)
from moecompile.passes.types import SHOWN
from moecompile.report.graphs import (
    Box,
    Picture,
    Role,
    draw,
    graph_summary,
    listing,
    picture,
    write_before_after,
    write_graphs,
)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x)) * self.scale


class Router(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def extra_repr(self) -> str:
        return "top-2"


class Experts(nn.Module):
    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        return rows


def lowered() -> fx.GraphModule:
    """x -> router -> permute -> counts, all_to_all -> experts -> all_to_all -> unpermute, on an unbound axis."""
    root = nn.Module()
    root.router, root.experts = Router(), Experts()
    graph, op = fx.Graph(), torch.ops.moecompile
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(32, 8)
    routed = graph.call_module("router", (x,))
    weights, ids = (graph.call_function(operator.getitem, (routed, i)) for i in range(2))
    permuted = graph.call_function(op.permute, (x, ids, 4))
    rows, order, counts = (graph.call_function(operator.getitem, (permuted, i)) for i in range(3))
    exchanged = graph.call_function(op.exchange_counts, (counts, "ep"))
    table = graph.call_function(operator.getitem, (exchanged, 1))
    there = graph.call_function(op.all_to_all, (rows, table, -1, False, "ep"))
    back = graph.call_function(op.all_to_all, (graph.call_module("experts", (there, counts)), table, -1, True, "ep"))
    graph.output(graph.call_function(op.unpermute.default, (back, order, weights)))
    return fx.GraphModule(root, graph)


SUMMARY = """\
%0 = placeholder x
%1 = router[Router](%0)
%2 = getitem(%1, 0)
%3 = getitem(%1, 1)
%4 = moecompile.permute(%0, %3, 4)
%5 = getitem(%4, 0)
%6 = getitem(%4, 1)
%7 = getitem(%4, 2)
%8 = moecompile.exchange_counts(%7, 'ep')
%9 = getitem(%8, 1)
%10 = moecompile.all_to_all(%5, %9, -1, False, 'ep')
%11 = experts[Experts](%10, %7)
%12 = moecompile.all_to_all(%11, %9, -1, True, 'ep')
%13 = moecompile.unpermute(%12, %6, %2)
output(%13)
"""


def test_summary_is_op_by_op() -> None:
    assert graph_summary(lowered()) == SUMMARY


def test_summary_does_not_depend_on_node_names() -> None:
    graph_module = lowered()
    for i, node in enumerate(graph_module.graph.nodes):
        node.name = f"renamed_{i}"
    assert graph_summary(graph_module) == SUMMARY


def test_arguments_of_every_kind_are_written_out() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    part = graph.call_function(operator.getitem, (x, (slice(None, 2), None)))
    joined = graph.call_function(torch.cat, ([part, x],), {"dim": 0})
    graph.output((graph.call_method("to", (joined, torch.bfloat16)),))
    assert graph_summary(fx.GraphModule(nn.Module(), graph)).splitlines()[1:] == [
        "%1 = getitem(%0, (:2:, None))",
        "%2 = cat([%1, %0], dim=0)",
        "%3 = to(%2, bf16)",
        "output((%3,))",
    ]


def test_listing_shows_shapes_where_they_are_known() -> None:
    lines = listing(lowered()).splitlines()
    assert lines[0].split("=", 1)[1].split() == ["placeholder", "x", "#", "f32[32,", "8]"]
    assert all("#" not in line for line in lines[1:])


def test_listing_shows_types_where_they_are_checked() -> None:
    graph_module = lowered()
    next(iter(graph_module.graph.find_nodes(op="placeholder"))).meta[SHOWN] = "values at its token"
    assert listing(graph_module).splitlines()[0].endswith("# f32[32, 8]; values at its token")


def test_picture_joins_users_to_producers() -> None:
    drawn = picture(lowered(), "lowered")
    names = [box.label for box in drawn.boxes]
    assert names == [
        "x", "router", "permute", "exchange_counts", "all_to_all", "experts", "all_to_all", "unpermute", "output",
    ]  # fmt: skip
    assert {(names[a], names[b]) for a, b in drawn.edges} >= {
        ("router", "unpermute"), ("permute", "experts"), ("exchange_counts", "all_to_all"), ("unpermute", "output"),
    }  # fmt: skip
    roles = {box.label: box.role for box in drawn.boxes}
    assert roles["exchange_counts"] is roles["all_to_all"] is Role.EXCHANGE
    assert roles["router"] is roles["experts"] is Role.EXPERTS
    assert roles["permute"] is roles["unpermute"] is Role.ROWS
    assert [box.detail for box in drawn.boxes[:2]] == ["f32[32, 8]", "top-2"]


def test_weights_are_left_out_of_pictures() -> None:
    drawn = picture(fx.symbolic_trace(Dense()), "dense")
    assert [box.label for box in drawn.boxes] == ["x", "gate", "silu", "up", "mul", "down", "mul", "output"]
    assert {box.role for box in drawn.boxes} == {Role.BOUNDARY, Role.COMPUTE}


def test_files_of_every_stage(tmp_path: Path) -> None:
    dense = fx.symbolic_trace(Dense())
    write_graphs({"captured": dense, "lowered": lowered()}, tmp_path / "graphs", "model.layers.0.mlp")
    assert sorted(path.name for path in (tmp_path / "graphs").iterdir()) == [
        f"model.layers.0.mlp.{stage}.{suffix}" for stage in ("captured", "lowered") for suffix in ("svg", "txt")
    ]
    text = (tmp_path / "graphs" / "model.layers.0.mlp.lowered.txt").read_text()
    assert text.startswith("# model.layers.0.mlp, lowered: 15 nodes, 3 exchanges\n")
    assert "def forward(self, x):" in text
    svg = (tmp_path / "graphs" / "model.layers.0.mlp.lowered.svg").read_text()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert svg.count(Role.EXCHANGE.value[1]) == 3 + 1  # boxes and legend
    assert "date" not in svg.lower()


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_before_and_after_in_one_picture(tmp_path: Path, suffix: str) -> None:
    write_before_after(fx.symbolic_trace(Dense()), lowered(), tmp_path / f"both{suffix}")
    assert (tmp_path / f"both{suffix}").stat().st_size > 10_000


def test_parts_that_do_not_hang_together_stand_side_by_side(tmp_path: Path) -> None:
    boxes = tuple(Box(label=name, detail="", role=Role.COMPUTE) for name in "abcd")
    draw([Picture(title="two parts", boxes=boxes, edges=((0, 2), (1, 3)))], tmp_path / "parts.svg")
    assert (tmp_path / "parts.svg").exists()


@pytest.mark.slow
def test_the_same_graph_gives_the_same_bytes(tmp_path: Path) -> None:
    """In other processes, with other addresses and hashes."""
    code = (
        "import sys; from pathlib import Path; from tests.report.test_graphs import lowered; "
        "from moecompile.report.graphs import write_graphs; "
        "write_graphs({'lowered': lowered()}, Path(sys.argv[1]), 'mlp')"
    )
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], check=True, env=env)
    first, second = ((tmp_path / seed / "mlp.lowered.svg").read_bytes() for seed in ("1", "2"))
    assert first == second
