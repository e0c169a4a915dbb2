"""Measures the bytes that training forwards send, by link class."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from moecompile.mesh import LinkClass, MeshSpec
from moecompile.ops import traffic
from moecompile.plan import Traffic
from moecompile.runtime.strategy import ExpertParallelStrategy, groups_of


class TrafficMeter(Callback):
    """Counts the bytes that training forwards send, by link class."""

    def __init__(self, mesh: MeshSpec) -> None:
        self.mesh = mesh
        self._bytes = {LinkClass.INTRA_NODE: 0, LinkClass.INTER_NODE: 0, LinkClass.SELF: 0}
        self._tokens = 0  # of all ranks and layers; those of an encoder and a decoder see different numbers
        self._last_step = 0
        self.per_token_and_layer: Traffic | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the step at which the run starts."""
        self._last_step = trainer.global_step

    def on_train_batch_start(self, *_: Any) -> None:
        """Discards bytes that were sent outside training (validation, warm-up)."""
        traffic.take()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the bytes that this rank sent for one micro-batch, and the tokens of a completed step."""
        for rank, sent in traffic.take().items():
            self._bytes[self.mesh.link(trainer.global_rank, rank)] += sent
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            assert isinstance(trainer.strategy, ExpertParallelStrategy)
            self._tokens += sum(load.tokens for load in trainer.strategy.loads)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Computes the bytes per token and MoE layer, over all ranks."""
        sent = [self._bytes[LinkClass.INTRA_NODE], self._bytes[LinkClass.INTER_NODE]]
        sums = torch.tensor(sent, dtype=torch.int64, device=pl_module.device)
        dist.all_reduce(sums, group=groups_of(trainer).every)
        intra, inter = (total / max(1, self._tokens) for total in sums.tolist())
        self.per_token_and_layer = Traffic(intra_node=intra, inter_node=inter)
