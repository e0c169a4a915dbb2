"""ExpertParallelStrategy with a user's own LightningModule, against one process with plain PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import moecompile
from moecompile.errors import ConfigError, PlanError
from moecompile.nn import Experts, Router
from moecompile.verify import worst
from tests.distributed.gradient_job import full
from tests.distributed.harness import run_distributed_test

WORLD, BATCH, STEPS, ACCUMULATE, CLIP, RATE = 2, 4, 3, 2, 0.05, 0.01
OVERRIDES = [
    "experts.num_routed=4", "routing.top_k=2", "mesh.ranks_per_node=2", "dispatch.kind=flat", "balance.rule=bias",
    f"balance.rate={RATE}",
]  # fmt: skip
CPU = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
       "enable_model_summary": False, "barebones": False}  # fmt: skip


class Classifier(nn.Module):
    """An ordinary model with an FFN in each of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2)
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def compiled() -> nn.Module:
    torch.manual_seed(0)
    model = moecompile.compile_model(Classifier(), OVERRIDES, example=torch.zeros(1, 6))
    return spread(model)


def spread(model: nn.Module) -> nn.Module:
    """Independently random experts and routers."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (Experts, Router)):
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def one_process() -> nn.Module:
    """The same weights without exchanges: planned for one rank."""
    torch.manual_seed(0)
    overrides = [o for o in OVERRIDES if not o.startswith(("mesh", "dispatch"))]
    return spread(moecompile.compile_model(Classifier(), overrides, example=torch.zeros(1, 6)))


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    size = WORLD * BATCH * ACCUMULATE * STEPS
    return TensorDataset(torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator))


class Mean(LightningModule):
    """What any user would write; the strategy needs nothing more."""

    def __init__(self) -> None:
        super().__init__()
        self.model = compiled()
        self.seen: list[Tensor] = []
        self.grads: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.seen.append(x)
        return F.cross_entropy(self.model(x), y)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.grads.append({name: full(p.grad) for name, p in self.model.named_parameters()})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(dataset(), batch_size=BATCH)


class Sum(Mean):
    """Returns sums; on rank 1 half of the targets do not count."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.seen.append(x)
        y = ignored(y, self.trainer.global_rank)
        loss = F.cross_entropy(self.model(x), y, reduction="sum", ignore_index=-100)
        return {"loss": loss, "num_tokens": (y != -100).sum()}


class SumWithoutCount(Mean):
    """Forgets its token count."""


def ignored(y: Tensor, rank: int) -> Tensor:
    return torch.where(torch.arange(len(y)) % 2 == 0, y, -100) if rank == 1 else y


def reference(batches: list[list[tuple[Tensor, Tensor]]], *, mean: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(first gradients, last weights). batches: per step, all ranks' micro-batches."""
    model = one_process()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first: dict[str, Tensor] = {}
    for step in batches:
        optimizer.zero_grad()
        count = len(step) if mean else sum(int((y != -100).sum()) for _, y in step)
        for x, y in step:
            reduction = "mean" if mean else "sum"
            (F.cross_entropy(model(x), y, reduction=reduction, ignore_index=-100) / count).backward()
        first = first or {name: p.grad.clone() for name, p in model.named_parameters()}
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        moecompile.update_balance(model, {f"blocks.{i}.router": RATE for i in range(2)})
    return first, {name: t.detach().clone() for name, t in model.state_dict().items()}


def fit(rank: int, world_size: int, module_class: type[Mean], strategy: str, folder: str) -> dict[str, Any]:
    module = module_class()
    chosen = strategy if strategy == "expert_parallel" else moecompile.ExpertParallelStrategy(loss=strategy)
    trainer = Trainer(
        strategy=chosen, devices=world_size, max_epochs=1, accumulate_grad_batches=ACCUMULATE, gradient_clip_val=CLIP,
        default_root_dir=folder, **CPU,
    )  # fmt: skip
    trainer.fit(module)
    path = Path(folder, "whole")
    trainer.save_checkpoint(path)
    weights = {name: full(t) for name, t in module.model.state_dict().items()}
    resumed = Trainer(
        strategy=moecompile.ExpertParallelStrategy(loss="sum" if module_class is Sum else "mean"), devices=world_size,
        max_epochs=1, default_root_dir=folder, **CPU,
    )  # fmt: skip
    again = module_class()
    resumed.fit(again, ckpt_path=path)  # the epoch is over: loads and stops
    restored = {name: full(t) for name, t in again.model.state_dict().items()}
    kinds = {type(p).__name__ for p in module.model.parameters()}
    return {"grads": module.grads[0], "weights": weights, "seen": module.seen, "restored": restored, "kinds": kinds}


def both(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    out = {
        "mean": fit(rank, world_size, Mean, "expert_parallel", f"{folder}/mean"),
        "sum": fit(rank, world_size, Sum, "sum", f"{folder}/sum"),
    }
    for name, call in {"count": _without_count, "world": _wrong_world, "plain": _not_compiled}.items():
        try:
            call(folder)
        except (ConfigError, PlanError) as error:
            out[name] = str(error)
    return out


def _without_count(folder: str) -> None:
    trainer = Trainer(strategy=moecompile.ExpertParallelStrategy(loss="sum"), devices=WORLD, max_epochs=1, **CPU)
    trainer.fit(SumWithoutCount())


def _wrong_world(folder: str) -> None:
    module = Mean()
    module.model = one_process()
    Trainer(strategy="expert_parallel", devices=WORLD, max_epochs=1, **CPU).fit(module)


def _not_compiled(folder: str) -> None:
    module = Mean()
    module.model = Classifier()
    Trainer(strategy="expert_parallel", devices=WORLD, max_epochs=1, **CPU).fit(module)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_distributed_test(both, WORLD, str(tmp_path_factory.mktemp("fit")), timeout_s=120)


@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_equals_one_process(results: list[dict[str, Any]], loss: str) -> None:
    data = dataset()
    batches = []
    for step in range(STEPS):
        batches.append([])
        for micro in range(ACCUMULATE):
            for rank in range(WORLD):
                seen = results[rank][loss]["seen"][step * ACCUMULATE + micro]
                index = [int((data.tensors[0] == row).all(1).nonzero()) for row in seen]
                y = data.tensors[1][index]
                batches[-1].append((seen, y if loss == "mean" else ignored(y, rank)))
    grads, weights = reference(batches, mean=loss == "mean")
    assert worst(results[0][loss]["grads"], grads)[0] < 2e-5
    assert worst(results[0][loss]["weights"], weights)[0] < 2e-5
    assert weights["blocks.0.router.correction_bias"].abs().max() > 0


def test_ranks_see_different_data(results: list[dict[str, Any]]) -> None:
    """The sampler splits over all ranks, EP peers included."""
    rows = {tuple(row.tolist()) for result in results for x in result["mean"]["seen"] for row in x}
    assert len(rows) == len(dataset())


def test_weights_are_sharded(results: list[dict[str, Any]]) -> None:
    assert results[0]["mean"]["kinds"] == {"DTensor", "Parameter"}  # FSDP2 and experts; routers are replicated


@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_checkpoint_restores_every_weight(results: list[dict[str, Any]], loss: str) -> None:
    for result in results:
        assert worst(result[loss]["restored"], result[loss]["weights"])[0] == 0.0


def test_mistakes_are_told(results: list[dict[str, Any]]) -> None:
    assert results[0]["count"] == (
        "loss=sum: training_step must return {'loss': sum over tokens, 'num_tokens': their number}. "
        "Return both, or use loss='mean'."
    )
    assert results[0]["world"].startswith(
        "mesh=1 x 1: the plan is for 1 ranks, the Trainer has 2. Change mesh.num_nodes"
    )
    assert results[0]["plain"].startswith("model=Mean: holds 0 compiled models, one is needed. Call moecompile.compile")


def test_unknown_loss() -> None:
    with pytest.raises(ConfigError, match="loss=median: must be mean or sum"):
        moecompile.ExpertParallelStrategy(loss="median")


def test_importing_after_lightning_registers_the_name() -> None:
    code = (
        "from lightning.pytorch import Trainer; import moecompile; "
        "print(type(Trainer(strategy='expert_parallel', accelerator='cpu', devices=2, logger=False).strategy).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip().endswith("ExpertParallelStrategy"), run.stderr


def test_registered() -> None:
    assert "expert_parallel" in lightning.pytorch.strategies.StrategyRegistry.available_strategies()
