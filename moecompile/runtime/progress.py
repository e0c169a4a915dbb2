"""What is shown during training: a bar on a terminal, else lines; and the report, again and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from moecompile.runtime.metrics import Metrics
from moecompile.runtime.module import LanguageModule
from moecompile.runtime.observer import StepObserver
from moecompile.runtime.strategy import ExpertParallelStrategy


class ProgressBar(TQDMProgressBar):
    """Lightning's bar over optimizer steps, from the resumed step on, with rounded figures."""

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Starts the bar at the steps that are done already."""
        bar = self.train_progress_bar
        if bar.total == trainer.max_steps:
            return  # another pass over the data
        bar.reset(total=trainer.max_steps)
        bar.initial = bar.n = bar.last_print_n = trainer.global_step
        bar.set_description("step")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the bar after an optimizer step, not after a micro-batch."""
        bar, step = self.train_progress_bar, trainer.global_step
        if step != bar.n and (step % self.refresh_rate == 0 or step == trainer.max_steps):
            bar.n = step
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.refresh()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """loss, tokens/s, MaxVio, drops and val_loss, as far as they are known."""
        return _figures(trainer)


class ProgressLines(Callback):
    """Prints the same figures as lines if the output is not a terminal, every `log_interval` optimizer steps."""

    def __init__(self, log_interval: int) -> None:
        self.log_interval, self._last_step = log_interval, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the step at which the run starts."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Prints a line after a step that completes a row."""
        step = trainer.global_step
        if trainer.is_global_zero and step != self._last_step and (step == 1 or step % self.log_interval == 0):
            figures = "  ".join(f"{name} {value}" for name, value in _figures(trainer).items())
            print(f"step {step}/{trainer.max_steps}  {figures}", flush=True)
        self._last_step = step


def _figures(trainer: Trainer) -> dict[str, str]:
    """loss, tokens/s, MaxVio, drops and val_loss as text, as far as they are known."""
    metrics = trainer.progress_bar_metrics
    bound = float(metrics.get("max_violation_bound", 0.0))
    names = {
        "loss": "loss", "tokens_per_second": "tok/s", "max_violation": "MaxVio", "drop_rate": "drops", "val_loss": "val"
    }  # fmt: skip
    shapes = {"tokens_per_second": "{:,.0f}", "max_violation": f"{{:.2f}} of {bound:.2f}", "drop_rate": "{:.1%}"}
    return {
        short: shapes.get(name, "{:.3f}").format(float(metrics[name]))
        for name, short in names.items()
        if name in metrics
    }


SHARE = 0.01
"""Of the time of the run: what writing may take."""


class LiveReport(StepObserver):
    """After the first row, and whenever writing has taken less than 1% of the run, rank 0 saves metrics and loads and
    calls `write`. The time is not counted as training time.

    Args:
        metrics: whose rows are on disk when `write` is called.
    """

    def __init__(self, metrics: Metrics, write: Callable[[], None]) -> None:
        self.metrics, self.write = metrics, write
        self._written = 0  # rows
        self._spent = 0.0
        self._start = time.perf_counter()

    def step_ended(self, module: LanguageModule, strategy: ExpertParallelStrategy) -> None:
        """Writes, if there is a new row and it is time."""
        rows, now = self.metrics.rows, time.perf_counter()
        is_time = not self._spent or self._spent < SHARE * (now - self._start)
        if rows == self._written or not is_time or not strategy.is_global_zero:
            return
        self._written = rows
        with self.metrics.paused():
            trainer = module.trainer
            assert isinstance(trainer, Trainer)
            for logger in trainer.loggers:
                logger.save()
            self.metrics.save_history()
            self.write()
        self._spent += time.perf_counter() - now
