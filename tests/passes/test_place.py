"""place: where ids become positions, and the contract of the result."""

from __future__ import annotations

import dataclasses

import pytest

from moecompile.errors import PassError, PlanError
from moecompile.passes import place
from moecompile.passes.base import experts_calls
from moecompile.passes.lower import Lower
from moecompile.passes.place import Place, order_of
from moecompile.passes.rewrite import Rewrite
from moecompile.plan import ExpertPlacement, LayerPlan
from tests.tiny import COPY4, Gated, only_region, passed, plan_for, text

ORDER = (2, 0, 3, 1)


def layer(order: tuple[int, ...] = ORDER) -> LayerPlan:
    (planned,) = plan_for(Gated(), [*COPY4, "mesh.ranks_per_node=2", "dispatch.kind=flat"]).layers
    return dataclasses.replace(planned, placement=dataclasses.replace(planned.placement, order=order))


def test_the_exchange_counts_positions() -> None:
    """%4 are the ids: they are mapped once, and nothing of the dispatch reads them."""
    rewritten = passed(only_region(Gated()), layer(), Rewrite())
    lines = text(passed(rewritten, layer(), Place(), Lower()).graph).splitlines()
    assert "%5 = moecompile.place_ids(%4, [1, 3, 0, 2])" in lines
    assert sum("%4" in line for line in lines) == 2  # where it is made, and there
    assert any(line.endswith("= moecompile.count_experts(%5, 4)") for line in lines)
    (call,) = experts_calls(passed(rewritten, layer(), Place()).graph)
    assert order_of(call) == ORDER


def test_the_order_of_ids_needs_nothing() -> None:
    rewritten = passed(only_region(Gated()), layer(()), Rewrite())
    assert passed(rewritten, layer(()), Place()) is rewritten
    (call,) = experts_calls(rewritten.graph)
    assert order_of(call) == ()


def test_the_contract() -> None:
    rewritten = passed(only_region(Gated()), layer(), Rewrite())
    once = passed(rewritten, layer(), Place())
    with pytest.raises(PassError, match="experts are placed already"):
        passed(once, layer(), Place())
    with pytest.raises(PassError, match=r"experts are in the order \[2, 0, 3, 1\]"):
        Place().ensures(rewritten, once, [layer((0, 1, 3, 2))])
    with pytest.raises(PassError, match=r"experts are in the order \[\]"):
        Place().ensures(rewritten, rewritten, [layer()])


def test_a_pass_that_maps_to_experts_instead_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExpertPlacement, "positions", property(lambda self: self.order))
    rewritten = passed(only_region(Gated()), layer(), Rewrite())
    with pytest.raises(PassError, match="experts are in the order"):
        passed(rewritten, layer(), place.Place())


@pytest.mark.parametrize(("ep", "order"), [(2, (0, 1, 1, 3)), (2, (0, 1)), (1, ORDER)])
def test_each_expert_is_placed_once(ep: int, order: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match=r"placement.order=\[.*\]: must name each of the 4 experts once"):
        ExpertPlacement(num_experts=4, ep=ep, order=order)


def test_a_placement_is_read_both_ways() -> None:
    placement = ExpertPlacement(num_experts=4, ep=4, nodes=2, order=ORDER)
    assert [placement.rank_of(expert) for expert in range(4)] == [1, 3, 0, 2]
    assert [placement.node_of(expert) for expert in range(4)] == [0, 1, 0, 1]
    assert [list(placement.experts_of(rank)) for rank in range(4)] == [[2], [0], [3], [1]]
    by_id = ExpertPlacement(num_experts=4, ep=2)
    assert [list(by_id.experts_of(rank)) for rank in range(2)] == [[0, 1], [2, 3]]
    assert [by_id.rank_of(expert) for expert in range(4)] == [0, 0, 1, 1]
