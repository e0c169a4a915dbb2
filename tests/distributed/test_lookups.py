"""Rows that are spread over ranks: lookups by unequal numbers of tokens, and checkpoints that every mesh reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from moecompile.checkpoint.placed import BY_ID
from moecompile.checkpoint.tensors import read_tensors, shapes
from moecompile.ops.lookups import read_rows, rows_of_a_rank
from tests.distributed.harness import run_distributed_test
from tests.distributed.resume_job import losses, run
from tests.tiny import SHORT

ROWS, WIDTH = 23, 3
ASKED = ([5, 5, 22, 0], [], [1], list(range(ROWS)) * 2)
"""Ids of each rank's tokens: repeated, none, one, all."""


def looked_up(rank: int, world_size: int) -> dict[str, float]:
    """Largest differences from an embedding in one process, of outputs and of this rank's rows of the gradient."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=generator)
    grads = [torch.randn(len(ids), WIDTH, dtype=torch.float64, generator=generator) for ids in ASKED[:world_size]]
    each, axis, ops = rows_of_a_rank(ROWS, world_size), dist.group.WORLD.group_name, torch.ops.moecompile  # type: ignore[union-attr]
    mine = slice(rank * each, (rank + 1) * each)
    own = table[mine].clone().requires_grad_()
    ids = torch.tensor(ASKED[rank], dtype=torch.long)
    unique, places = ops.unique_ids(ids, ROWS)
    asked, sizes = ops.send_ids(unique, ROWS, axis)
    out = ops.return_rows(read_rows(own, asked, -1), sizes, places, torch.float64, axis)
    out.backward(grads[rank])
    whole = table.clone().requires_grad_()
    for number, grad in enumerate(grads):
        F.embedding(torch.tensor(ASKED[number], dtype=torch.long), whole).backward(grad)
    assert whole.grad is not None and own.grad is not None
    wanted = F.embedding(ids, table)
    sent = int(unique.numel())
    return {
        "output": float((out - wanted).abs().max()) if ids.numel() else 0.0,
        "gradient": float((own.grad - whole.grad[mine]).abs().max()) if own.numel() else 0.0, "sent": sent,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_lookup_is_that_of_one_process(ranks: int) -> None:
    found = run_distributed_test(looked_up, ranks)
    assert max(each["output"] for each in found) == 0.0
    assert max(each["gradient"] for each in found) < 1e-14
    assert [each["sent"] for each in found] == [len(set(ids)) for ids in ASKED[:ranks]]


JOB = [
    "mesh=cpu_1x2", "model.factory=tests.table_models:build", "experts.num_routed=4", "routing.top_k=2",
    "data.vocab_size=300", "data.seq_len=16", "data.micro_batch_size=2", "data.global_batch_size=8", "data.val_batches=1",
    "data.val_fraction=0.01", "trainer.progress_bar=false", "trainer.log_interval=1", "optimizer.lr=0.01", SHORT,
    "embeddings.shard=ep", "embeddings.min_numbers=300", "embeddings.optimizer=lazy_adamw", "trainer.max_steps=4",
    "trainer.save_interval=1", "trainer.keep_last=0",
]  # fmt: skip


def trained(rank: int, world_size: int, folder: str, name: str, changes: list[str]) -> dict[str, Any]:
    root = Path(folder)
    outcome = run(changes, root / name, base=JOB)
    return {"share": outcome.lookup_share, "bytes": outcome.lookup_bytes}


@pytest.mark.slow
def test_a_run_goes_on_on_any_mesh(tmp_path: Path) -> None:
    def resume(name: str, step: int) -> str:
        return f"trainer.resume={tmp_path}/{name}/checkpoints/step-{step}"

    four = ["mesh=cpu_2x2", "mesh.ep=2", "mesh.dp_replicate=2"]
    whole = run_distributed_test(trained, 4, str(tmp_path), "four", four, timeout_s=200)[0]
    run_distributed_test(trained, 2, str(tmp_path), "two", [resume("four", 1)], timeout_s=200)
    stages = ["mesh=cpu_1x4", "mesh.pp=2", resume("two", 2)]
    run_distributed_test(trained, 4, str(tmp_path), "stages", stages, timeout_s=200)
    one = run_distributed_test(trained, 1, str(tmp_path), "one", ["mesh=cpu_1", resume("stages", 3)], timeout_s=200)[0]
    for name in ("two", "stages", "one"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "four"), abs=2e-5), name
    assert 0 < whole["share"] < 1 and whole["bytes"] > 0
    assert one["share"] is None  # nothing is sent
    entries = [checkpoint(tmp_path / name / "checkpoints" / "step-4") for name in ("four", "two", "stages", "one")]
    assert any(name.endswith("tables.indexed.table.exp_avg") for name in entries[0])
    for other in entries[1:]:
        assert other.keys() == entries[0].keys()
        for name, value in entries[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5, msg=name)


def checkpoint(folder: Path) -> dict[str, Tensor]:
    """The entries of tables, whole."""
    found = {name: torch.empty(shape) for name, shape in shapes(folder).items() if "tables" in name}
    read_tensors(folder, found, orders=BY_ID)
    return found
