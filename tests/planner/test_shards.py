"""Memory and bytes of experts whose ranks do not divide them, by hand."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest

from moecompile.mesh import MeshSpec
from moecompile.plan import Estimate, ExpertShards
from moecompile.planner.cost_model.counts import parallel_bytes, step_bytes
from moecompile.planner.cost_model.inputs import Inputs, Layout, Machine, Software
from moecompile.planner.params import WeightFact
from moecompile.planner.search.described import memory_of
from moecompile.planner.shards import Padding, padding
from moecompile.planner.traffic import Links
from tests.planner.search.test_described import TINY
from tests.planner.test_estimate import FACTS, RUN, layer
from tests.tiny import estimate

EXPERTS, DENSE, ROUTER = 4 * 384, 1284, 32  # stacks of (4, 32, 8) and (4, 8, 16)


def on(mesh: MeshSpec) -> Estimate:
    return estimate([layer(mesh.ep, "flat" if mesh.ep > 1 else "local")], mesh, FACTS, RUN, memory_bytes=1e9)


def test_eight_ranks_share_four_experts_evenly() -> None:
    found = on(MeshSpec(ranks_per_node=8))
    assert found.memory_bytes_per_rank.optimizer == 8 * (ceil(DENSE / 8) + EXPERTS // 8 + ROUTER)
    assert found.expert_shards == ExpertShards(
        ranks=8, stored=4 * EXPERTS // 8, gathered=4 * EXPERTS * 7 // 8, reduced=4 * EXPERTS * 7 // 8, times_even=1.0
    )


def test_what_no_dim_allows_is_planned_as_it_is() -> None:
    """Three ranks have two, two and no experts, and send as if all had two."""
    found = on(MeshSpec(ranks_per_node=3))
    memory, half = found.memory_bytes_per_rank, EXPERTS // 2
    own, unsharded = DENSE // 3 + half, 800 + (1668 - 800 - 384) // 2 + 3 * half
    assert memory.optimizer == 8 * (own + ROUTER) and memory.weights == 4 * (own + unsharded + ROUTER)
    assert found.expert_shards == ExpertShards(
        ranks=3, stored=4 * half, gathered=2 * 4 * half, reduced=2 * 4 * half, times_even=1.5
    )


def test_rows_are_filled_up() -> None:
    """7,168 rows on 2,048 ranks are 8,192, of vectors too; what tp splits has fewer rows."""
    mesh = MeshSpec(num_nodes=256, ranks_per_node=8, ep=4)
    weights = (
        WeightFact(rows=7168, params=3 * 7168 * 10), WeightFact(rows=7168, params=7168, is_root=True),
        WeightFact(rows=7, params=999, site="layers.0.mlp"), WeightFact(rows=4096, params=4096, split="rows"),
    )  # fmt: skip
    facts = replace(FACTS, weights=weights)
    assert padding([layer(4, "flat")], mesh, facts) == Padding(layers=3 * 1024 * 10, root=1024)
    tp = padding([layer(4, "flat")], MeshSpec(num_nodes=192, ranks_per_node=8, ep=4, tp=2), facts)
    assert tp == Padding(layers=3 * (10 * 768 - 7168) * 10 + 3 * 768 - 2048, root=10 * 768 - 7168)
    gated = replace(
        layer(4, "flat", d_expert=8, d_shared=8),
        experts=replace(layer(d_expert=8, d_shared=8).experts, shared_gate=True),
    )
    assert padding([gated], mesh, facts).layers == 3 * 1024 * 10 + 3 * 8 * 2040 + 8 * 2047
    assert padding([gated], MeshSpec(), facts) == Padding()


def test_a_rank_with_experts_of_its_own_shares_none() -> None:
    assert on(MeshSpec(ranks_per_node=4, ep=4)).expert_shards is None
    assert on(MeshSpec(ranks_per_node=4, ep=2, dp_replicate=2)).expert_shards is None


def test_a_forecast_counts_what_is_padded() -> None:
    """8 experts of 64 x 32: over 16 ranks along another dim, over 3 ranks 3 of them on the fullest."""
    machine = Machine(
        name="any", peak={16: 1.0}, watts=1.0, memory=1.0, passes=1.0, links=Links(intra=1.0, inter=1.0), domain=64,
        units=1, capacity=1.0,
    )  # fmt: skip
    experts = 4 * 8 * 3 * 64 * 32
    for gpus, fullest in ((16, 1 / 16), (3, 3 / 8)):
        layout = Layout(gpus=gpus, seq=16, global_batch=gpus, zero=3)
        even = step_bytes(TINY, replace(layout, zero=1), machine, Software()).owned
        owned = even + experts * (fullest - 1 / gpus)
        assert step_bytes(TINY, layout, machine, Software()).owned == pytest.approx(owned)
        assert parallel_bytes(TINY, layout, machine, Software()).gathered.intra == pytest.approx(8 * owned * (gpus - 1))
        assert memory_of(Inputs(model=TINY, layout=layout, machine=machine, software=Software()))[
            "optimizer"
        ] == pytest.approx(12 * owned)
