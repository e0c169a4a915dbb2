"""overlap in its own notation, the contract that its result keeps, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch
from torch import fx

from moecompile.errors import ConfigError, PassError, PlanError
from moecompile.match.regions import Region
from moecompile.passes.base import exchanges_of, experts_calls, op_name
from moecompile.passes.fuse import Fuse
from moecompile.passes.lower import Lower
from moecompile.passes.overlap import Overlap
from moecompile.passes.rewrite import Rewrite
from moecompile.plan import LayerPlan
from moecompile.planner.cost_model.seconds import (
    LEAST_ROWS,
    LayerSeconds,
    backward_seconds,
    choose_chunks,
    choose_overlap,
    forward_seconds,
)
from tests.tiny import COPY4, Gated, config, only_region, passed, plan_for, text

SHARED = [*COPY4, "experts.num_shared=1", "mesh.num_nodes=2", "mesh.ranks_per_node=2"]


def planned(kind: str, *overrides: str) -> LayerPlan:
    (layer,) = plan_for(Gated(), [*SHARED, f"dispatch.kind={kind}", *overrides]).layers
    return layer


def overlapped(kind: str, chunks: int) -> tuple[Region, Region, LayerPlan]:
    """(lowered, overlapped, layer) of a gated FFN with a shared expert."""
    asked = ["dispatch.overlap=shared"] if chunks == 1 else ["dispatch.overlap=chunks", f"dispatch.chunks={chunks}"]
    layer = planned(kind, *asked)
    lowered = passed(only_region(Gated()), layer, Rewrite(), Lower())
    return lowered, passed(lowered, layer, Overlap()), layer


TWO_CHUNKS_OF_FLAT = """\
%0 = placeholder x
%1 = moecompile.flatten_tokens(%0)
%2 = router[Router](%0)
%3 = getitem(%2, 0)
%4 = getitem(%2, 1)
%5 = moecompile.split_tokens(%4, 2)
%6 = moecompile.split_tokens(%1, 2)
%7 = moecompile.split_tokens(%3, 2)
%8 = getitem(%5, 0)
%9 = getitem(%5, 1)
%10 = getitem(%6, 0)
%11 = getitem(%6, 1)
%12 = getitem(%7, 0)
%13 = getitem(%7, 1)
%14 = moecompile.count_experts(%8, 4)
%15 = moecompile.count_experts(%9, 4)
%16 = moecompile.join_counts([%14, %15], 4)
%17 = moecompile.exchange_counts(%16, 'ep')
%18 = getitem(%17, 0)
%19 = getitem(%17, 1)
%20 = moecompile.counts_of_chunk(%18, 0, 2)
%21 = moecompile.counts_of_chunk(%18, 1, 2)
%22 = moecompile.counts_of_chunk(%19, 0, 2)
%23 = moecompile.counts_of_chunk(%19, 1, 2)
%24 = moecompile.permute(%10, %8, 4)
%25 = getitem(%24, 0)
%26 = getitem(%24, 1)
%27 = moecompile.all_to_all_start(%25, %22, -1, False, 'ep')
%28 = getitem(%27, 0)
%29 = getitem(%27, 1)
%30 = moecompile.permute(%11, %9, 4)
%31 = getitem(%30, 0)
%32 = getitem(%30, 1)
%33 = moecompile.all_to_all_start(%31, %23, -1, False, 'ep')
%34 = getitem(%33, 0)
%35 = getitem(%33, 1)
%36 = shared_experts[SharedExperts](%0)
%37 = moecompile.all_to_all_wait(%28, %29, %22, -1, False, 'ep')
%38 = moecompile.regroup(%37, %20)
%39 = getitem(%38, 0)
%40 = getitem(%38, 1)
%41 = getitem(%38, 2)
%42 = experts[Experts](%39, %41)
%43 = moecompile.ungroup(%42, %40)
%44 = moecompile.all_to_all_start(%43, %22, -1, True, 'ep')
%45 = getitem(%44, 0)
%46 = getitem(%44, 1)
%47 = moecompile.all_to_all_wait(%34, %35, %23, -1, False, 'ep')
%48 = moecompile.regroup(%47, %21)
%49 = getitem(%48, 0)
%50 = getitem(%48, 1)
%51 = getitem(%48, 2)
%52 = experts[Experts](%49, %51)
%53 = moecompile.ungroup(%52, %50)
%54 = moecompile.all_to_all_start(%53, %23, -1, True, 'ep')
%55 = getitem(%54, 0)
%56 = getitem(%54, 1)
%57 = moecompile.all_to_all_wait(%45, %46, %22, -1, True, 'ep')
%58 = moecompile.unpermute(%57, %26, %12)
%59 = moecompile.all_to_all_wait(%55, %56, %23, -1, True, 'ep')
%60 = moecompile.unpermute(%59, %32, %13)
%61 = aten.cat([%58, %60])
%62 = moecompile.unflatten_tokens(%61, %0)
%63 = aten.add.Tensor(%62, %36)
output(%63)
"""


def test_expected_graph() -> None:
    before, after, _ = overlapped("flat", 2)
    shown = text(before.graph)
    assert text(after.graph) == TWO_CHUNKS_OF_FLAT
    assert text(before.graph) == shown
    assert after.graph.experts is before.graph.experts


@pytest.mark.parametrize("kind", ["flat", "dedup", "hierarchical"])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_while_experts_compute_another_chunk_is_on_the_wire(kind: str, chunks: int) -> None:
    """One message of counts as before, n starts and waits, the shared experts before the first wait."""
    before, after, _ = overlapped(kind, chunks)
    names = [op_name(node) for node in after.graph.graph.nodes]
    counting = ("exchange_counts", "send_counts")
    assert sum(name in counting for name in names) == sum(op_name(n) in counting for n in exchanges_of(before.graph))
    rows = sum(op_name(node) == "all_to_all" for node in exchanges_of(before.graph))
    assert names.count("all_to_all_start") == names.count("all_to_all_wait") == chunks * rows
    assert names.count("all_to_all") == names.count("exchange_assignments") == 0
    assert names.index("shared_experts") < names.index("all_to_all_wait")
    in_flight = 0
    for node in after.graph.graph.nodes:
        in_flight += (op_name(node) == "all_to_all_start") - (op_name(node) == "all_to_all_wait")
        if op_name(node) == "shared_experts" or (op_name(node) == "experts" and chunks > 1):
            assert in_flight >= 1
    assert in_flight == 0


@pytest.mark.parametrize("kind", ["dedup", "hierarchical"])
def test_each_chunk_is_fused(kind: str) -> None:
    _, after, layer = overlapped(kind, 3)
    assert layer.fused
    fused = passed(after, layer, Fuse())
    assert [bool(call.kwargs) for call in experts_calls(fused.graph)] == [True] * 3


def test_nothing_planned_changes_nothing() -> None:
    layer = planned("dedup")
    lowered = passed(only_region(Gated()), layer, Rewrite(), Lower())
    assert passed(lowered, layer, Overlap()) is lowered


# -- contract --------------------------------------------------------------------------------------------------------


def node_named(region: Region, name: str, which: int = 0) -> fx.Node:
    return [node for node in region.graph.graph.nodes if op_name(node) == name][which]


def _lose_a_start(region: Region) -> None:
    start = node_named(region, "all_to_all_start", 1)
    for item in list(start.users):
        item.replace_all_uses_with(start.args[0])
        region.graph.graph.erase_node(item)
    region.graph.graph.erase_node(start)


def _leave_a_wait_out(region: Region) -> None:
    """The rows that were sent are used instead."""
    wait = node_named(region, "all_to_all_wait")
    start = wait.args[0].args[0]
    wait.replace_all_uses_with(start.args[0])
    region.graph.graph.erase_node(wait)


def _read_a_token(region: Region) -> None:
    wait = node_named(region, "all_to_all_wait")
    with region.graph.graph.inserting_before(wait):
        region.graph.graph.call_function(torch.neg, (wait.args[0],))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_lose_a_start, r"exchanges are \[.*\], planned are \[.*\]"),
        (_leave_a_wait_out, r"all_to_all_start.* is read by \[\], one all_to_all_wait is meant"),
        (_read_a_token, r"is read by \[.*neg.*\], one all_to_all_wait is meant"),
    ],
)
def test_what_breaks_the_contract(change: Callable[[Region], None], message: str) -> None:
    before, after, layer = overlapped("dedup", 2)
    Overlap().ensures(before, after, [layer])
    change(after)
    with pytest.raises(PassError, match=message):
        Overlap().ensures(before, after, [layer])


def test_another_order_breaks_the_contract() -> None:
    before, after, layer = overlapped("hierarchical", 2)
    intra = next(n for n in exchanges_of(after.graph) if op_name(n) == "all_to_all_start" and n.args[-1] == "ep_intra")
    inter = next(n for n in exchanges_of(after.graph) if op_name(n) == "all_to_all_start" and n.args[-1] == "ep_inter")
    inter.prepend(intra)
    with pytest.raises(PassError, match=r"exchanges are .*, planned are "):
        Overlap().ensures(before, after, [layer])


def test_it_runs_once() -> None:
    _, after, layer = overlapped("dedup", 1)
    with pytest.raises(PassError, match="exchanges are started already"):
        Overlap().requires(after, [layer])


def test_a_dispatch_without_its_end_is_refused() -> None:
    before, _, layer = overlapped("dedup", 2)
    combine = node_named(before, "combine_rows")
    combine.replace_all_uses_with(combine.args[0])
    before.graph.graph.erase_node(combine)
    with pytest.raises(PassError, match="no combine_rows follows experts"):
        Overlap().run(before, [layer])


def test_a_part_that_others_read_cannot_be_cut() -> None:
    """A pass of a user that looks at the rows received, for one."""
    before, _, layer = overlapped("dedup", 2)
    landed = node_named(before, "all_to_all")
    graph = before.graph.graph
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        graph.output((output.args[0], landed))
    graph.erase_node(output)
    with pytest.raises(PassError, match=r"all_to_all is a part of the dispatch that \['output.*'\] read too"):
        Overlap().run(before, [layer])


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dispatch.overlap=chunks", "dispatch.chunks=1"], "dispatch.chunks=1: must be at least 2. Use 2 or more."),
        (
            ["dispatch.overlap=chunks", "dispatch.chunks=9999"],
            "dispatch.chunks=9999: a micro-batch has 512 tokens (data.micro_batch_size * data.seq_len). Use at most 512.",
        ),
        (
            ["dispatch.chunks=2"],
            "dispatch.chunks=2: needs overlap=chunks, but dispatch.overlap=none. Use dispatch.overlap=chunks, "
            "or chunks=auto.",
        ),
        (
            ["dispatch.overlap=shared", "dispatch.kind=allgather"],
            "dispatch.overlap=shared: dispatch.kind=allgather cannot: it gathers all tokens at once. Use none.",
        ),
    ],
)
def test_impossible_overlaps_are_one_message(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        planned("dedup", *overrides)


def test_a_plan_by_hand_is_checked() -> None:
    dispatch = planned("dedup").dispatch
    for changes in ({"overlap": "chunks"}, {"chunks": 2}, {"overlap": "auto"}, {"overlap": "shared", "kind": "local"}):
        with pytest.raises(PlanError, match=r"^dispatch\.(overlap|chunks)="):
            dataclasses.replace(dispatch, **changes)


def test_with_one_rank_nothing_is_in_flight() -> None:
    (layer,) = plan_for(Gated(), [*COPY4, "dispatch.overlap=chunks"]).layers
    assert (layer.dispatch.kind, layer.dispatch.overlap, layer.dispatch.chunks) == ("local", "none", 1)


# -- which one is chosen ---------------------------------------------------------------------------------------------


# Expert compute over wire time, shared over routed compute, chunks -> step over the sum of its parts, forward and
# backward: an event simulation that shares no code with the planner's, two decimals.
SIMULATED = {
    (0.5, 0.0, 2): 0.72, (0.5, 0.0, 4): 0.69, (0.5, 0.5, 1): 0.86, (0.5, 0.5, 2): 0.64,
    (1.0, 0.0, 2): 0.75, (1.0, 0.0, 4): 0.67, (1.0, 0.5, 1): 0.83, (1.0, 0.5, 2): 0.70, (1.0, 0.5, 4): 0.68,
    (2.0, 0.0, 2): 0.83, (2.0, 0.0, 4): 0.75, (2.0, 0.5, 1): 0.88, (2.0, 0.5, 2): 0.81, (2.0, 0.5, 4): 0.78,
}  # fmt: skip


@pytest.mark.parametrize(("ratio", "shared", "chunks"), SIMULATED)
def test_predicted_times_are_those_of_a_simulation(ratio: float, shared: float, chunks: int) -> None:
    routed = 2 * ratio / 3  # with 2 x that in backward, as much as `ratio` times two exchanges
    directions = [LayerSeconds(wire=1.0, routed=n * routed, shared=n * routed * shared) for n in (1, 2)]
    kind = ("shared", 1) if chunks == 1 else ("chunks", chunks)
    step = sum(forward_seconds(times, *kind, price=0.0) for times in directions)
    whole = sum(forward_seconds(times, "none", 1) for times in directions)
    assert step / whole == pytest.approx(SIMULATED[ratio, shared, chunks], abs=0.0051)


# Wire, chunks -> backward of a layer whose routed experts take 1 in forward, event by event on paper: a fill of one hop,
# gradients of the rows (1, in chunks, each of which waits for its hop), then weight gradients (1) beside the way back.
ON_PAPER = {
    (0.5, 1): 0.25 + 1 + 1, (1.0, 2): 0.25 + 1 + 1, (1.0, 4): 0.125 + 1 + 1, (2.0, 1): 1 + 1 + 1,
    (2.0, 2): 0.5 + 1 + 1, (2.0, 4): 0.25 + 1.5 + 1, (8.0, 1): 4 + 1 + 4,
}  # fmt: skip


@pytest.mark.parametrize(("wire", "chunks"), ON_PAPER)
def test_weight_gradients_are_computed_while_gradients_return(wire: float, chunks: int) -> None:
    kind = ("shared", 1) if chunks == 1 else ("chunks", chunks)
    times = LayerSeconds(wire=wire, routed=1.0, shared=0.0)
    assert backward_seconds(times, *kind, price=0.0) == pytest.approx(ON_PAPER[wire, chunks])
    assert backward_seconds(times, "none", 1) == pytest.approx(wire + 2)


@pytest.mark.parametrize(
    ("times", "rows", "chosen"),
    [
        (LayerSeconds(wire=1.0, routed=1.0, shared=0.5), 4096, ("chunks", 4)),
        (LayerSeconds(wire=1.0, routed=1.0, shared=0.5), 100, ("shared", 1)),  # too few rows for chunks
        (LayerSeconds(wire=1.0, routed=1.0, shared=0.0), 100, ("shared", 1)),  # weight gradients hide the way back
        (LayerSeconds(wire=0.01, routed=1.0, shared=0.0), 100, ("none", 1)),
        (LayerSeconds(wire=0.01, routed=1.0, shared=0.0), 4096, ("none", 1)),  # the price is higher than the wire
    ],
)
def test_auto_takes_what_is_predicted_to_be_fastest(times: LayerSeconds, rows: float, chosen: tuple[str, int]) -> None:
    assert choose_overlap(times, rows) == chosen


def test_chunks_are_as_many_as_their_rows_allow() -> None:
    slow = LayerSeconds(wire=1.0, routed=1.0, shared=0.0)
    assert [choose_chunks(slow, n * LEAST_ROWS) for n in (8, 4, 3, 1)] == [4, 4, 2, 2]


def test_auto_is_planned() -> None:
    slow = ["dispatch.overlap=auto", "hardware.inter_node_gb_s=0.00001", "hardware.tflops=0.0000001"]
    assert planned("dedup", *slow, "data.seq_len=4096").dispatch.overlap != "none"
    assert config("dispatch.overlap=auto").dispatch.overlap.value == "auto"
    fast = ["dispatch.overlap=auto", "hardware.inter_node_gb_s=1000000", "hardware.intra_node_gb_s=1000000"]
    assert planned("dedup", *fast).dispatch.overlap == "none"
