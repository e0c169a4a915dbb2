"""What a run reports while it trains: loss, tokens per second, load balance, bytes on the wire."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

from moecompile.mesh import LinkClass, MeshSpec
from moecompile.ops import traffic
from moecompile.plan import Traffic
from moecompile.runtime.strategy import ExpertParallelStrategy


class Metrics(Callback):
    """Logs one row every `log_interval` optimizer steps, to the loggers and the progress bar.

    loss: mean over all tokens of the steps since the last row, nats per token. max_violation: the worst layer's MaxVio
    of the last step. tokens_per_second: over all ranks, since the last row.
    """

    def __init__(self, log_interval: int, max_steps: int) -> None:
        self.log_interval, self.max_steps = log_interval, max_steps
        self.loss_first: float | None = None
        self.loss_last: float | None = None
        self.max_violation_last: float | None = None
        self.tokens_per_second: float | None = None  # after the first row, which holds the warm-up
        self._sums: Tensor | None = None
        self._row_start = self._timed_seconds = 0.0
        self._timed_tokens = 0
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._sums = torch.zeros(2, dtype=torch.float64, device=pl_module.device)
        self._row_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the micro-batch; after an optimizer step that closes a row, logs it."""
        assert self._sums is not None
        # Lightning has divided the loss by the accumulation steps.
        loss = outputs["loss"].detach().double() * trainer.accumulate_grad_batches
        self._sums += torch.stack((loss, outputs["num_tokens"].double()))
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        if step == 1 or step % self.log_interval == 0 or step == self.max_steps:
            self._log_row(trainer, pl_module, step)

    def _log_row(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        assert self._sums is not None
        if dist.is_initialized():
            dist.all_reduce(self._sums)
        loss, num_tokens = self._sums.tolist()
        seconds = time.perf_counter() - self._row_start
        self._sums.zero_()
        row = {"loss": loss / num_tokens, "tokens_per_second": num_tokens / seconds}
        if self.loss_first is None:
            self.loss_first = row["loss"]
        else:
            self._timed_tokens, self._timed_seconds = (
                self._timed_tokens + int(num_tokens),
                self._timed_seconds + seconds,
            )
            self.tokens_per_second = self._timed_tokens / self._timed_seconds
        self.loss_last = row["loss"]
        strategy = trainer.strategy
        assert isinstance(strategy, ExpertParallelStrategy)
        if strategy.loads:
            row["max_violation"] = self.max_violation_last = max(load.max_violation for load in strategy.loads)
        extra = {f"max_violation/{load.name}": load.max_violation for load in strategy.loads}
        if strategy.grad_norm is not None:
            extra["grad_norm"] = strategy.grad_norm
        pl_module.log_dict(row, prog_bar=True, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(row | extra, step=step)
        self._row_start = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock: validation is not training time."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts it again."""
        self._row_start += time.perf_counter() - self._paused


class TrafficMeter(Callback):
    """Counts the bytes that training forwards put on each link class."""

    def __init__(self, mesh: MeshSpec, num_layers: int) -> None:
        self.mesh, self.num_layers = mesh, num_layers
        self._bytes = {LinkClass.INTRA_NODE: 0, LinkClass.INTER_NODE: 0, LinkClass.SELF: 0}
        self._num_tokens = 0
        self.per_token_and_layer: Traffic | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        """Forgets what was sent outside training (validation, warm-up)."""
        traffic.take()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Adds what this rank sent for one micro-batch."""
        for rank, sent in traffic.take().items():
            self._bytes[self.mesh.link(trainer.global_rank, rank)] += sent
        self._num_tokens += batch["input_ids"].numel()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bytes per token and MoE layer, mean over ranks."""
        sums = torch.tensor(
            [self._bytes[LinkClass.INTRA_NODE], self._bytes[LinkClass.INTER_NODE], self._num_tokens],
            dtype=torch.int64,
            device=pl_module.device,
        )
        if dist.is_initialized():
            dist.all_reduce(sums)
        intra, inter, tokens = sums.tolist()
        count = max(1, tokens * self.num_layers)
        self.per_token_and_layer = Traffic(intra_node=intra / count, inter_node=inter / count)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar without the version number, with rounded figures."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """loss, tokens/s, MaxVio and val_loss, as far as they are known."""
        return _figures(trainer)


class ProgressLines(Callback):
    """The same figures as lines, for output that is no terminal: one every `log_interval` optimizer steps."""

    def __init__(self, log_interval: int) -> None:
        self.log_interval, self._last_step = log_interval, 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Prints after a step that closes a row."""
        step = trainer.global_step
        if trainer.is_global_zero and step != self._last_step and (step == 1 or step % self.log_interval == 0):
            figures = "  ".join(f"{name} {value}" for name, value in _figures(trainer).items())
            print(f"step {step}/{trainer.max_steps}  {figures}", flush=True)
        self._last_step = step


def _figures(trainer: Trainer) -> dict[str, str]:
    """loss, tokens/s, MaxVio and val_loss as text, as far as they are known."""
    found = trainer.progress_bar_metrics
    names = {"loss": "loss", "tokens_per_second": "tok/s", "max_violation": "MaxVio", "val_loss": "val"}
    shapes = {"tokens_per_second": "{:,.0f}", "max_violation": "{:.2f}"}
    return {
        short: shapes.get(name, "{:.3f}").format(float(found[name])) for name, short in names.items() if name in found
    }
