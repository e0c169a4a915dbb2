"""N ranks equal one process: losses, every gradient, the clipped norm, bias updates and weights after three steps.

Unequal token counts, one rank without any target, gradient accumulation (two micro-batches a rank on four ranks).
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from moecompile.verify import worst
from tests.distributed import gradient_job as job
from tests.distributed.harness import run_distributed_test

TWO_BY_TWO = ["mesh.num_nodes=2", "mesh.ranks_per_node=2"]
MESHES = {
    "ep4-flat": [*TWO_BY_TWO, "mesh.ep=4", "dispatch.kind=flat"],
    "ep4-dedup": [*TWO_BY_TWO, "mesh.ep=4", "dispatch.kind=dedup"],
    "ep2x2-flat": [*TWO_BY_TWO, "mesh.ep=2", "dispatch.kind=flat"],
    "ep2x2-dedup": [*TWO_BY_TWO, "mesh.ep=2", "dispatch.kind=dedup"],
    "ep2x2-replicated": [*TWO_BY_TWO, "mesh.ep=2", "mesh.dp_replicate=2", "dispatch.kind=flat"],
    "ep1x4": [*TWO_BY_TWO, "mesh.ep=1"],
}
# relative to the largest entry of each tensor
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])


@cache
def reference(dtype: torch.dtype) -> job.Trace:
    return job.reference(dtype)


@cache
def ranks(dtype: torch.dtype) -> dict[str, list[job.Trace]]:
    """All meshes in one launch."""
    results = run_distributed_test(_all_meshes, 4, dtype, timeout_s=180)
    return {name: [result[name] for result in results] for name in MESHES}


def _all_meshes(rank: int, world_size: int, dtype: torch.dtype) -> dict[str, job.Trace]:
    return {name: job.sharded(rank, world_size, dtype, mesh) for name, mesh in MESHES.items()}


@DTYPES
@pytest.mark.parametrize("mesh", MESHES)
def test_ranks_equal_one_process(mesh: str, dtype: torch.dtype) -> None:
    wanted, tolerance = reference(dtype), TOLERANCE[dtype]
    first = ranks(dtype)[mesh][0]
    assert first.losses == pytest.approx(wanted.losses, rel=tolerance)
    assert first.norms == pytest.approx(wanted.norms, rel=tolerance)
    assert worst(first.grads, wanted.grads) < (tolerance, "")
    assert worst(first.weights, wanted.weights) < (tolerance, "")


@DTYPES
def test_all_ranks_report_the_same(dtype: torch.dtype) -> None:
    for traces in ranks(dtype).values():
        assert all(trace.norms == traces[0].norms and trace.losses == traces[0].losses for trace in traces)


def test_experts_and_routers_have_large_gradients() -> None:
    """Else agreement would say little: rounding noise agrees with nothing, zeros with everything."""
    grads = reference(torch.float64).grads
    for name in ("router.weight", "experts.gate_up_proj", "experts.down_proj", "shared_experts.up_proj.weight"):
        assert grads[f"model.layers.2.mlp.{name}"].abs().max() > 1e-5


MUTATIONS = ("divisor", "drop_exchange", "skip_router_sum")


def _mutated(rank: int, world_size: int) -> dict[str, job.Trace]:
    mesh = MESHES["ep4-flat"]
    return {m: job.sharded(rank, world_size, torch.float64, mesh, mutate=m) for m in MUTATIONS}


def test_mutations_are_caught() -> None:
    """A wrong divisor, a lost all-to-all in backward and an unsummed router each break the agreement."""
    wanted = reference(torch.float64)
    broken = run_distributed_test(_mutated, 4, timeout_s=120)[0]
    assert worst(broken["divisor"].grads, wanted.grads)[0] > 0.1
    with pytest.raises(KeyError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        worst(broken["drop_exchange"].grads, wanted.grads)
    error, name = worst(broken["skip_router_sum"].grads, wanted.grads)
    assert error > 0.1 and name.endswith("router.weight")
