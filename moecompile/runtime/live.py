"""Writes what is known so far during training, for reports that are read while the run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable

from lightning.pytorch import Trainer

from moecompile.runtime.metrics import Metrics
from moecompile.runtime.module import LanguageModule
from moecompile.runtime.observer import StepObserver
from moecompile.runtime.strategy import ExpertParallelStrategy

SHARE = 0.01
"""Of the time of the run: what writing may take."""


class Live(StepObserver):
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
