"""Exchanges in flight over real ranks: the same outputs, gradients and bytes as the plain layer, and no rank left waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moecompile.plan import IN_FLIGHT
from tests.distributed import dispatch_job as job
from tests.distributed.dispatch_job import Case
from tests.distributed.harness import run_distributed_test
from tests.distributed.test_dispatch_kinds import MESHES, TOLERANCE

CHUNKS = (1, 2, 3, 4)


def _cases(world_size: int) -> list[list[Case]]:
    """By mesh: every kind whose exchanges can be in flight, in 1 to 4 chunks of 0 to 9 tokens."""
    found = []
    for i, spec in enumerate(MESHES[world_size]):
        cases = [case for case in job.random_cases(spec, 10 * world_size + i, 5) if case.kind in IN_FLIGHT]
        found.append([replace(case, chunks=chunks) for case in cases for chunks in CHUNKS])
    return found


def _errors(rank: int, world_size: int) -> list[tuple[Case, dict[str, float]]]:
    return [result for cases in _cases(world_size) for result in zip(cases, job.errors_of(cases, rank), strict=True)]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_kind_equals_the_plain_layer(world_size: int) -> None:
    for rank, results in enumerate(run_distributed_test(_errors, world_size, timeout_s=170)):
        for case, errors in results:
            assert max(errors.values()) <= TOLERANCE, (rank, case, errors)
