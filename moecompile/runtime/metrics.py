"""Logs metrics during training: rows for the loggers and the progress bar, and the load of every expert."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moecompile.load_history import LoadHistory
from moecompile.nn import LayerLoad
from moecompile.runtime.strategy import ExpertParallelStrategy
from moecompile.runtime.tally import Tally, over_layers


class Metrics(Callback):
    """Logs one row every `log_interval` optimizer steps, to the loggers and the progress bar, and keeps the load.

    loss: mean over all tokens of the steps since the last row, nats per token, without auxiliary losses. `aux/KIND`:
    the same mean of an auxiliary loss, times its coefficient. tokens_per_second: tokens with a target on all ranks,
    since the last row. learning_rate: of the first group of weights in the last step. max_violation: the worst layer's
    MaxVio in the last step. Columns with a module path have values of one layer in the last step.

    Args:
        log_interval, max_steps: optimizer steps between rows, and of the run.
        has_capacity: whether experts may drop tokens; then the progress bar also shows the drop rate of the last step.
        history_path: file in which rank 0 writes the load of every row.
    """

    def __init__(
        self, log_interval: int, max_steps: int, *, has_capacity: bool = False, history_path: Path | None = None
    ) -> None:
        self.log_interval, self.max_steps, self.has_capacity = log_interval, max_steps, has_capacity
        self.tally = Tally()
        self.history_path, self.history = history_path, LoadHistory()
        self._last_step = self.rows = 0
        self._learning_rate: float | None = None
        self._row_start = self._paused = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._row_start, self._last_step = time.perf_counter(), trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Keeps the learning rate of the step, before the schedule goes on."""
        self._learning_rate = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the micro-batch; logs a row after an optimizer step that completes one."""
        strategy = trainer.strategy
        assert isinstance(strategy, ExpertParallelStrategy)
        # Lightning has divided the loss by the accumulation steps.
        loss = outputs["loss"].detach().double() * trainer.accumulate_grad_batches
        self.tally.sums.add(loss, outputs["num_tokens"], strategy.aux_losses)
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        self.tally.end_step(strategy.loads, skipped=strategy.skipped)
        if step == 1 or step % self.log_interval == 0 or step == self.max_steps:
            self._log_row(trainer, pl_module, strategy, step)

    def _log_row(
        self, trainer: Trainer, pl_module: LightningModule, strategy: ExpertParallelStrategy, step: int
    ) -> None:
        loss, num_tokens, aux_losses = self.tally.sums.take(strategy.groups.tokens)
        row = self.tally.end_row(loss, num_tokens, time.perf_counter() - self._row_start)
        loads = [] if strategy.skipped else strategy.loads
        if loads:
            row["max_violation"] = self.tally.max_violation_last = max(load.max_violation for load in loads)
            if self.has_capacity:
                row["drop_rate"] = over_layers(loads)["drop_rate"]
            if trainer.is_global_zero:
                self.history.add(step, {load.name: load.load.tolist() for load in loads})
        extra = {f"aux/{kind}": aux / max(1, num_tokens) for kind, aux in aux_losses.items()}
        for load in loads:
            extra |= of_layer(load)
        if self._learning_rate is not None:
            extra["learning_rate"] = self._learning_rate
        if strategy.grad_norm is not None and not strategy.skipped:
            extra["grad_norm"] = strategy.grad_norm
        pl_module.log_dict(row, prog_bar=True, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(row | extra, step=step)
        self.rows += 1
        self._row_start = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is not training time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._row_start += time.perf_counter() - start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock: validation is not training time."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock again."""
        self._row_start += time.perf_counter() - self._paused

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the load history."""
        self.save_history()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the load history so far; before the first row it is only what a checkpoint's run has logged."""
        if self.rows:
            self.save_history()

    def save_history(self) -> None:
        """Writes the load of every row so far, on rank 0."""
        if self.history_path is not None and self.history.steps:
            self.history.save(self.history_path)


def of_layer(load: LayerLoad) -> dict[str, float]:
    """Values of a layer in one step, as columns: `KIND/PATH`, and `load/PATH/EXPERT`, `node_tokens/PATH/NODE`."""
    columns: dict[str, float | None] = {
        f"max_violation/{load.name}": load.max_violation,
        f"drop_rate/{load.name}": load.drop_rate,
        f"entropy/{load.name}": load.entropy,
        f"nodes_per_token/{load.name}": load.nodes_per_token,
    }
    for kind, counts in (("load", load.load), ("node_tokens", load.node_tokens)):
        digits = len(str(len(counts) - 1))  # columns are sorted as text
        columns |= {f"{kind}/{load.name}/{i:0{digits}d}": count for i, count in enumerate(counts.tolist())}
    return {name: value for name, value in columns.items() if value is not None}
