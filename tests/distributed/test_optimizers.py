"""Muon on sharded weights is Muon on whole matrices, on every kind of mesh and layout; so are groups by pattern."""

from __future__ import annotations

import pytest

from tests.distributed import optimizer_job as job
from tests.distributed.harness import run_distributed_test


def four_ranks(rank: int, world_size: int) -> dict[str, tuple[dict[str, float], dict[str, int]]]:
    """Case -> relative error of each weight, and entries of this rank's optimizer state per weight."""
    found = {}
    for name, case in job.CASES.items():
        got, wanted = job.sharded(case), job.looped(case)
        assert got.weights.keys() == wanted.weights.keys()
        assert got.state == wanted.state, name  # global sizes: one momentum for a matrix, two moments for the rest
        errors = {
            weight: float((got.weights[weight] - whole).abs().max() / whole.abs().max())
            for weight, whole in wanted.weights.items()
        }
        found[name] = (errors, got.bytes_sent)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, tuple[dict[str, float], int]]]:
    return run_distributed_test(four_ranks, 4, timeout_s=200)


@pytest.mark.slow
@pytest.mark.parametrize("case", job.CASES)
def test_every_weight_is_that_of_a_plain_loop(found: list[dict[str, tuple[dict[str, float], int]]], case: str) -> None:
    errors = found[0][case][0]
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1e-10, (worst, errors[worst])
