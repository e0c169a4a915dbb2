"""Measures the bytes that training forwards and the optimizer send, by link class."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from moecompile.mesh import LinkClass, MeshSpec
from moecompile.ops import traffic
from moecompile.ops.traffic import optimizer_traffic
from moecompile.plan import Traffic
from moecompile.runtime.strategy import ExpertParallelStrategy, groups_of


class TrafficMeter(Callback):
    """Counts the bytes that training forwards send, by link class, and those of the optimizer."""

    def __init__(self, mesh: MeshSpec) -> None:
        self.mesh = mesh
        self._bytes = {LinkClass.INTRA_NODE: 0, LinkClass.INTER_NODE: 0, LinkClass.SELF: 0}
        self._by_optimizer = dict.fromkeys(self._bytes, 0)
        self._by_rank = [0] * mesh.world_size
        self._first_step = 0
        self._tokens = 0  # of all ranks and layers; those of an encoder and a decoder see different numbers
        self._last_step = 0
        self.per_token_and_layer: Traffic | None = None
        self.per_rank_and_step: Traffic | None = None  # of the optimizer, as a mean over ranks and steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the step at which the run starts."""
        self._last_step = self._first_step = trainer.global_step
        optimizer_traffic.take()  # of a step with zeros, which makes the state that a checkpoint fills

    def on_train_batch_start(self, *_: Any) -> None:
        """Discards bytes that were sent outside training (validation, warm-up)."""
        traffic.take()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the bytes that this rank sent for one micro-batch, and the tokens of a completed step."""
        for rank, sent in traffic.take().items():
            self._bytes[self.mesh.link(trainer.global_rank, rank)] += sent
            self._by_rank[rank] += sent
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            for rank, sent in optimizer_traffic.take().items():
                self._by_optimizer[self.mesh.link(trainer.global_rank, rank)] += sent
            assert isinstance(trainer.strategy, ExpertParallelStrategy)
            self._tokens += sum(load.tokens for load in trainer.strategy.loads)

    def sent_per_step(self, rank: int) -> list[float]:
        """Bytes that this rank, `rank`, sent to each other rank in the forwards of a step, as a mean over the steps."""
        steps = max(1, self._last_step - self._first_step)
        return [0.0 if other == rank else sent / steps for other, sent in enumerate(self._by_rank)]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Computes the bytes per token and MoE layer, over all ranks."""
        links = (LinkClass.INTRA_NODE, LinkClass.INTER_NODE)
        sent = [counts[link] for counts in (self._bytes, self._by_optimizer) for link in links]
        sums = torch.tensor(sent, dtype=torch.int64, device=pl_module.device)
        dist.all_reduce(sums, group=groups_of(trainer).every)
        in_forward, by_optimizer = sums.view(2, 2).tolist()
        steps = max(1, (self._last_step - self._first_step) * self.mesh.world_size)
        self.per_token_and_layer = _traffic(in_forward, max(1, self._tokens))
        self.per_rank_and_step = _traffic(by_optimizer, steps)


def _traffic(sums: list[int], count: int) -> Traffic:
    """The mean, of bytes within nodes and between them."""
    return Traffic(intra_node=sums[0] / count, inter_node=sums[1] / count)
