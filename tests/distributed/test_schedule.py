"""When weights are gathered and gradients reduced: every way is exact, and sends and keeps what the plan says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import moecompile
from moecompile.plan import WeightTraffic
from moecompile.torch_private import groups_of
from moecompile.verify import worst
from tests.distributed.gradient_job import full
from tests.distributed.harness import run_distributed_test
from tests.distributed.manual_job import CPU
from tests.existing_models import VOCAB, moe_model, stacked
from tests.tiny import collective

WORLD, STEPS, MICRO_BATCHES, BATCH, SEQ = 4, 2, 3, 2, 12
MODEL = "qwen3_moe"
RUN = [
    "balance=none", f"data.micro_batch_size={BATCH}", f"data.seq_len={SEQ}", f"data.global_batch_size={WORLD * BATCH * MICRO_BATCHES}",
]  # fmt: skip
SHARDED = ["mesh.ranks_per_node=4", "mesh.ep=2", "dispatch.kind=dedup"]
MESHES = {"sharded": SHARDED, "replicas": [*SHARDED, "mesh.dp_replicate=2"], "ep4": [*SHARDED, "mesh.ep=4"]}
WAYS = list(product(("last", "each"), ("layer", "step")))
# name -> (overrides, reduce, gather, checkpointing)
CASES: dict[str, tuple[list[str], str, str, str]] = {
    f"{mesh} {reduce} {gather}": (overrides, reduce, gather, "none")
    for (mesh, overrides), (reduce, gather) in product(MESHES.items(), WAYS)
    if mesh != "ep4" or (reduce, gather) == ("each", "step")
}
CASES["full"] = (SHARDED, "each", "step", "full")
CASES["keep_exchanges"] = (SHARDED, "each", "layer", "keep_exchanges")


@dataclass
class Found:
    """Of a rank. sent: bytes that it received, by collective. whole: numbers of gathered weights after a micro-batch
    that is not the last. unreduced: of gradients that were kept unreduced then, and narrow: in shards of bf16. sharded: whether all weights were shards
    before each optimizer step.
    """

    planned: WeightTraffic | None
    grads: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    whole: int = 0
    unreduced: int = 0
    narrow: int = 0
    sharded: bool = True


class Module(LightningModule):
    def __init__(self, overrides: list[str], found: Found, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.found = moe_model(MODEL, dtype=dtype).train(), found
        example = {"input_ids": torch.ones(1, SEQ, dtype=torch.int64)}
        self.model = moecompile.compile_model(self.model, [*overrides, *RUN], example=example)
        found.planned = moecompile.plan_of(self.model).estimate.weight_traffic

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, eps=1e-5)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*data(self.trainer.global_rank)), batch_size=BATCH)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": summed_loss(self.model, *batch), "num_tokens": (batch[1] != -100).sum()}

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.fit_loop._should_accumulate():
            groups = [group for each in self.model.modules() if isinstance(each, FSDPModule)
                      for group in groups_of(each)]  # fmt: skip
            params = [param for group in groups for param in group.fsdp_params]
            self.found.whole = sum(p._unsharded_param.numel() for p in params if "UNSHARDED" in str(p.sharded_state))
            held = [p.unsharded_accumulated_grad for p in params] + [p._unsharded_param.grad for p in params]
            self.found.unreduced = sum(grad.numel() for grad in held if grad is not None)
            shards = [p.sharded_param.grad for p in params]
            self.found.narrow = sum(g.numel() for g in shards if g is not None and g.dtype == torch.bfloat16)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        weights = {name: p for name, p in self.model.named_parameters() if not name.endswith("gate.weight")}
        self.found.sharded &= all(isinstance(p, DTensor) for p in weights.values())
        if not self.found.grads:
            self.found.grads = {name: full(p.grad).clone() for name, p in self.model.named_parameters()}


def data(rank: int) -> tuple[Tensor, Tensor]:
    """Token counts differ between ranks and micro-batches; one micro-batch of rank 1 has no target."""
    generator = torch.Generator().manual_seed(70 + rank)
    size = STEPS * MICRO_BATCHES * BATCH
    ids = torch.randint(1, VOCAB, (size, SEQ + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.2 * (rank + 1)] = -100
    if rank == 1:
        labels[BATCH : 2 * BATCH] = -100
    return ids[:, :-1], labels


def summed_loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


@contextmanager
def counting(sent: Counter[str]) -> Iterator[None]:
    """Counts the bytes that a rank receives: of a gather's output, or a reduction's input, what is not its own part; of a
    sum over two replicas, all.
    """

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            ranks = dist.get_world_size(kwargs.get("group"))
            if name == "all_reduce" and ranks != 2:
                return call(*args, **kwargs)
            most = max(t.nbytes for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
            sent[name] += most if name == "all_reduce" else most * (ranks - 1) // ranks
            return call(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_single", "reduce_scatter_single", "all_reduce"):
            patch.setattr(dist, collective(name), counted(name, getattr(dist, collective(name))))
        yield


def fit(case: tuple[list[str], str, str, str], dtype: torch.dtype = torch.float64) -> Found:
    overrides, reduce, gather, checkpointing = case
    found = Found(None)
    module = Module([*overrides, f"trainer.reduce={reduce}", f"trainer.gather={gather}"], found, dtype)
    strategy = moecompile.ExpertParallelStrategy(loss="sum", checkpointing=checkpointing)
    trainer = Trainer(strategy=strategy, devices=WORLD, max_epochs=1, accumulate_grad_batches=MICRO_BATCHES, **CPU)
    with counting(found.sent):
        trainer.fit(module)
    found.weights = {name: full(t) for name, t in module.model.state_dict().items()}
    return found


def every_case(rank: int, world_size: int) -> dict[str, Found]:
    found = {name: fit(case) for name, case in CASES.items()}
    for reduce in ("last", "each"):
        found[f"bf16 {reduce}"] = fit((SHARDED, reduce, "layer", "none"), torch.bfloat16)
    return found


@cache
def results() -> list[dict[str, Found]]:
    return run_distributed_test(every_case, WORLD, timeout_s=240)


@cache
def on_one(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the first step and weights after the last, of transformers' own model in one process."""
    model = moe_model(MODEL, dtype=dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    every, grads = [data(rank) for rank in range(WORLD)], dict[str, Tensor]()
    for step in range(STEPS):
        optimizer.zero_grad()
        tokens = 0
        rows = slice(step * MICRO_BATCHES * BATCH, (step + 1) * MICRO_BATCHES * BATCH)
        for ids, labels in every:
            summed_loss(model, ids[rows], labels[rows]).backward()
            tokens += int((labels[rows] != -100).sum())
        for parameter in model.parameters():
            parameter.grad /= tokens
        grads = grads or {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    return stacked(grads), stacked({name: t.detach() for name, t in model.state_dict().items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gradients_and_weights_equal_one_process(name: str) -> None:
    grads, weights = on_one()
    for rank in results():
        assert worst(rank[name].grads, grads) < (1e-10, "")
        assert worst({key: rank[name].weights[key] for key in weights}, weights) < (1e-10, "")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_bytes_and_what_is_kept_are_as_planned(name: str) -> None:
    _, reduce, gather, _ = CASES[name]
    for rank in results():
        found = rank[name]
        assert found.planned is not None
        # Weights are planned in fp32, and these are float64.
        assert found.sent["all_gather_single"] / STEPS == pytest.approx(found.planned.gathered, rel=0.01)
        assert found.sent["reduce_scatter_single"] / STEPS == pytest.approx(2 * found.planned.reduced, rel=0.01)
        assert found.sent["all_reduce"] / STEPS == pytest.approx(2 * found.planned.replicas, rel=0.01)
        assert found.sharded
        assert (found.unreduced == 0) == (reduce == "each")
        root = VOCAB * 32 * 2 + 32
        assert found.whole > root if gather == "step" else found.whole <= root


@pytest.mark.slow
def test_bf16_weights_accumulate_in_fp32() -> None:
    """Rounded each time, sums of gradients drift; summed in fp32, they are as good as reduced once."""
    exact, _ = on_one()
    for rank in results():
        assert rank["bf16 each"].narrow == 0
        last, each = (rank[f"bf16 {reduce}"].grads for reduce in ("last", "each"))
        between = {
            name: (each[name].double() - grad.double()).norm() / grad.double().norm() for name, grad in last.items()
        }
        assert max(between.values()) < 2**-8
        assert each.keys() == exact.keys()
