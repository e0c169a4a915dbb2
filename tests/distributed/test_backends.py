"""Back ends of tests/backends.py in place of our dispatch and our experts: everything equals the plain layer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moecompile.mesh import MeshSpec
from tests.distributed import dispatch_job as job
from tests.distributed.dispatch_job import Case
from tests.distributed.harness import run_distributed_test

DISPATCH = "tests.backends:once_per_rank"
IN_FLIGHT = "tests.backends:in_flight"
EXPERTS = "tests.backends:one_by_one"
MESHES = {2: [MeshSpec(num_nodes=1, ranks_per_node=2, ep=2)], 4: [
    MeshSpec(num_nodes=2, ranks_per_node=2, ep=4), MeshSpec(num_nodes=2, ranks_per_node=2, ep=2),
]}  # fmt: skip


def _cases(world_size: int) -> list[list[Case]]:
    """By mesh: our exchanges with other experts, other exchanges with our experts, and both."""
    found = []
    for mesh in MESHES[world_size]:
        of_mesh = []
        for case in job.random_cases(mesh, 50 * world_size, 5):
            if case.kind != "flat":
                of_mesh.append(replace(case, experts_backend=EXPERTS))
            if case.kind in ("dedup", "hierarchical"):
                of_mesh += [replace(case, backend=DISPATCH), replace(case, backend=DISPATCH, experts_backend=EXPERTS)]
                of_mesh += [replace(case, backend=IN_FLIGHT, chunks=chunks) for chunks in (1, 3)]
                of_mesh += [
                    replace(case, backend=DISPATCH, slots=1),
                    replace(case, backend=IN_FLIGHT, slots=2, chunks=2),
                ]
        found.append(of_mesh)
    return found


def _wrong(rank: int, world_size: int) -> dict[str, float]:
    """Of a back end that returns gradients in another order."""
    case = next(c for c in job.random_cases(MESHES[world_size][0], 7, 1) if c.kind == "dedup" and min(c.tokens) > 1)
    return job.errors_of([replace(case, backend="tests.backends:wrong_way")], rank)[0]


def _errors(rank: int, world_size: int) -> tuple[list[tuple[Case, dict[str, float]]], dict[str, float]]:
    found = [each for cases in _cases(world_size) for each in zip(cases, job.errors_of(cases, rank), strict=True)]
    return found, _wrong(rank, world_size)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_other_back_ends_equal_the_plain_layer(world_size: int) -> None:
    """Also drops, ranks without tokens, top-1 to top-8: output and every gradient; and a wrong one is seen."""
    for rank, (results, wrong) in enumerate(run_distributed_test(_errors, world_size, timeout_s=170)):
        assert wrong["output"] <= 1e-10 and wrong["x"] > 1e-3
        assert {(bool(case.backend), bool(case.experts_backend)) for case, _ in results} == {
            (True, True), (True, False), (False, True),
        }  # fmt: skip
        for case, errors in results:
            assert max(errors.values()) <= 1e-10, (rank, case, errors)
