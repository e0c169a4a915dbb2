"""An ordinary LightningModule, trained with expert parallelism on two CPU processes.

    torchrun --nproc_per_node 2 docs/examples/lightning_module.py

The module knows nothing of ranks: it returns a mean loss, and Lightning clips its gradients. `compile_model` turns the
FFN of each block into eight experts, four on each rank.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from moecompile import compile_model, plan_of


class Block(nn.Module):
    """A residual block with a dense FFN."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Classifier(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self, num_inputs: int, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(num_inputs, 32)
        self.blocks = nn.ModuleList(Block(32, 64) for _ in range(2))
        self.head = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Module(LightningModule):
    """What anyone would write; `compile_model` is the one new line."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # every rank builds the same weights, and keeps its own experts of them
        self.model = compile_model(
            Classifier(8, 3),
            ["mesh.ranks_per_node=2", "experts.num_routed=8", "routing.top_k=2", "balance=bias"],
            example=torch.zeros(1, 8),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def samples() -> DataLoader[tuple[Tensor, ...]]:
    """Points whose class is the largest of three fixed linear functions."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, 8, generator=generator)
    y = (x @ torch.randn(8, 3, generator=generator)).argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)


def make_trainer(**where: Any) -> Trainer:
    """Trains for a few epochs; `where` is the accelerator, the devices of a machine and the number of machines."""
    return Trainer(
        strategy="expert_parallel",
        **where,
        max_epochs=5,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main() -> None:
    """Lightning's sampler gives each rank its own part of the data."""
    trainer = make_trainer(accelerator="cpu", devices=2)
    module = Module()
    trainer.fit(module, samples())
    if trainer.is_global_zero:
        print(plan_of(module))
        print(f"loss {float(trainer.callback_metrics['loss']):.3f} after {trainer.global_step} steps")
        for load in trainer.strategy.loads:
            print(f"{load.name}: MaxVio {load.max_violation:.2f}")


if __name__ == "__main__":
    main()
