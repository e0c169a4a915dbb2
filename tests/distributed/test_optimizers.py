"""Muon on sharded weights is Muon on whole matrices, on every kind of mesh and layout; so are groups by pattern."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moecompile.checkpoint.tensors import read_tensors, shapes
from moecompile.runtime.weight_groups import make_optimizer
from moecompile.verify import worst
from tests.distributed import manual_job
from tests.distributed import optimizer_job as job
from tests.distributed.harness import run_distributed_test
from tests.distributed.resume_job import run
from tests.distributed.test_manual import MESHES, accumulated

Found = dict[str, tuple[job.Run, job.Run | None]]


def four_ranks(rank: int, world_size: int) -> Found:
    """Case -> the run on this rank, and on rank 0 the plain loop."""
    return {name: (job.sharded(case), job.looped(case) if rank == 0 else None) for name, case in job.CASES.items()}


@pytest.fixture(scope="module")
def found() -> list[Found]:
    return run_distributed_test(four_ranks, 4, timeout_s=300)


@pytest.mark.slow
@pytest.mark.parametrize("case", job.CASES)
def test_every_weight_is_that_of_a_plain_loop(found: list[Found], case: str) -> None:
    got, wanted = found[0][case]
    assert wanted is not None and got.weights.keys() == wanted.weights.keys()
    for name, weight in wanted.weights.items():
        torch.testing.assert_close(got.weights[name], weight, rtol=0, atol=1e-13, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", job.CASES)
def test_state_and_bytes_are_as_planned(found: list[Found], case: str) -> None:
    """One momentum for a matrix and two moments for the rest; bytes are the mean over the ranks."""
    got, wanted = found[0][case]
    assert wanted is not None and got.state == wanted.state
    assert got.of_muon == wanted.of_muon
    sent = sum(of_rank[case][0].bytes_sent for of_rank in found) / len(found)
    assert sent == pytest.approx(got.planned, rel=1e-6)


MUON = [
    "optimizer=muon", "trainer.max_steps=4", "trainer.save_interval=2", "trainer.keep_last=0",
    'optimizer.groups=[{match: "*norm*", lr_scale: 0.5}]', "balance.rate=0.01",
]  # fmt: skip
EP2 = ["mesh=cpu_2x2", "mesh.ep=2", "dispatch=flat"]


def resumed(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """A run in float64, and another one that goes on from its middle on another mesh: losses."""
    root = Path(folder)
    whole = run([*MUON, "mesh=cpu_2x2"], root / "whole", change=lambda model: model.double())
    resume = f"trainer.resume={root}/whole/checkpoints/step-2"
    other = run([*MUON, *EP2, resume], root / "other", change=lambda model: model.double())
    return {name: (out.loss_last, out.optimizer_bytes_per_step) for name, out in (("whole", whole), ("other", other))}


def entries(checkpoint: Path) -> dict[str, Tensor]:
    found = {name: torch.empty(shape, dtype=torch.float64) for name, shape in shapes(checkpoint).items()}
    read_tensors(checkpoint, found, orders={})
    return found


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(tmp_path: Path) -> None:
    out = run_distributed_test(resumed, 4, str(tmp_path), timeout_s=300)[0]
    whole, other = (entries(tmp_path / name / "checkpoints" / "step-4") for name in ("whole", "other"))
    assert whole.keys() == other.keys()
    assert any(name.endswith(".momentum_buffer") for name in whole) and any(name.endswith(".exp_avg") for name in whole)
    for name, tensor in whole.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-10, msg=name)
    assert out["other"][0] == pytest.approx(out["whole"][0], abs=1e-10)
    assert out["whole"][1].intra_node > 0 and out["whole"][1] == out["other"][1]


def both_optimizers(module: Any) -> list[torch.optim.Optimizer]:
    muon = make_optimizer(module.model, ["optimizer=muon", "optimizer.lr=0.02", "optimizer.muon.steps=4"])
    return [muon, torch.optim.AdamW(module.other.parameters(), lr=0.02)]


MANUAL = manual_job.Recipe(step=partial(accumulated, mean=False), optimizers=both_optimizers, loss="sum")


def manual(rank: int, world_size: int) -> list[dict[str, Any]]:
    return [manual_job.on_ranks(MANUAL, world_size, mesh) for mesh in MESHES.values()]


@pytest.mark.slow
def test_manual_optimization_steps_it_too() -> None:
    """Accumulated, clipped, beside another optimizer; on one process the gradients are plain autograd's."""
    wanted = manual_job.on_one(MANUAL, 2)
    for got in run_distributed_test(manual, 2, timeout_s=200)[0]:
        assert worst(got["weights"], wanted["weights"])[0] <= 1e-10
