"""The closed form against published figures, hand counts and a simulation."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from moecompile.errors import PlanError
from moecompile.mesh import LinkClass, MeshSpec
from moecompile.plan import ExpertPlacement, RoutingPlan
from moecompile.planner import Wire, choose_dispatch, copies_per_token, forward_traffic


def routing(top_k: int, groups: int = 1, top_groups: int = 1, group_score: str = "max") -> RoutingPlan:
    return RoutingPlan(
        top_k=top_k, score="softmax", normalize=True, scale=1.0,
        groups=groups, top_groups=top_groups, group_score=group_score,
    )  # fmt: skip


def mesh(num_nodes: int, ranks_per_node: int, ep: int | None = None) -> MeshSpec:
    return MeshSpec(num_nodes=num_nodes, ranks_per_node=ranks_per_node, ep=ep or num_nodes * ranks_per_node)


@pytest.mark.parametrize(("nodes", "flat", "dedup"), [(8, 7.00, 6.55), (4, 6.00, 5.14), (2, 4.00, 2.86)])
def test_copies_across_nodes_of_deepseek_v3(nodes: int, flat: float, dedup: float) -> None:
    """256 experts, top-8, 4 of 8 groups, nodes of 8 ranks: figures simulated with groups scored by their two best."""
    placement, router = ExpertPlacement(num_experts=256, ep=8 * nodes), routing(8, 8, 4)
    found = [copies_per_token(kind, placement, router, mesh(nodes, 8)).inter_node for kind in ("flat", "dedup")]
    assert found == pytest.approx([flat, dedup], rel=0.01)


def test_every_assignment_has_one_flat_copy() -> None:
    copies = copies_per_token("flat", ExpertPlacement(num_experts=64, ep=8), routing(6), mesh(2, 4))
    assert copies.own + copies.intra_node + copies.inter_node == pytest.approx(6)
    assert copies.inter_node == pytest.approx(3)


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


def test_auto_is_local_then_least_inter_node_then_least_total() -> None:
    wide, narrow = (Wire(d_model=width, tokens_per_rank=4096) for width in (1024, 1))
    assert choose_dispatch(ExpertPlacement(num_experts=8, ep=1), routing(2), mesh(1, 1), wide) == "local"
    placement = ExpertPlacement(num_experts=8, ep=4)
    assert choose_dispatch(placement, routing(4), mesh(2, 2), wide) == "dedup"
    assert choose_dispatch(placement, routing(1), mesh(2, 2), wide) == "flat"  # nothing to merge, only metadata
    assert choose_dispatch(placement, routing(4), mesh(1, 4), wide) == "dedup"  # no inter-node link: total decides
    assert choose_dispatch(placement, routing(4), mesh(1, 4), narrow) == "flat"


def test_too_few_open_experts_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"1 of 4 groups hold only 2 experts\. Use at most 2"):
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


def simulate(
    spec: MeshSpec, placement: ExpertPlacement, router: RoutingPlan, num_tokens: int, rng: np.random.Generator
) -> dict[tuple[str, LinkClass], float]:
    """Rows per token by dispatch and link class, counted for tokens on every rank of the first EP group."""
    size, best = placement.num_experts // router.groups, {"max": 1, "top2": 2}[router.group_score]
    score = rng.standard_normal((num_tokens, placement.num_experts))
    by_group = np.sort(score.reshape(num_tokens, router.groups, size), axis=2)[:, :, -best:].sum(2)
    open_groups = np.argsort(-by_group, axis=1)[:, : router.top_groups]
    is_open = (np.arange(placement.num_experts) // size == open_groups[:, :, None]).any(axis=1)
    chosen = np.argsort(np.where(is_open, -score, np.inf), axis=1)[:, : router.top_k]
    rows = np.zeros((num_tokens, placement.ep))
    np.add.at(rows, (np.arange(num_tokens)[:, None], chosen // placement.experts_per_rank), 1)
    mean_rows = {"flat": rows.mean(0), "dedup": (rows > 0).mean(0)}
    found = {(kind, link): 0.0 for kind in mean_rows for link in LinkClass}
    peers = spec.ep_peers(0)
    for kind, rows_to in mean_rows.items():
        for source in peers:
            for index, target in enumerate(peers):
                found[kind, spec.link(source, target)] += float(rows_to[index]) / len(peers)
    return found


@pytest.mark.parametrize("seed", range(24))
def test_closed_form_equals_simulation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec, placement, router = random_case(rng)
    found = simulate(spec, placement, router, 20_000, rng)
    for kind in ("flat", "dedup"):
        copies = copies_per_token(kind, placement, router, spec)
        expected = [copies.own, copies.intra_node, copies.inter_node]
        assert expected == pytest.approx([found[kind, link] for link in LinkClass], abs=0.05), (spec, placement, router)


@pytest.mark.parametrize(
    ("num_experts", "ep", "groups"), [(12, 6, 4), (12, 2, 6), (12, 4, 4), (12, 12, 3), (18, 3, 2), (60, 4, 6)]
)
def test_ranks_may_hold_parts_of_groups_or_several(num_experts: int, ep: int, groups: int) -> None:
    """Part of one group, parts of two, exactly one, several, several and a part."""
    placement, router = ExpertPlacement(num_experts=num_experts, ep=ep), routing(3, groups, 2)
    found = simulate(mesh(1, ep), placement, router, 50_000, np.random.default_rng(0))
    copies = copies_per_token("dedup", placement, router, mesh(1, ep))
    assert copies.intra_node == pytest.approx(found["dedup", LinkClass.INTRA_NODE], abs=0.02)


def test_groups_scored_by_two_experts_cost_hardly_more() -> None:
    placement, router = ExpertPlacement(num_experts=256, ep=16), routing(8, 8, 4, "top2")
    found = simulate(mesh(2, 8), placement, router, 20_000, np.random.default_rng(0))
    copies = copies_per_token("dedup", placement, router, mesh(2, 8))
    assert copies.inter_node == pytest.approx(found["dedup", LinkClass.INTER_NODE], rel=0.01)
    assert copies.inter_node < found["dedup", LinkClass.INTER_NODE]


def test_without_a_group_limit_a_rank_is_missed_as_often_as_combinations_say() -> None:
    placement = ExpertPlacement(num_experts=64, ep=8)
    for router in (routing(6), routing(6, 4, 4)):
        copies = copies_per_token("dedup", placement, router, mesh(1, 8))
        assert copies.own == pytest.approx(1 - comb(56, 6) / comb(64, 6), abs=1e-12)
