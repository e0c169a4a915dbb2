"""Any layer over any ranks equals the same layer written plainly, and sends what a recount of its ids says.

Hypothesis draws 1 to 8 ranks on 1 to 4 nodes, experts, top-k, how many tokens each rank has and how they choose; what
it finds wrong it makes small.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from moecompile.mesh import MeshSpec
from moecompile.passes.shard import bind_axes, device_mesh_of
from tests.distributed import dispatch_job as job
from tests.distributed.dispatch_job import Case
from tests.distributed.ranks import Ranks

TOLERANCE = 1e-10
TIMEOUT_S = 280


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A layer on a mesh. One rank has `local` dispatch, several have each kind that the mesh allows."""
    num_nodes = draw(st.integers(1, 4))
    ranks_per_node = draw(st.integers(1, 8 // num_nodes))
    world = num_nodes * ranks_per_node
    spans = [n for n in range(1, world + 1) if world % n == 0 and not (n % ranks_per_node and ranks_per_node % n)]
    mesh = MeshSpec(num_nodes=num_nodes, ranks_per_node=ranks_per_node, ep=draw(st.sampled_from(spans)))
    kinds = ("local",) if mesh.ep == 1 else job.kinds_on(mesh)
    experts_per_rank = draw(st.integers(1, 4))
    top_k = draw(st.integers(1, min(8, mesh.ep * experts_per_rank)))
    return Case(
        kind=draw(st.sampled_from(kinds)),
        mesh=mesh,
        experts_per_rank=experts_per_rank,
        top_k=top_k,
        tokens=tuple(draw(st.lists(st.integers(0, 12), min_size=world, max_size=world))),
        routing=draw(st.sampled_from(job.ROUTINGS)),
        seed=draw(st.integers(0, 1000)),
    )


class Pools:
    """Ranks of each world size, started when they are asked first."""

    def __init__(self) -> None:
        self._by_size: dict[int, Ranks] = {}

    def __getitem__(self, world_size: int) -> Ranks:
        if world_size not in self._by_size:
            self._by_size[world_size] = Ranks(world_size, TIMEOUT_S)
        return self._by_size[world_size]

    def close(self) -> None:
        for ranks in self._by_size.values():
            ranks.close()


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    started = Pools()
    yield started
    started.close()


def errors(rank: int, case: Case) -> dict[str, float]:
    """As `dispatch_job.errors_of`, but for one layer."""
    module = job.lowered(case, rank % case.mesh.ep)
    bind_axes(nn.ModuleList([module]), device_mesh_of(case.mesh, "cpu"), case.num_nodes)
    got, sent = job.run(module, case, rank)
    return job.compare(case, rank, got, sent)


def check(pools: Pools, case: Case) -> None:
    for rank, found in enumerate(pools[case.mesh.world_size].ask(errors, case)):
        assert max(found.values()) <= TOLERANCE, (rank, case, found)


FIXED = {"deadline": None, "derandomize": True, "database": None}
CHECKS = {"suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@pytest.mark.slow
@given(case=cases())
@settings(max_examples=40, **FIXED, **CHECKS)
def test_any_layer_equals_the_plain_one(pools: Pools, case: Case) -> None:
    check(pools, case)


@pytest.mark.slow
@given(case=cases())
@settings(max_examples=150, deadline=None, print_blob=True, **CHECKS)
def test_many_more_layers_equal_the_plain_one(pools: Pools, case: Case) -> None:
    """Other ones each time."""
    check(pools, case)
