"""A checkpoint of tp 2, ep 4 is read by ep 2, by one process and by another tp, bit for bit, with its optimizer's state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import plan_of
from moecompile.runtime.gradients import sum_replicated
from moecompile.runtime.groups import Groups
from tests.distributed import fold_job as job
from tests.distributed.fold_job import Case
from tests.distributed.handed_over import handed_over
from tests.distributed.harness import run_distributed_test


def passed_on(rank: int, world_size: int, case: Case, source: str | None, target: str) -> dict[str, Tensor]:
    """Reads `source`, or makes one step; writes `target`. Returns every entry whole, as a process without a mesh has it."""
    model = job.compiled(case)
    if source is not None:  # what is read must not be what is there
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
    plan = plan_of(model)
    shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    if source is None:
        ids, _ = job.micro_batches()[plan.mesh.batch_index(rank)]
        model(input_ids=ids, use_cache=False).logits.square().sum().backward()
        sum_replicated(model.parameters(), Groups.of(plan.mesh, "cpu").tokens)
        optimizer.step()
        optimizer.zero_grad()
    return handed_over(model, optimizer, source, target)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "tp"), [("qwen3", 4), ("mixtral", 2)])  # the largest that heads allow
def test_every_mesh_reads_the_same_values(architecture: str, tp: int, tmp_path: Path) -> None:
    def case(tp: int, ep: int, ranks: int) -> Case:
        return Case(architecture=architecture, tp=tp, ep=ep, ranks=ranks)

    folders = [str(tmp_path / name) for name in ("tp2_ep4", "ep2", "one", "tp_ep2")]
    written = run_distributed_test(passed_on, 4, case(2, 4, 4), None, folders[0], timeout_s=200)
    for of_rank in written[1:]:  # ranks agree on what is whole on each of them
        assert all(torch.equal(of_rank[name], value) for name, value in written[0].items())
    assert all(value.any() for name, value in written[0].items() if "_proj.weight.exp_avg" in name)
    for source, target, other in zip(
        folders, folders[1:], (case(1, 2, 2), case(1, 1, 1), case(tp, 2, 4)), strict=False
    ):
        (found, *_) = run_distributed_test(passed_on, other.ranks, other, source, target, timeout_s=200)
        assert found.keys() == written[0].keys()
        for name, value in written[0].items():
            assert torch.equal(found[name], value), (target, name)
