"""collect in its own notation, the contract that its result keeps, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from torch import fx

from moecompile.errors import PassError
from moecompile.match.regions import Region
from moecompile.passes.base import collecting_calls, exchanges_of, experts_calls, op_name
from moecompile.passes.delay_gradients import DelayWeightGradients
from moecompile.passes.fuse import Fuse
from moecompile.passes.lower import Lower
from moecompile.passes.rewrite import Rewrite
from moecompile.plan import WAIT_OPS, LayerPlan
from tests.passes.test_overlap import overlapped, planned
from tests.tiny import Gated, only_region, passed, text


def collected(kind: str, chunks: int) -> tuple[Region, Region, LayerPlan]:
    """(overlapped, collected, layer)."""
    _, before, layer = overlapped(kind, chunks)
    return before, passed(before, layer, DelayWeightGradients()), layer


def test_expected_graph() -> None:
    """Two lines more, before the first wait, and an argument of each experts call; nothing else changes."""
    before, after, _ = collected("flat", 2)
    shown = text(before.graph)
    lines = text(after.graph).splitlines()
    assert lines[36:40] == [
        "%36 = shared_experts[SharedExperts](%0)",
        "%37 = get_attr experts",
        "%38 = grad_token(%37)",
        "%39 = moecompile.all_to_all_wait(%28, %29, %22, -1, False, 'ep')",
    ]
    assert [line for line in lines if "experts[Experts](%" in line] == [
        "%44 = experts[Experts](%41, %43, grad_token=%38)", "%54 = experts[Experts](%51, %53, grad_token=%38)",
    ]  # fmt: skip
    plain = re.sub(r"%\d+", "%", shown).splitlines()
    rest = [re.sub(r"%\d+", "%", line.replace(", grad_token=%38", "")) for line in [*lines[:37], *lines[39:]]]
    assert rest == plain
    assert text(before.graph) == shown
    assert after.graph.experts is before.graph.experts


@pytest.mark.parametrize("kind", ["flat", "dedup", "hierarchical"])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_the_token_is_made_while_dispatches_are_on_the_wire(kind: str, chunks: int) -> None:
    _, after, layer = collected(kind, chunks)
    (token,) = collecting_calls(after.graph)
    nodes = list(after.graph.graph.nodes)
    names = [op_name(node) for node in nodes[: nodes.index(token)]]
    assert "all_to_all_start" in names
    assert not WAIT_OPS & set(names)
    fused = passed(after, layer, Fuse()) if layer.fused else after
    calls = experts_calls(fused.graph)
    assert len(calls) == chunks
    assert {call.kwargs["grad_token"] for call in calls} == {*collecting_calls(fused.graph)}


def test_nothing_planned_changes_nothing() -> None:
    layer = planned("dedup")
    lowered = passed(only_region(Gated()), layer, Rewrite(), Lower())
    assert passed(lowered, layer, DelayWeightGradients()) is lowered


# -- contract --------------------------------------------------------------------------------------------------------


def _forget_a_chunk(region: Region) -> None:
    call = experts_calls(region.graph)[1]
    call.kwargs = {key: value for key, value in call.kwargs.items() if key != "grad_token"}


def _make_two(region: Region) -> None:
    (token,) = collecting_calls(region.graph)
    with region.graph.graph.inserting_after(token):
        region.graph.graph.node_copy(token)


def _move(region: Region, place: Callable[[fx.GraphModule], fx.Node]) -> None:
    (token,) = collecting_calls(region.graph)
    place(region.graph).append(token)


def _too_early(region: Region) -> None:
    _move(region, lambda graph: next(node for node in graph.graph.nodes if node.op == "placeholder"))


def _too_late(region: Region) -> None:
    _move(region, lambda graph: next(node for node in graph.graph.nodes if op_name(node) in WAIT_OPS))


def _lose_an_exchange(region: Region) -> None:
    exchange = exchanges_of(region.graph)[0]
    for item in list(exchange.users):
        item.replace_all_uses_with(exchange.args[0])
        region.graph.graph.erase_node(item)
    region.graph.graph.erase_node(exchange)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_forget_a_chunk, r"its experts get \['None', 'weight_gradients'\], planned is one token"),
        (_make_two, r"\[weight_gradients_1\] are read by no experts"),
        (_too_early, "must be after a start and before the first wait"),
        (_too_late, "must be after a start and before the first wait"),
        (_lose_an_exchange, "exchanges were .*, are "),
    ],
)
def test_what_breaks_the_contract(change: Callable[[Region], None], message: str) -> None:
    before, after, layer = collected("dedup", 2)
    DelayWeightGradients().ensures(before, after, [layer])
    change(after)
    with pytest.raises(PassError, match=message):
        DelayWeightGradients().ensures(before, after, [layer])


def test_a_token_that_is_not_planned_breaks_it_too() -> None:
    before, after, _ = collected("dedup", 1)
    with pytest.raises(PassError, match="planned is none"):
        DelayWeightGradients().ensures(before, after, [planned("dedup")])


def test_it_runs_once_and_after_overlap() -> None:
    _, after, layer = collected("dedup", 2)
    with pytest.raises(PassError, match="its weight gradients are collected already"):
        DelayWeightGradients().requires(after, [layer])
    (one,) = [overlapped("dedup", 1)[2]]
    lowered = passed(only_region(Gated()), one, Rewrite(), Lower())
    with pytest.raises(PassError, match="its experts wait for no exchange in flight: overlap is first"):
        DelayWeightGradients().requires(lowered, [one])
    with pytest.raises(PassError, match="1 experts calls, planned are 2"):
        DelayWeightGradients().requires(lowered, [layer])
