"""A step of narrow moments and weights on shards is that of whole weights, bit for bit, and holds the planned bytes."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moecompile.checkpoint.tensors import entries_of, read_tensors
from tests.distributed import moments_job as job
from tests.distributed.harness import run_distributed_test
from tests.distributed.resume_job import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found() -> list[Any]:
    return run_distributed_test(job.four_ranks, 4, timeout_s=300)


@pytest.mark.parametrize(("mesh", "kind"), job.CASES)
def test_shards_are_stepped_as_whole_weights(found: list[Any], mesh: str, kind: str) -> None:
    got, wanted, held = found[0][mesh, kind]
    in_codes = "optimizer.state=int8" in job.KINDS[kind].settings
    assert got.weights.keys() == wanted.weights.keys() and got.moments.keys() == wanted.moments.keys()
    assert any(name.endswith("_scale") for name in wanted.moments) == in_codes
    for side, others in ((wanted.weights, got.weights), (wanted.moments, got.moments)):
        for name, tensor in side.items():
            if not (mesh == "tp" and in_codes and job.OTHER_BLOCKS in name):
                assert others[name].dtype == tensor.dtype and torch.equal(others[name], tensor), name
    assert not any(job.FROZEN in name for name in wanted.moments)
    for of_rank in found:  # replicas and what every rank has whole
        assert all(torch.equal(of_rank[mesh, kind][0].weights[name], weight) for name, weight in got.weights.items())
    assert max(held) == pytest.approx(got.planned, rel=0.01)  # the fullest rank has more rows of a few weights
    assert max(held) >= got.planned


TINY = ["trainer.max_steps=4", "trainer.save_interval=2", "trainer.keep_last=0", "balance.rate=0.01"]
EP4, EP2 = ["mesh=cpu_2x2"], ["mesh=cpu_2x2", "mesh.ep=2", "dispatch=flat"]
AS_LONG = {"fp32": "int8", "int8": "fp32", "bf16": "int8"}
"""A kind, and what a run goes on with from its middle."""
BF16_WEIGHTS = ("nearest", "master")


def resumed(rank: int, world_size: int, folder: str) -> tuple[dict[str, float], str]:
    """A run of each kind, one that goes on from its middle on the same mesh, and others with another kind or mesh: the
    last losses, and what was printed.
    """
    with redirect_stdout(StringIO()) as said:
        return _resumed(folder), said.getvalue()


def _resumed(folder: str) -> dict[str, float]:
    root, losses = Path(folder), dict[str, float]()

    def one(name: str, setting: str, mesh: list[str], start: str | None = None) -> None:
        resume = [] if start is None else [f"trainer.resume={root}/{start}/checkpoints/step-2"]
        change = torch.nn.Module.bfloat16 if "bf16_weights" in setting else torch.nn.Module.float
        losses[name] = float(run([*TINY, setting, *mesh, *resume], root / name, change=change).loss_last or 0.0)

    for kind, other in AS_LONG.items():
        one(kind, f"optimizer.state={kind}", EP4)
        if kind != "fp32":  # as test_resume.py does
            one(f"{kind}, again", f"optimizer.state={kind}", EP4, kind)
        one(f"{kind}, {other}", f"optimizer.state={other}", EP4, kind)
    one("int8, mesh", "optimizer.state=int8", EP2, "int8")
    for weights in BF16_WEIGHTS:
        one(weights, f"optimizer.bf16_weights={weights}", EP4)
    one("master, again", "optimizer.bf16_weights=master", EP4, "master")
    one("nearest, master", "optimizer.bf16_weights=master", EP4, "nearest")
    one("master, stochastic", "optimizer.bf16_weights=stochastic", EP4, "master")
    return losses


def entries(checkpoint: Path) -> dict[str, Tensor]:
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in entries_of(checkpoint).items()}
    read_tensors(checkpoint, found, orders={})
    return found


def kinds_of(found: dict[str, Tensor]) -> set[torch.dtype]:
    """Dtypes of second moments of what FSDP cuts."""
    return {v.dtype for name, v in found.items() if name.endswith(".exp_avg_sq") and ".router." not in name}


def test_a_run_goes_on(tmp_path: Path) -> None:
    losses, said = run_distributed_test(resumed, 4, str(tmp_path), timeout_s=600)[0]
    ends = {name: entries(tmp_path / name / "checkpoints" / "step-4") for name in losses}
    for kind in ("int8", "bf16", "master"):
        again = ends[f"{kind}, again"]
        assert again.keys() == ends[kind].keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in ends[kind].items()), kind
    assert losses["int8, mesh"] == pytest.approx(losses["int8"], abs=2e-4)  # sums of gradients round otherwise
    for kind, other in AS_LONG.items():
        assert ends[f"{kind}, {other}"].keys() == ends[other].keys()
        assert kinds_of(ends[f"{kind}, {other}"]) == kinds_of(ends[other]) != kinds_of(ends[kind])
        assert losses[f"{kind}, {other}"] == pytest.approx(losses[kind], abs=2e-3)
        assert f"moments from {kind} to {other}" in said
    assert kinds_of(ends["int8"]) == {torch.uint8, torch.float32}
    masters = {name for name in ends["master"] if name.endswith(".master")}
    assert masters and masters <= ends["nearest, master"].keys()
    assert not masters & ends["master, stochastic"].keys()
    for name in masters:
        weight = ends["master"][f"model.{name.removeprefix('optimizer.').removesuffix('.master')}"]
        assert torch.equal(ends["master"][name].bfloat16(), weight)
    assert losses["nearest, master"] == pytest.approx(losses["nearest"], abs=0.05)
