"""Accumulation windows of automatic optimization that end early, are left, or go on: equal to one process in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import moecompile
from moecompile.verify import worst
from tests.distributed import manual_job as job
from tests.distributed.gradient_job import full
from tests.distributed.harness import run_distributed_test

pytestmark = pytest.mark.slow

WORLD, BATCHES, EPOCHS = 2, 6, 2
EP2, EP1 = ["mesh.ranks_per_node=2"], ["mesh.ranks_per_node=2", "mesh.ep=1"]


def schedule(reduce: str, gather: str) -> list[str]:
    return [f"trainer.reduce={reduce}", f"trainer.gather={gather}"]


MESHES = {
    "ep2": [*EP2, *schedule("last", "layer")], "ep1x2": [*EP1, *schedule("last", "layer")],
    "ep2 each": [*EP2, *schedule("each", "layer")], "ep1x2 each": [*EP1, *schedule("each", "layer")],
    "ep1x2 last step": [*EP1, *schedule("last", "step")], "ep1x2 each step": [*EP1, *schedule("each", "step")],
    "hsdp each step": [*EP1, "mesh.dp_replicate=2", *schedule("each", "step")],
}  # fmt: skip


class Windows(job.Pair):
    """Six batches an epoch, four of them a window: the second window of an epoch is half a one."""

    loss, accumulate = "sum", 4
    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, mesh: list[str]) -> None:
        super().__init__(mesh, job.Recipe(lambda side, i: None, job.one_optimizer))
        self.automatic_optimization = True

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*data(self.trainer.global_rank)), batch_size=job.BATCH)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = job.cross_entropy(self, *batch, mean=self.loss == "mean")
        return loss if self.loss == "mean" else {"loss": loss, "num_tokens": (batch[1] != -100).sum()}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.keep_grads()

    def windows(self) -> list[list[int]]:
        """Batches of each optimizer step in an epoch."""
        return [[*range(i, min(BATCHES, i + self.accumulate))] for i in range(0, BATCHES, self.accumulate)]


class Mean(Windows):
    loss = "mean"


class Left(Windows):
    """The second window of each epoch is left after one batch: nothing of it may come into the next one."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 5 else None

    def windows(self) -> list[list[int]]:
        return [[0, 1, 2, 3]]


class LeftMean(Left):
    loss = "mean"


class LeftNeverZeroed(Left):
    """What was left is dropped by the strategy, not by the zeros of the next window."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        return


class ZeroedInPlace(Windows):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


class NeverZeroed(Windows):
    """Gradients pile up over steps, as they would in one process; what is complete is not summed again."""

    loss, accumulate = "mean", 1

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        return


class ClippedByValue(Windows):
    options = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}  # noqa: RUF012


class SeenAfterBackward(Windows):
    """The hook on_after_backward of the last batch sees complete gradients, as under DDP."""

    def on_after_backward(self) -> None:
        if self.trainer.fit_loop.epoch_loop.batch_idx in (3, 5):
            self.keep_grads()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        return


class TwoBackwards(Windows):
    """A backward of the module's own, in two parts."""

    def backward(self, loss: Tensor) -> None:
        (loss * 0.25).backward(retain_graph=True)
        (loss * 0.75).backward()


CASES: dict[str, type[Windows]] = {
    c.__name__: c
    for c in (
        Windows,
        Mean,
        Left,
        LeftMean,
        LeftNeverZeroed,
        ZeroedInPlace,
        NeverZeroed,
        ClippedByValue,
        SeenAfterBackward,
        TwoBackwards,
    )
}


SHORT = ("Windows", "LeftNeverZeroed", "ZeroedInPlace", "TwoBackwards")  # on meshes that differ in the schedule alone
RUNS = [(case, mesh) for mesh in MESHES for case in CASES if mesh in ("ep2", "ep1x2") or case in SHORT]


def data(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(500 + rank)
    size = BATCHES * job.BATCH
    y = torch.randint(0, 3, (size,), generator=generator)
    y[torch.rand(size, generator=generator) < 0.3] = -100
    return torch.randn(size, 6, generator=generator).double(), y


def on_one(case: str) -> Windows:
    module = CASES[case]([])
    optimizer = module.configure_optimizers()
    every = [data(rank) for rank in range(WORLD)]
    for window in module.windows() * EPOCHS:
        if case != "NeverZeroed":
            optimizer.zero_grad()
        tokens = 0
        for i in window:
            for x, y in every:
                batch = x[i * job.BATCH : (i + 1) * job.BATCH], y[i * job.BATCH : (i + 1) * job.BATCH]
                count = int((batch[1] != -100).sum())
                loss = job.cross_entropy(module, *batch, mean=module.loss == "mean")
                aux, tokens = moecompile.auxiliary_loss(module), tokens + count
                ((loss + aux) / WORLD / module.accumulate if module.loss == "mean" else loss + count * aux).backward()
        for parameter in module.parameters():
            if parameter.grad is not None and module.loss == "sum":
                parameter.grad /= tokens
        module.keep_grads()
        if module.options:
            nn.utils.clip_grad_value_(module.parameters(), 0.01)
        optimizer.step()
        moecompile.update_balance(module)
    return module


def every_case(rank: int, world_size: int) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    for case, mesh in RUNS:
        module = CASES[case](MESHES[mesh])
        trainer = Trainer(
            strategy=moecompile.ExpertParallelStrategy(loss=module.loss), devices=world_size, max_epochs=EPOCHS,
            accumulate_grad_batches=module.accumulate, **job.CPU, **module.options,
        )  # fmt: skip
        trainer.fit(module)
        out[case, mesh] = module.grads, {name: full(t) for name, t in module.state_dict().items()}
    return out


@cache
def results() -> list[dict[Any, Any]]:
    return run_distributed_test(every_case, WORLD, timeout_s=200)


@pytest.mark.parametrize(("case", "mesh"), RUNS)
def test_equals_one_process(case: str, mesh: str) -> None:
    wanted = on_one(case)
    for result in results():
        grads, weights = result[case, mesh]
        for ours, theirs in zip(grads, wanted.grads, strict=True):
            present = {name: grad for name, grad in theirs.items() if grad is not None}
            assert {name for name, grad in ours.items() if grad is not None} == present.keys()
            assert worst({name: ours[name] for name in present}, present) < (1e-10, "")
        assert worst(weights, {name: t.detach() for name, t in wanted.state_dict().items()}) < (1e-10, "")
