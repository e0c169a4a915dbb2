"""The two-level dispatches in the program's own notation, and how their axes are bound."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import fx

from moecompile.errors import PassError, PlanError
from moecompile.mesh import MeshSpec
from moecompile.passes.base import exchanges_of
from moecompile.passes.shard import bind_axes
from tests.distributed import dispatch_job as job
from tests.distributed.dispatch_job import Case
from tests.tiny import one_rank, text

TWO_BY_TWO = MeshSpec(num_nodes=2, ranks_per_node=2, ep=4)
ONE_BY_TWO = MeshSpec(ranks_per_node=2, ep=2)


def case(kind: str, mesh: MeshSpec = TWO_BY_TWO, wire_dtype: str = "auto") -> Case:
    return Case(kind=kind, mesh=mesh, experts_per_rank=2, top_k=2, tokens=(1,) * 4, wire_dtype=wire_dtype)


INPUTS = """\
%0 = placeholder x
%1 = placeholder ids
%2 = placeholder weights
"""

HIERARCHICAL = f"""\
{INPUTS}%3 = moecompile.count_hops(%1, 8, 2, 2)
%4 = getitem(%3, 0)
%5 = getitem(%3, 1)
%6 = moecompile.send_counts(%5, 'ep_inter')
%7 = moecompile.onward_counts(%6)
%8 = moecompile.send_counts(%7, 'ep_intra')
%9 = moecompile.read_tables(%5, %6, %7, %8)
%10 = getitem(%9, 0)
%11 = getitem(%9, 1)
%12 = moecompile.pack_rows(%0, %2, %4, 8, 2, %10)
%13 = getitem(%12, 0)
%14 = getitem(%12, 1)
%15 = getitem(%12, 2)
%16 = getitem(%12, 3)
%17 = moecompile.all_to_all(%13, %10, 0, False, 'ep_inter')
%18 = moecompile.exchange_assignments(%15, %16, %10, 1, 'ep_inter')
%19 = getitem(%18, 0)
%20 = getitem(%18, 1)
%21 = moecompile.pack_rows(%17, %19, %20, 4, 2, %11)
%22 = getitem(%21, 0)
%23 = getitem(%21, 1)
%24 = getitem(%21, 2)
%25 = getitem(%21, 3)
%26 = moecompile.all_to_all(%22, %11, 0, False, 'ep_intra')
%27 = moecompile.exchange_assignments(%24, %25, %11, 1, 'ep_intra')
%28 = getitem(%27, 0)
%29 = getitem(%27, 1)
%30 = moecompile.expand_rows(%26, %28, %29, 2)
%31 = getitem(%30, 0)
%32 = getitem(%30, 1)
%33 = getitem(%30, 2)
%34 = getitem(%30, 4)
%35 = experts[Experts](%31, %34)
%36 = moecompile.reduce_rows(%35, %32, %33, %26)
%37 = moecompile.all_to_all(%36, %11, 0, True, 'ep_intra')
%38 = moecompile.combine_rows(%37, %23, %17)
%39 = moecompile.all_to_all(%38, %10, 0, True, 'ep_inter')
%40 = moecompile.combine_rows(%39, %14, %0)
output(%40)
"""

ALLGATHER = f"""\
{INPUTS}%3 = moecompile.count_gathered(%1, 8, 4)
%4 = moecompile.exchange_counts(%3, 'ep')
%5 = getitem(%4, 0)
%6 = getitem(%4, 1)
%7 = moecompile.own_tokens(%1, %6, 8)
%8 = moecompile.pad_tokens(%0, %2, %1, %7, %6)
%9 = getitem(%8, 0)
%10 = getitem(%8, 1)
%11 = getitem(%8, 2)
%12 = moecompile.all_gather(%9, 'ep_inter')
%13 = moecompile.gather_assignments(%10, %11, 'ep_inter')
%14 = getitem(%13, 0)
%15 = getitem(%13, 1)
%16 = moecompile.all_gather(%12, 'ep_intra')
%17 = moecompile.gather_assignments(%14, %15, 'ep_intra')
%18 = getitem(%17, 0)
%19 = getitem(%17, 1)
%20 = moecompile.take_local(%16, %18, %19, %5, %6, 2)
%21 = getitem(%20, 0)
%22 = getitem(%20, 1)
%23 = getitem(%20, 2)
%24 = getitem(%20, 4)
%25 = experts[Experts](%21, %24)
%26 = moecompile.reduce_rows(%25, %22, %23, %16)
%27 = moecompile.reduce_scatter(%26, 'ep_intra')
%28 = moecompile.reduce_scatter(%27, 'ep_inter')
%29 = moecompile.spread_tokens(%28, %7, %0)
output(%29)
"""

# On one node nothing crosses nodes, and rows are cast for each exchange.
ALLGATHER_ON_ONE_NODE_IN_BF16 = f"""\
{INPUTS}%3 = moecompile.count_gathered(%1, 4, 2)
%4 = moecompile.exchange_counts(%3, 'ep')
%5 = getitem(%4, 0)
%6 = getitem(%4, 1)
%7 = moecompile.own_tokens(%1, %6, 4)
%8 = moecompile.pad_tokens(%0, %2, %1, %7, %6)
%9 = getitem(%8, 0)
%10 = getitem(%8, 1)
%11 = getitem(%8, 2)
%12 = moecompile.wire_cast(%9, bf16)
%13 = moecompile.all_gather(%12, 'ep_intra')
%14 = moecompile.wire_uncast(%13, %9)
%15 = moecompile.gather_assignments(%10, %11, 'ep_intra')
%16 = getitem(%15, 0)
%17 = getitem(%15, 1)
%18 = moecompile.take_local(%14, %16, %17, %5, %6, 2)
%19 = getitem(%18, 0)
%20 = getitem(%18, 1)
%21 = getitem(%18, 2)
%22 = getitem(%18, 4)
%23 = experts[Experts](%19, %22)
%24 = moecompile.reduce_rows(%23, %20, %21, %14)
%25 = moecompile.wire_cast(%24, bf16)
%26 = moecompile.reduce_scatter(%25, 'ep_intra')
%27 = moecompile.wire_uncast(%26, %24)
%28 = moecompile.spread_tokens(%27, %7, %0)
output(%28)
"""


@pytest.mark.parametrize(
    ("made_for", "expected"),
    [
        (case("hierarchical"), HIERARCHICAL),
        (case("allgather"), ALLGATHER),
        (case("allgather", ONE_BY_TWO, "bf16"), ALLGATHER_ON_ONE_NODE_IN_BF16),
    ],
    ids=["hierarchical", "allgather", "allgather-bf16"],
)
def test_expected_graph(made_for: Case, expected: str) -> None:
    assert text(job.lowered(made_for, 0)) == expected


@pytest.mark.parametrize("mesh", [TWO_BY_TWO, ONE_BY_TWO], ids=["two-nodes", "one-node"])
def test_the_graph_holds_the_planned_exchanges(mesh: MeshSpec) -> None:
    for kind in job.kinds_on(mesh):
        made_for = case(kind, mesh)
        found = [(str(n.target).split(".")[-1], n.args[-1]) for n in exchanges_of(job.lowered(made_for, 0))]
        assert found == list(made_for.layer().steps)


@pytest.mark.parametrize(("wire_dtype", "dtype"), [("auto", None), ("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("kind", job.KINDS)
def test_rows_alone_are_cast_and_come_back_as_they_were(kind: str, wire_dtype: str, dtype: torch.dtype | None) -> None:
    """Every exchange of rows stands between a cast and one back; weights, ids and counts never do."""
    module = job.lowered(case(kind, wire_dtype=wire_dtype), 0)
    for node in exchanges_of(module):
        rows = str(node.target).split(".")[-1] in ("all_to_all", "all_gather", "reduce_scatter")
        (sent, *_), users = node.args, list(node.users)
        assert ("wire_cast" in str(sent.target)) == (rows and dtype is not None), node
        if rows and dtype is not None:
            assert sent.args[1] == dtype
            assert ["wire_uncast" in str(user.target) for user in users] == [True]


@pytest.mark.parametrize("kind", ["hierarchical", "allgather"])
def test_lowered_graphs_survive_copies_pickles_and_retracing(kind: str) -> None:
    module = job.lowered(case(kind, wire_dtype="bf16"), 0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert text(other) == text(module)
    retraced = fx.symbolic_trace(module)
    assert [str(n.target) for n in exchanges_of(retraced)] == [str(n.target) for n in exchanges_of(module)]


def test_hierarchical_on_one_node_is_no_plan() -> None:
    message = "dispatch.kind=hierarchical: needs an EP group on two nodes or more, but placement.nodes=1. Use dedup."
    with pytest.raises(PlanError, match=re.escape(message)):
        case("hierarchical", ONE_BY_TWO).layer()


def test_both_levels_are_bound_once(tmp_path: Path) -> None:
    """On one rank all groups are the same one; that they are the right ones is seen over ranks (tests/distributed)."""
    module = job.lowered(case("allgather"), 0)
    with one_rank(tmp_path):
        device_mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("edp", "ep"))
        bind_axes(module, device_mesh)
        assert {str(node.args[-1]) for node in exchanges_of(module)} == {device_mesh.get_group("ep").group_name}
        with pytest.raises(PassError, match="which is bound already or not in the mesh"):
            bind_axes(module, device_mesh)


def test_a_mesh_without_ep_has_no_levels(tmp_path: Path) -> None:
    with one_rank(tmp_path):
        device_mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("edp",))
        with pytest.raises(PassError, match="uses axis ep_inter, which is bound already or not in the mesh"):
            bind_axes(job.lowered(case("hierarchical"), 0), device_mesh)
