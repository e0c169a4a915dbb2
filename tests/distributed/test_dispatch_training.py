"""Three optimizer steps of a whole model over two levels equal one process, as tests/distributed/test_gradients.py says.

Four ranks as two nodes of two, and as four nodes of one whose EP groups span two of them.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from moecompile.verify import worst
from tests.distributed import gradient_job as job
from tests.distributed.harness import run_distributed_test

MESHES = {
    f"{name}-{kind}": [*mesh, f"dispatch.kind={kind}"]
    for kind in ("hierarchical", "allgather")
    for name, mesh in {
        "2x2": ["mesh.num_nodes=2", "mesh.ranks_per_node=2"],
        "4x1-ep2": ["mesh.num_nodes=4", "mesh.ep=2"],
    }.items()
}
TOLERANCE = 1e-10


@cache
def traces() -> tuple[job.Trace, dict[str, job.Trace]]:
    """One process, and what all meshes did in one launch."""
    return job.reference(torch.float64), run_distributed_test(_all_meshes, 4, timeout_s=170)[0]


def _all_meshes(rank: int, world_size: int) -> dict[str, job.Trace]:
    return {name: job.sharded(rank, world_size, torch.float64, mesh) for name, mesh in MESHES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_ranks_equal_one_process(mesh: str) -> None:
    wanted, by_mesh = traces()
    got = by_mesh[mesh]
    assert got.losses == pytest.approx(wanted.losses, rel=TOLERANCE)
    assert got.norms == pytest.approx(wanted.norms, rel=TOLERANCE)
    assert worst(got.grads, wanted.grads) < (TOLERANCE, "")
    assert worst(got.weights, wanted.weights) < (TOLERANCE, "")
