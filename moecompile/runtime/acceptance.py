"""A run takes its directory when its first new step is computed; until then nothing of the run before is touched.

Algorithm, after the first optimizer step:
  1. All ranks have computed it: weights were read, and nothing will refuse the run any more.
  2. Rank 0 moves later checkpoints aside, then the files of this run to their places.
  3. Every rank makes its loggers, which are told what was logged before.
If a rank is killed at any moment, the directory has the whole run before or this one (moecompile.rundir).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from moecompile.checkpoint.folders import set_aside
from moecompile.rundir import accept, note_accepted
from moecompile.runtime.metrics import Metrics


class Unwritten(Logger):
    """Keeps metrics until there are loggers that write files."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[dict[str, float], int | None]] = []

    @property
    def name(self) -> str:
        """Lightning's."""
        return "unwritten"

    @property
    def version(self) -> int:
        """Lightning's."""
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keeps them."""
        self.kept.append((dict(metrics), step))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """A language model has none."""


class Acceptance(Callback):
    """Gives the run directory to this run, see above. It is the first callback: others write files after it.

    Args:
        first_step: from which the run goes on. make: the loggers, on every rank; they may write at once.
        metrics: whose clock stops meanwhile.
    """

    def __init__(self, run_dir: Path, first_step: int, make: Callable[[], list[Logger]], metrics: Metrics) -> None:
        self.run_dir, self.first_step, self.make, self.metrics = run_dir, first_step, make, metrics
        self.unwritten, self._is_done = Unwritten(), False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook."""
        if trainer.global_step > self.first_step:
            with self.metrics.paused():
                self.ensure(trainer)

    def ensure(self, trainer: Trainer) -> None:
        """Accepts the run, if that is not done yet: also at the end, when there was no step to compute."""
        if self._is_done:
            return
        self._is_done = True
        trainer.strategy.barrier()  # Step 1
        note_accepted(self.run_dir)
        if trainer.is_global_zero:  # Step 2
            replaced = set_aside(self.run_dir, self.first_step)
            accept(self.run_dir)
            if replaced is not None:
                print(f"later checkpoints, which this run writes again, are kept in {replaced}", flush=True)
        trainer.strategy.barrier()
        trainer.loggers = self.make()  # Step 3
        for logger in trainer.loggers:
            for metrics, step in self.unwritten.kept:
                logger.log_metrics(metrics, step)
