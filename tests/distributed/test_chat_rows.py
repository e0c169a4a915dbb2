"""Chats of odd lengths on a mesh that splits rows: loss and gradients are those of one process without any padding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compile_model, plan_of
from moecompile.runtime.data import IGNORED, ChatRows, train_loader
from moecompile.runtime.gradients import divide, sum_replicated
from moecompile.runtime.groups import Groups
from moecompile.runtime.module import LanguageModule
from moecompile.schema import DataConfig, DataKind, OptimizerConfig, RowLayout
from tests.distributed.fold_job import worst
from tests.distributed.gradient_job import full
from tests.distributed.harness import run_distributed_test
from tests.existing_models import moe_model
from tests.runtime.test_chats import chat, loaded

CASES = (("cp", RowLayout.pad), ("cp", RowLayout.pack), ("tp", RowLayout.pad), ("tp", RowLayout.pack))
# Chats of 5 and 2 inputs: packed, two of them are 7.
CHATS = [chat(f"{10 + i} 11", f"20 {21 + i}") for i in range(6)] + [chat("", str(30 + i)) for i in range(6)]


def rows_of(folder: Path, layout: RowLayout) -> tuple[ChatRows, DataConfig]:
    data = DataConfig(
        kind=DataKind.sft, seq_len=8, global_batch_size=4, micro_batch_size=2, layout=layout, val_fraction=0.01
    )
    return loaded(folder, CHATS, seq_len=8, layout=layout)[0], data


def reference(model: nn.Module, rows: ChatRows, data: DataConfig) -> tuple[float, dict[str, Tensor]]:
    """Transformers' own model, one chat at a time, without padding, packing and masks."""
    total, num_targets = torch.zeros((), dtype=torch.float64), 0
    for batch in train_loader(rows, data, seed=0, rank=0, world_size=1, num_steps=1):
        for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
            length = int(batch["attention_mask"][row].sum())
            places = batch["position_ids"][row] if "position_ids" in batch else torch.arange(len(ids))
            starts = (places[:length] == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], length], strict=True):
                own = labels[start:end]
                logits = model(input_ids=ids[None, start:end], use_cache=False).logits[0]
                total = total + F.cross_entropy(logits, own, ignore_index=IGNORED, reduction="sum")
                num_targets += int((own != IGNORED).sum())
    total.backward()
    return total.item(), {name: p.grad / num_targets for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, axis: str, rows: ChatRows, data: DataConfig) -> dict[str, Any]:
    """The same step, the way that training runs it."""
    mesh = [
        "mesh.ranks_per_node=2",
        f"mesh.{axis}=2",
        "balance.rule=none",
        "data.seq_len=8",
        "data.mask_padding=always",
    ]
    example = {"input_ids": torch.ones(1, 8, dtype=torch.int64)}
    compiled = compile_model(model, mesh, example=example)
    plan = plan_of(compiled)
    module = LanguageModule(shard(compiled, plan, device_mesh_of(plan.mesh, "cpu")), OptimizerConfig(), 1)
    groups, sums, lengths = Groups.of(plan.mesh, "cpu"), torch.zeros(2, dtype=torch.float64), []
    rank, ranks, multiple = groups.batch_index, groups.num_batches, plan.mesh.cp
    for batch in train_loader(rows, data, seed=0, rank=rank, world_size=ranks, num_steps=1, multiple=multiple):
        loss, count = module.summed_loss(batch)
        loss.backward()
        sums += torch.stack((loss.detach(), count.double()))
        lengths.append(batch["input_ids"].shape[1])
    parameters = list(module.model.parameters())
    sum_replicated(parameters, groups.tokens)
    dist.all_reduce(sums, group=groups.tokens)
    divide(parameters, sums[1])
    grads = {name: full(p.grad) for name, p in module.model.named_parameters() if p.grad is not None}
    return {"loss": sums[0].item(), "grads": grads, "lengths": lengths}


def ranks(rank: int, world_size: int, folder: Path) -> list[dict[str, Any]]:
    found = []
    for axis, layout in CASES:
        model = moe_model("mixtral", dtype=torch.float64, vocab_size=100).train()
        (folder / f"{axis}-{layout.value}-{rank}").mkdir()
        rows, data = rows_of(folder / f"{axis}-{layout.value}-{rank}", layout)
        found.append(step(copy.deepcopy(model), axis, rows, data))
    return found


@pytest.mark.slow
def test_rows_of_odd_length(tmp_path: Path) -> None:
    found = run_distributed_test(ranks, 2, tmp_path, timeout_s=240)
    for i, (axis, layout) in enumerate(CASES):
        rows, data = rows_of(tmp_path, layout)
        plain = train_loader(rows, data, seed=0, rank=0, world_size=1, num_steps=1)
        lengths = [batch["input_ids"].shape[1] for batch in plain]
        assert any(length % 2 for length in lengths), "else nothing has to be filled up"
        assert layout is RowLayout.pad or any((batch["position_ids"][:, 1:] == 0).any() for batch in plain)
        loss, grads = reference(moe_model("mixtral", dtype=torch.float64, vocab_size=100).train(), rows, data)
        for of_rank in found:
            assert of_rank[i]["lengths"] == [length + length % 2 * (axis == "cp") for length in lengths]
            assert of_rank[i]["loss"] == pytest.approx(loss, rel=1e-12), (axis, layout)
            error, name = worst(of_rank[i]["grads"], grads)
            assert error <= 1e-10 and of_rank[i]["grads"].keys() == grads.keys(), (axis, layout, name, error)
