"""The closed form against published figures, hand counts, and ranks that are simulated through the packing ops."""

from __future__ import annotations

import dataclasses
import itertools
from math import comb

import numpy as np
import pytest
import torch

from benchmarks.dispatch_bytes import KINDS, simulate
from moecompile.errors import PlanError
from moecompile.mesh import LinkClass, MeshSpec
from moecompile.plan import WIRE_FORMATS, ExpertPlacement, RoutingPlan
from moecompile.planner import Links, Wire, choose_dispatch, copies_per_token, forward_traffic
from moecompile.planner.traffic import exchange_seconds, rows_given


def routing(top_k: int, groups: int = 1, top_groups: int = 1, group_score: str = "max") -> RoutingPlan:
    return RoutingPlan(
        top_k=top_k, score="softmax", normalize=True, scale=1.0,
        groups=groups, top_groups=top_groups, group_score=group_score,
    )  # fmt: skip


def mesh(num_nodes: int, ranks_per_node: int, ep: int | None = None) -> MeshSpec:
    return MeshSpec(num_nodes=num_nodes, ranks_per_node=ranks_per_node, ep=ep or num_nodes * ranks_per_node)


# 256 experts, top-8, 4 of 8 groups, on nodes of 8 ranks: simulated with groups scored by their two best experts
DEEPSEEK_V3 = {8: (7.00, 6.55, 3.46), 4: (6.00, 5.14, 2.34), 2: (4.00, 2.86, 0.98)}


@pytest.mark.parametrize("nodes", DEEPSEEK_V3)
def test_copies_across_nodes_of_deepseek_v3(nodes: int) -> None:
    placement, router = ExpertPlacement(num_experts=256, ep=8 * nodes), routing(8, 8, 4, "top2")
    kinds, wanted = ("flat", "dedup", "hierarchical"), DEEPSEEK_V3[nodes]
    found = [copies_per_token(kind, placement, router, mesh(nodes, 8)).inter_node for kind in kinds]
    assert found == pytest.approx(wanted, abs=0.05)
    simulated = simulate(mesh(nodes, 8), placement, router, 256, seed=0)
    assert [simulated[kind, LinkClass.INTER_NODE] for kind in kinds] == pytest.approx(wanted, abs=0.05)


def test_a_token_reaches_no_more_nodes_than_its_groups() -> None:
    """With one group a node, 4 open groups are 4 nodes at most, 7/8 of them remote."""
    copies = copies_per_token("hierarchical", ExpertPlacement(num_experts=256, ep=64), routing(8, 8, 4), mesh(8, 8))
    assert 0.9 * 4 * 7 / 8 < copies.inter_node < 4 * 7 / 8


def test_every_assignment_has_one_flat_copy() -> None:
    copies = copies_per_token("flat", ExpertPlacement(num_experts=64, ep=8), routing(6), mesh(2, 4))
    assert copies.own + copies.intra_node + copies.inter_node == pytest.approx(6)
    assert copies.inter_node == pytest.approx(3)


@pytest.mark.parametrize("kind", ["flat", "dedup", "hierarchical"])
def test_what_a_rank_gives_to_its_exchanges_is_what_is_copied(kind: str) -> None:
    placement, router = ExpertPlacement(num_experts=256, ep=64, nodes=8), routing(8, 8, 4)
    copies = copies_per_token(kind, placement, router, mesh(8, 8))
    given = rows_given(kind, placement, router, mesh(8, 8))
    assert sum(given.values()) == pytest.approx(copies.own + copies.intra_node + copies.inter_node)


def test_bytes_of_a_small_case_by_hand() -> None:
    """4 experts on 2 nodes x 1 rank, top-2: both on one rank in 2 of 6 pairs, so a rank is hit with 5/6."""
    placement, wire = ExpertPlacement(num_experts=4, ep=2), Wire(d_model=8, tokens_per_rank=16)
    flat = forward_traffic("flat", placement, routing(2), mesh(2, 1), wire)
    dedup = forward_traffic("dedup", placement, routing(2), mesh(2, 1), wire)
    assert flat.intra_node == dedup.intra_node == 0
    assert flat.inter_node == pytest.approx(2 * 1 * 8 * 4 + 2 * 8 / 16)
    assert dedup.inter_node == pytest.approx(2 * (5 / 6) * 8 * 4 + 1 * (4 + 2) + 2 * 8 / 16)


def test_bf16_rows_halve_the_rows_alone() -> None:
    placement = ExpertPlacement(num_experts=4, ep=2)
    wide, narrow = (Wire(d_model=8, tokens_per_rank=16, element_bytes=size) for size in (4, 2))
    difference = (
        forward_traffic("flat", placement, routing(2), mesh(2, 1), wide).inter_node
        - forward_traffic("flat", placement, routing(2), mesh(2, 1), narrow).inter_node
    )
    assert difference == pytest.approx(2 * 1 * 8 * 2)


def test_one_rank_sends_nothing() -> None:
    placement, wire = ExpertPlacement(num_experts=8, ep=1), Wire(d_model=8, tokens_per_rank=4)
    traffic = forward_traffic("local", placement, routing(2), mesh(1, 4, ep=1), wire)
    assert (traffic.intra_node, traffic.inter_node) == (0, 0)


def test_auto_takes_the_least_predicted_time() -> None:
    wide, narrow = (Wire(d_model=width, tokens_per_rank=4096) for width in (1024, 1))
    placement, cluster, laptop = (
        ExpertPlacement(num_experts=8, ep=4),
        Links(intra=4e11, inter=5e10),
        Links(intra=2e9, inter=2e9),
    )
    assert choose_dispatch(ExpertPlacement(num_experts=8, ep=1), routing(2), mesh(1, 1), wide, cluster) == "local"
    assert choose_dispatch(placement, routing(4), mesh(2, 2), wide, cluster) == "hierarchical"
    assert choose_dispatch(placement, routing(4), mesh(2, 2), wide, laptop) == "dedup"  # a second hop costs as much
    assert (
        choose_dispatch(placement, routing(4), mesh(4, 1), wide, cluster) == "dedup"
    )  # one rank a node: no second hop
    assert (
        choose_dispatch(placement, routing(1), mesh(2, 2), wide, cluster) == "flat"
    )  # nothing to merge, only metadata
    assert choose_dispatch(placement, routing(4), mesh(1, 4), wide, cluster) == "dedup"
    assert choose_dispatch(placement, routing(4), mesh(1, 4), narrow, cluster) == "flat"


def test_few_tokens_are_not_worth_twice_as_many_messages() -> None:
    placement, links = ExpertPlacement(num_experts=8, ep=4), Links(intra=4e11, inter=5e10, latency=20e-6)
    chosen = [
        choose_dispatch(placement, routing(4), mesh(2, 2), Wire(d_model=1024, tokens_per_rank=tokens), links)
        for tokens in (64, 16384)
    ]
    assert chosen == ["dedup", "hierarchical"]


def test_seconds_by_hand() -> None:
    """Two nodes of one rank: of two experts of four, a token needs the other rank with 1 - 1/6."""
    placement, wire = ExpertPlacement(num_experts=4, ep=2), Wire(d_model=8, tokens_per_rank=6)
    links = Links(intra=1.0, inter=100.0, latency=0.25)
    rows, assignments, counts = 2 * 8 * 4 * (5 / 6) * 6, (4 + 2) * 1 * 6, 2 * 8
    found = exchange_seconds("dedup", placement, routing(2), mesh(2, 1), wire, links)
    assert found == pytest.approx(3 * 0.25 + (rows + assignments + counts) / 100)


def test_too_few_open_experts_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"only 1 groups x 2 experts = 2 experts are open to a token"):
        copies_per_token("dedup", ExpertPlacement(num_experts=8, ep=4), routing(3, 4, 1), mesh(1, 4))


def random_case(rng: np.random.Generator) -> tuple[MeshSpec, ExpertPlacement, RoutingPlan]:
    """A mesh whose EP group may be part of a node, and groups of any size relative to a rank's experts."""
    num_nodes, ranks_per_node = int(rng.integers(1, 4)), int(rng.choice([1, 2, 4]))
    world = num_nodes * ranks_per_node
    fitting = [
        ep for ep in range(1, world + 1) if world % ep == 0 and not (ep % ranks_per_node and ranks_per_node % ep)
    ]
    ep = int(rng.choice(fitting))
    num_experts = ep * int(rng.integers(1, 7))
    groups = int(rng.choice([g for g in range(1, num_experts + 1) if num_experts % g == 0]))
    top_groups = int(rng.integers(1, groups + 1))
    top_k = int(rng.integers(1, min(8, num_experts // groups * top_groups) + 1))
    return (
        mesh(num_nodes, ranks_per_node, ep),
        ExpertPlacement(num_experts=num_experts, ep=ep),
        routing(top_k, groups, top_groups),
    )


@pytest.mark.parametrize("order", [(), tuple(range(0, 16, 2)) + tuple(range(1, 16, 2))])
def test_as_many_experts_of_every_group_by_enumeration(order: tuple[int, ...]) -> None:
    """One of each group of four: the ranks that all 4 ** 4 choices reach, counted."""
    spec, placement = mesh(2, 2), ExpertPlacement(num_experts=16, ep=4, nodes=2, order=order)
    router = dataclasses.replace(routing(4, 4, 4), even_groups=True)
    position = {expert: i for i, expert in enumerate(order or range(16))}
    choices = [[4 * g + e for g, e in enumerate(each)] for each in itertools.product(range(4), repeat=4)]
    reached = [{position[e] // 4 for e in choice} for choice in choices]
    dedup = copies_per_token("dedup", placement, router, spec)
    assert dedup.own == pytest.approx(sum(map(len, reached)) / len(choices) / 4)
    across = copies_per_token("hierarchical", placement, router, spec).inter_node
    assert across == pytest.approx(sum(len({r // 2 for r in ranks}) for ranks in reached) / len(choices) / 2)


@pytest.mark.parametrize("seed", range(24))
def test_closed_form_equals_simulation(seed: int) -> None:
    spec, placement, router = random_case(np.random.default_rng(seed))
    found = simulate(spec, placement, router, 20_000 // spec.ep, seed)
    for kind in KINDS:
        copies = copies_per_token(kind, placement, router, spec)
        expected = [copies.own, copies.intra_node, copies.inter_node]
        assert expected == pytest.approx([found[kind, link] for link in LinkClass], abs=0.05), (kind, spec, placement)


@pytest.mark.parametrize(
    ("num_experts", "ep", "groups"), [(12, 6, 4), (12, 2, 6), (12, 4, 4), (12, 12, 3), (18, 3, 2), (60, 4, 6)]
)
def test_ranks_may_hold_parts_of_groups_or_several(num_experts: int, ep: int, groups: int) -> None:
    """Part of one group, parts of two, exactly one, several, several and a part."""
    placement, router = ExpertPlacement(num_experts=num_experts, ep=ep), routing(3, groups, 2)
    found = simulate(mesh(1, ep), placement, router, 50_000 // ep, seed=0)
    copies = copies_per_token("dedup", placement, router, mesh(1, ep))
    assert copies.intra_node == pytest.approx(found["dedup", LinkClass.INTRA_NODE], abs=0.02)


def test_a_placement_that_takes_groups_apart_sends_more() -> None:
    """Of 16 experts in 2 groups, 1 open, 2 ranks: by id a token needs one rank; placed in turns, four of its eight."""
    router, one_node = routing(4, groups=2, top_groups=1), mesh(1, 2)
    order = tuple(range(0, 16, 2)) + tuple(range(1, 16, 2))
    by_id, placed = (
        copies_per_token("dedup", ExpertPlacement(num_experts=16, ep=2, order=each), router, one_node)
        for each in ((), order)
    )
    assert by_id.intra_node == pytest.approx(0.5)
    assert placed.intra_node == pytest.approx(1 - 1 / comb(8, 4))
    rng, found = np.random.default_rng(0), 0
    for _ in range(4000):
        chosen = rng.choice(8, 4, replace=False) + 8 * rng.integers(2)
        found += len({order.index(expert) // 8 for expert in chosen}) / 2
    assert placed.own == pytest.approx(found / 4000, rel=0.01)


def test_groups_scored_by_two_experts_cost_hardly_more() -> None:
    placement, router = ExpertPlacement(num_experts=256, ep=16), routing(8, 8, 4, "top2")
    found = simulate(mesh(2, 8), placement, router, 20_000 // 16, seed=0)
    copies = copies_per_token("dedup", placement, router, mesh(2, 8))
    assert copies.inter_node == pytest.approx(found["dedup", LinkClass.INTER_NODE], rel=0.01)
    assert copies.inter_node < found["dedup", LinkClass.INTER_NODE]


def test_without_a_group_limit_a_rank_is_missed_as_often_as_combinations_say() -> None:
    placement = ExpertPlacement(num_experts=64, ep=8)
    for router in (routing(6), routing(6, 4, 4)):
        copies = copies_per_token("dedup", placement, router, mesh(1, 8))
        assert copies.own == pytest.approx(1 - comb(56, 6) / comb(64, 6), abs=1e-12)


def wire(d_model: int, tokens_per_rank: int = 4096, **changes: int) -> Wire:
    return Wire(d_model=d_model, tokens_per_rank=tokens_per_rank, **changes)


def test_bytes_of_two_levels_by_hand() -> None:
    """8 experts on 2 nodes x 2 ranks, top-2: a node is missed by C(4,2)/C(8,2) of the tokens, a rank by C(6,2)/C(8,2)."""
    placement, node, rank = ExpertPlacement(num_experts=8, ep=4), 1 - 6 / 28, 1 - 15 / 28
    hierarchical = forward_traffic("hierarchical", placement, routing(2), mesh(2, 2), wire(8, 16))
    assert hierarchical.inter_node == pytest.approx(2 * node * 8 * 4 + 1 * (4 + 2) + (2 + 2 * 2) * 8 / 16)
    assert hierarchical.intra_node == pytest.approx(2 * 2 * rank * 8 * 4 + 1 * (4 + 2) + 2 * 8 / 16)
    allgather = forward_traffic("allgather", placement, routing(2), mesh(2, 2), wire(8, 16))
    assert allgather.inter_node == pytest.approx(1 * (2 * 8 * 4 + 2 * (4 + 2)) + 2 * 3 * 8 / 16)
    assert allgather.intra_node == pytest.approx(2 * (2 * 8 * 4 + 2 * (4 + 2)) + 1 * 3 * 8 / 16)


def test_on_one_node_hierarchical_is_dedup() -> None:
    placement = ExpertPlacement(num_experts=16, ep=4)
    for of in (copies_per_token, lambda *args: forward_traffic(*args, wire(64))):
        assert of("hierarchical", placement, routing(3), mesh(2, 4, ep=4)) == of(
            "dedup", placement, routing(3), mesh(2, 4, ep=4)
        )


def test_auto_takes_the_fastest_and_hierarchical_on_several_nodes_alone() -> None:
    for seed in range(200):
        generator = np.random.default_rng(seed)
        spec, placement, router = random_case(generator)
        links = Links(intra=generator.uniform(1e9, 1e12), inter=generator.uniform(1e9, 1e11), latency=2e-5)
        kind = choose_dispatch(placement, router, spec, wire(1024), links)
        assert kind != "allgather"
        assert kind != "hierarchical" or (spec.nodes_per_ep_group > 1 and spec.ranks_per_node > 1)
        if kind != "local":
            seconds = {
                each: exchange_seconds(each, placement, router, spec, wire(1024), links) for each in ("flat", "dedup")
            }
            assert exchange_seconds(kind, placement, router, spec, wire(1024), links) <= min(seconds.values())


def test_experts_that_choose_are_independent() -> None:
    """Each of 16 experts takes K / E of the tokens, so a rank of 4 is missed by (1 - 3/16)^4 of them."""
    placement, spec = ExpertPlacement(num_experts=16, ep=4), mesh(2, 2)
    router = dataclasses.replace(routing(3), choice="expert", capacity_factor=1.0, drop="score")
    copies = {kind: copies_per_token(kind, placement, router, spec) for kind in KINDS}
    assert copies["flat"].inter_node == pytest.approx(2 * 3 / 4)
    assert copies["dedup"].intra_node == pytest.approx(1 - (13 / 16) ** 4)
    assert copies["hierarchical"].inter_node == pytest.approx(1 - (13 / 16) ** 8)
    scores = torch.rand(8192, 16, generator=torch.Generator().manual_seed(0))
    _, counts = torch.ops.moecompile.count_hops(torch.ops.moecompile.expert_choice(scores, 3, 1.0), 16, 2, 2)
    assert float(counts[:, 0].double().mean()) / 8192 == pytest.approx(copies["hierarchical"].inter_node, abs=0.02)
    assert float(counts[:, 2::2].double().mean()) / 8192 == pytest.approx(copies["dedup"].intra_node, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_metadata_is_at_most_three_percent(kind: str, nodes: int) -> None:
    """Rows of 1024 bf16 numbers, 4096 tokens a rank: ids, weights and counts, of all bytes and of those across nodes."""
    placement, router, spec = ExpertPlacement(num_experts=256, ep=8 * nodes), routing(8, 8, 4), mesh(nodes, 8)
    copies = copies_per_token(kind, placement, router, spec)
    traffic = forward_traffic(kind, placement, router, spec, wire(1024, element_bytes=2))
    rows = 2 * 1024 * 2
    assert 1 - copies.inter_node * rows / traffic.inter_node < 0.03
    assert 1 - copies.intra_node * rows / traffic.intra_node < 0.03


def test_the_wire_dtype_says_how_wide_a_row_is() -> None:
    """There and back; in eight bits a byte a number and the scales of each block, of which the last is shorter."""
    known = {"auto": (800, 800), "fp32": (400, 400), "bf16": (200, 200), "fp8": (104, 200), "fp8_128": (104, 200)}
    assert {name: WIRE_FORMATS[name].row_bytes(100, 8) for name in known} == known
    assert WIRE_FORMATS["fp8"].row_bytes(7168, 4) == (7168 + 224, 2 * 7168)  # 0.516 of bf16, 0.758 both ways
    assert WIRE_FORMATS["fp8_128"].row_bytes(7168, 4) == (7168 + 4 * 56, 2 * 7168)
