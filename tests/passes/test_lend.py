"""The pass `lend`: the graph before and after, and each rule of its contract broken once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from torch import fx

from moecompile.errors import PassError
from moecompile.match.regions import Region
from moecompile.passes.base import experts_calls, op_name
from moecompile.passes.fuse import Fuse
from moecompile.passes.lend import Lend
from moecompile.passes.lower import Lower
from moecompile.passes.rewrite import Rewrite
from moecompile.plan import LayerPlan
from tests.tiny import COPY4, Gated, only_region, passed, plan_for, text

LENT = [*COPY4, "mesh.ranks_per_node=2", "dispatch.balance=lend", "dispatch.slots=2", "hardware.tflops=1e-6"]


def layer(*overrides: str) -> LayerPlan:
    (planned,) = plan_for(Gated(), [*LENT, *overrides]).layers
    return planned


def lowered(planned: LayerPlan) -> Region:
    return passed(only_region(Gated()), planned, Rewrite(), Lower())


def test_ids_become_slots_and_experts_travel_before_rows() -> None:
    planned = layer("dispatch.kind=dedup")
    assert (
        text(passed(lowered(planned), planned, Lend(), Fuse()).graph)
        == """\
%0 = placeholder x
%1 = moecompile.flatten_tokens(%0)
%2 = router[Router](%0)
%3 = getitem(%2, 0)
%4 = getitem(%2, 1)
%5 = moecompile.count_experts(%4, 4)
%6 = moecompile.gather_counts(%5, 'ep')
%7 = getitem(%6, 0)
%8 = getitem(%6, 1)
%9 = moecompile.to_slots(%4, %7, %8, 2, 1, 1, 0)
%10 = getitem(%9, 0)
%11 = getitem(%9, 1)
%12 = moecompile.count_rows(%10, 8, 2)
%13 = getitem(%12, 0)
%14 = getitem(%12, 1)
%15 = moecompile.exchange_counts(%14, 'ep')
%16 = getitem(%15, 1)
%17 = moecompile.pack_rows(%1, %3, %13, 8, 2, %16)
%18 = getitem(%17, 0)
%19 = getitem(%17, 1)
%20 = getitem(%17, 2)
%21 = getitem(%17, 3)
%22 = get_attr experts.gate_up_proj
%23 = get_attr experts.down_proj
%24 = moecompile.local_experts(%22, 2)
%25 = moecompile.local_experts(%23, 2)
%26 = moecompile.lend_experts([%24, %25], %11, 'ep')
%27 = getitem(%26, 0)
%28 = getitem(%26, 1)
%29 = moecompile.all_to_all(%18, %16, 0, False, 'ep')
%30 = moecompile.exchange_assignments(%20, %21, %16, 1, 'ep')
%31 = getitem(%30, 0)
%32 = getitem(%30, 1)
%33 = moecompile.sort_received(%31, %32, 4)
%34 = getitem(%33, 0)
%35 = getitem(%33, 1)
%36 = getitem(%33, 3)
%37 = experts[Experts](%29, %36, borrowed=[%27, %28], source_R=%35, weights_R=%34)
%38 = moecompile.all_to_all(%37, %16, 0, True, 'ep')
%39 = moecompile.combine_rows(%38, %19, %1)
%40 = moecompile.unflatten_tokens(%39, %0)
output(%40)
"""
    )


@pytest.mark.parametrize("kind", ["flat", "dedup"])
def test_every_size_counts_slots(kind: str) -> None:
    """Two ranks with two experts each and two slots more: 8 instead of 4 in all, 4 instead of 2 on a rank."""
    planned = layer(f"dispatch.kind={kind}")
    before, after = lowered(planned), passed(lowered(planned), planned, Lend())
    sizes = {
        name: [[a for a in node.args if isinstance(a, int)] for node in graph.graph.nodes if op_name(node) == name]
        for graph, name in ((after.graph, n) for n in ("count_rows", "pack_rows", "expand_rows", "permute"))
    }
    wanted = {"count_rows": [[8, 2]], "pack_rows": [[8, 2]], "expand_rows": [[4]], "permute": []}
    flat = {"count_rows": [], "pack_rows": [], "expand_rows": [], "permute": [[8]]}
    assert sizes == (flat if kind == "flat" else wanted)
    assert not any("slots" in node.name for node in before.graph.graph.nodes)  # the input is left alone


def test_a_plan_that_lends_nothing_leaves_the_graph() -> None:
    planned = layer("dispatch.balance=none", "dispatch.slots=auto")
    before = lowered(planned)
    assert passed(before, planned, Lend()) is before


def test_it_runs_once() -> None:
    planned = layer()
    lent = passed(lowered(planned), planned, Lend())
    with pytest.raises(PassError, match="experts are lent already: \\['gather_counts', 'lend_experts'\\]"):
        passed(lent, planned, Lend())


def test_it_needs_the_exchanges() -> None:
    planned = layer()
    with pytest.raises(PassError, match="no count_rows leads to"):
        passed(passed(only_region(Gated()), planned, Rewrite()), planned, Lend())


def _without_borrowed(graph: fx.GraphModule) -> None:
    (call,) = experts_calls(graph)
    call.kwargs = {}


def _without_exchange(graph: fx.GraphModule) -> None:
    _without_borrowed(graph)
    for node in reversed(graph.graph.nodes):
        if (node.name.startswith("borrowed_") and node.name != "borrowed_table") or op_name(node) == "lend_experts":
            graph.graph.erase_node(node)


BROKEN: dict[str, tuple[Callable[[fx.GraphModule], None], str]] = {
    "an experts call without borrowed experts": (_without_borrowed, "has no borrowed experts"),
    "no exchange of experts": (_without_exchange, "exchanges are .*, planned are .*lend_experts"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_result_is_an_error(name: str) -> None:
    break_it, message = BROKEN[name]
    planned = layer()
    before = lowered(planned)
    after = passed(before, planned, Lend())
    break_it(after.graph)
    with pytest.raises(PassError, match=message):
        Lend().ensures(before, after, [planned])


def test_borrowed_experts_that_are_not_planned_are_an_error() -> None:
    planned = layer()
    before = lowered(planned)
    after = passed(before, planned, Lend())
    for node in list(after.graph.graph.nodes):
        if op_name(node) in ("gather_counts", "lend_experts"):
            node.target = node.target.__class__  # no exchange any more
    plain = dataclasses.replace(planned, dispatch=layer("dispatch.balance=none", "dispatch.slots=auto").dispatch)
    with pytest.raises(PassError, match="has borrowed experts, but is not planned so"):
        Lend().ensures(before, after, [plain])
