"""Hooks into a training run for packages that do not import Lightning."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moecompile.runtime.module import LanguageModule
from moecompile.runtime.strategy import ExpertParallelStrategy


class StepObserver(Callback):
    """Base class with hooks to override. Steps are optimizer steps, micro-batches are this rank's, both from 0."""

    _steps = 0  # computed so far

    def started(self, module: LanguageModule) -> None:
        """Before the first micro-batch; weights are sharded."""

    def micro_batch_started(self, module: LanguageModule, number: int) -> None:
        """Before a forward."""

    def gradients_ready(self, module: LanguageModule, step: int) -> None:
        """After gradients are summed over ranks and divided, before they are clipped."""

    def micro_batch_ended(self, module: LanguageModule, number: int) -> None:
        """After a backward, and after the optimizer step if the micro-batch ended one."""

    def step_ended(self, module: LanguageModule, strategy: ExpertParallelStrategy) -> None:
        """After an optimizer step, once."""

    def ended(self, module: LanguageModule) -> None:
        """After the last step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        self._steps = trainer.global_step  # of a run that goes on
        self.started(_language_module(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Lightning's hook."""
        self.micro_batch_started(_language_module(pl_module), batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Lightning's hook."""
        self.gradients_ready(_language_module(pl_module), trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook."""
        module = _language_module(pl_module)
        self.micro_batch_ended(module, batch_idx)
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            assert isinstance(trainer.strategy, ExpertParallelStrategy)
            self.step_ended(module, trainer.strategy)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        self.ended(_language_module(pl_module))


def _language_module(module: LightningModule) -> LanguageModule:
    assert isinstance(module, LanguageModule)
    return module
