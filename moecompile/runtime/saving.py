"""Saves checkpoints during training, and resumes from them on the same mesh or another."""

from __future__ import annotations

import csv
from datetime import timedelta
from math import inf
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger

from moecompile.atomic import replacing
from moecompile.checkpoint import folders
from moecompile.checkpoint.fingerprint import differences, of_training, settings
from moecompile.checkpoint.fit import check_order, plan_differences, refuse
from moecompile.checkpoint.folders import check
from moecompile.checkpoint.placed import orders_of
from moecompile.checkpoint.resume import TRAINED_WITH, State, check_settings, not_compared, read_state
from moecompile.checkpoint.tensors import entries_of, forget_unused, tensors_of, written
from moecompile.checkpoint.writer import Writer
from moecompile.errors import ConfigError
from moecompile.kept_groups import cpu_group
from moecompile.load_history import LOAD_HISTORY, LoadHistory
from moecompile.metrics_table import METRICS, read_rows
from moecompile.plan import Plan, read
from moecompile.runtime import signals
from moecompile.runtime.converted import reading_of
from moecompile.runtime.metrics import Metrics
from moecompile.runtime.module import LanguageModule
from moecompile.runtime.strategy import groups_of
from moecompile.schema import Baseline, Config
from moecompile.version import versions


class Saver(Callback):
    """Writes a checkpoint every `trainer.save_interval` optimizer steps, and one at the end.

    Args:
        metrics: their state is saved too. fingerprint: of model and data, saved too. val_windows: sequences of a
            validation, without which losses of two parts of a run cannot be compared.
        start: the checkpoint to resume from, with its state; None: a new run.

    Raises:
        ConfigError: a dense model is to be trained beside, and validations of the two parts are of other text.
    """

    def __init__(
        self, run_dir: Path, plan: Plan, config: Config, metrics: Metrics, start: tuple[Path, State] | None,
        fingerprint: dict[str, Any], val_windows: int,
    ) -> None:  # fmt: skip
        self.checkpoints, self.plan, self.config, self.metrics = folders.checkpoints_of(run_dir), plan, config, metrics
        self.fingerprint = fingerprint
        self.start, before = start, {} if start is None else start[1].metrics
        self.val_loss_first, self.val_windows = _first_loss(before, val_windows, config), val_windows
        known, now = list(before.get(TRAINED_WITH, ())), of_training(config)
        self._trained_with = known if now in known else [*known, now]
        self._step = 0 if start is None else start[1].step
        self._is_saved = start is not None and start[0].parent == self.checkpoints.resolve()
        self._writer: Writer | None = None
        self._agreeing: dist.ProcessGroup | None = None  # the writer's group belongs to its thread

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the checkpoint; weights are sharded and the optimizer exists."""
        assert isinstance(pl_module, LanguageModule)
        timeout = timedelta(seconds=self.config.trainer.timeout_s)
        group = cpu_group("checkpoints", timeout)
        self._agreeing = cpu_group("agreeing to end", timeout)
        self._writer = Writer(
            self.checkpoints, self.plan, keep_last=self.config.trainer.keep_last,
            background=self.config.trainer.async_save, group=group,
        )  # fmt: skip
        if self.start is not None:
            restore(trainer, pl_module, self.metrics, *self.start)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves every `save_interval` steps; raises the error of a background save."""
        assert self._writer is not None
        self._writer.check()
        if trainer.global_step == self._step:
            return
        self._step, self._is_saved = trainer.global_step, False
        interval = self.config.trainer.save_interval
        if interval and self._step % interval == 0:
            self._save(trainer, pl_module)
        self._end_if_asked(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Ends a validation between two steps after a signal."""
        if self._agreeing is not None:
            self._end_if_asked(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes Lightning's signal handlers."""
        signals.quiet()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes them again, which Lightning sets for a validation outside of fit."""
        signals.quiet()

    def _end_if_asked(self, trainer: Trainer, module: LightningModule) -> None:
        """Ends all ranks after the same step if one of them has received a signal.

        Raises:
            Stopped: after the step is saved, if the run keeps checkpoints.
        """
        asked = torch.tensor([signals.requested()])
        dist.all_reduce(asked, dist.ReduceOp.MAX, self._agreeing)
        if not (number := int(asked)):
            return
        assert self._writer is not None
        keeps = self.config.trainer.save_checkpoint or self.config.trainer.save_interval > 0
        if keeps and not self._is_saved and self._step:
            self._save(trainer, module)
        self._writer.wait()
        trainer.strategy.barrier()
        first = 0 if self.start is None else self.start[1].step
        raise signals.Stopped(number, self._step if self._is_saved else None, self._step - first)

    def finish(self, trainer: Trainer, module: LanguageModule) -> Path | None:
        """Saves the last checkpoint if configured, waits until it is written, and returns its path."""
        assert self._writer is not None
        if self.config.trainer.save_checkpoint and not self._is_saved:
            self._save(trainer, module)
        self._writer.wait()
        if trainer.is_global_zero:
            self.metrics.save_history()
        trainer.strategy.barrier()  # rank 0 has moved `latest`
        return folders.step_folder(self.checkpoints, self._step) if self._is_saved else None

    def _save(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._writer is not None and isinstance(module, LanguageModule)
        if trainer.is_global_zero:  # to resume from here, rows up to here are needed
            self.metrics.save_history()
            for logger in trainer.loggers:
                logger.save()
        state = State(
            step=self._step,
            sequences=self._step * self.config.data.global_batch_size,
            fixed=settings(self.config),
            world_size=self.plan.mesh.world_size,
            plan_hash=self.plan.hash,
            versions=dict(versions()),
            metrics={
                **self.metrics.tally.state(groups_of(trainer).losses),
                "val_loss_first": self.val_loss_first,
                "val_windows": self.val_windows,
                TRAINED_WITH: self._trained_with,
                "early_stopping": {each.state_key: _waited(each) for each in _early_stopping(trainer)},
            },
            fingerprint=self.fingerprint,
        )
        tensors = written(module.model, tensors_of(module.model, trainer.strategy.optimizers))
        self._writer.save(tensors, state, orders_of(module.model, tensors))
        self._is_saved = True


def restore(trainer: Trainer, module: LanguageModule, metrics: Metrics, folder: Path, state: State) -> None:
    """Restores weights, biases, optimizer, learning rate, step and metrics; random numbers follow from the step.

    Raises:
        PlanError: the checkpoint has other names or shapes.
    """
    optimizers, saved = trainer.strategy.optimizers, entries_of(folder)
    had_steps = state.metrics["steps_skipped"] < state.step
    tensors = tensors_of(module.model, optimizers, to_read=True)
    tensors = forget_unused(module.model, optimizers, tensors, saved, had_steps=had_steps)
    reading_of(folder, module.model, optimizers, tensors, saved, stages=groups_of(trainer).stages).fill()
    for scheduler in trainer.strategy.lr_scheduler_configs:
        module.set_step(scheduler.scheduler, state.step)
    loop, batches = trainer.fit_loop.epoch_loop, state.step * trainer.accumulate_grad_batches
    steps = loop.automatic_optimization.optim_progress.optimizer.step.total
    steps.ready = steps.completed = state.step  # what trainer.global_step reads
    loop.batch_progress.total.ready = loop.batch_progress.total.completed = batches  # when to validate
    known = {"kinds": _kinds(read(folder / folders.PLAN)), **state.metrics}
    metrics.tally.restore(known, is_first_rank=groups_of(trainer).is_first)
    waited = state.metrics.get("early_stopping", {})  # not in checkpoints of 0.2.0
    for callback in _early_stopping(trainer):
        callback.load_state_dict({**callback.state_dict(), **waited.get(callback.state_key, {})})
        callback.best_score = torch.as_tensor(callback.best_score)
    if trainer.is_global_zero:
        metrics.history = _history(folder, state.step)


def _first_loss(before: dict[str, Any], windows: int, config: Config) -> float | None:
    """The validation loss that a run began with; None: it begins here, or was of other text. before: of its state."""
    others = before.get("val_windows", windows)  # not in checkpoints of 0.2.0
    if windows == others:
        return before.get("val_loss_first")
    said = f"validation is of {windows:,} sequences here and was of {others:,}"
    if config.trainer.baseline is not Baseline.none:
        rule = f"{said}, so losses before cannot be compared with a dense model's (trainer.baseline)"
        fix = "Give as many micro-batches per rank as make the same sequences, or use trainer.baseline=none"
        raise ConfigError("data.val_batches", config.data.val_batches, rule, fix)
    if dist.get_rank() == 0:
        print(f"{said} (data.val_batches is per rank): the first loss is left out", flush=True)
    return None


def _early_stopping(trainer: Trainer) -> list[EarlyStopping]:
    return [callback for callback in trainer.early_stopping_callbacks if isinstance(callback, EarlyStopping)]


def _waited(callback: EarlyStopping) -> dict[str, float]:
    """For how many validations a callback has waited, since which value; its patience is what the config says."""
    return {"wait_count": callback.wait_count, "best_score": float(callback.best_score)}


def _kinds(plan: Plan) -> list[str]:
    """The kinds of auxiliary losses as 0.2.0 has summed them, which saved no names."""
    kinds = dict.fromkeys(kind for layer in plan.layers for kind in layer.balance.losses)
    return list(kinds) if plan.pipeline is None else sorted(kinds)


def rows_until(folder: Path, step: int) -> list[dict[str, float]]:
    """Rows of the metrics.csv beside a run's checkpoints, up to an optimizer step; none if it is not there."""
    path = folder.parent.parent / METRICS
    if not path.is_file():
        return []
    return [row for row in read_rows(path) if row.get("step", inf) <= step]


def write_again(logger: CSVLogger, rows: list[dict[str, float]]) -> None:
    """Writes earlier rows before new ones. Lightning's logger removes the file as it starts, so they are on disk first.

    Raises:
        OSError: they cannot be written; the file is as it was.
    """
    if not rows:
        return
    names = sorted({name for row in rows for name in row})
    with replacing(Path(logger.log_dir) / METRICS) as partial:
        with partial.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, fieldnames=names)
            table.writeheader()
            for row in rows:
                table.writerow({name: int(value) if value.is_integer() else value for name, value in row.items()})
        logger.experiment.metrics_keys = names  # the first use of `experiment` removes the file


def _history(folder: Path, step: int) -> LoadHistory:
    path = folder.parent.parent / LOAD_HISTORY
    return LoadHistory.read(path).until(step) if path.is_file() else LoadHistory()


def _check_function(start: tuple[Path, State], plan: Plan, config: Config, fingerprint: dict[str, Any]) -> None:
    """Checks that model, data and plan are those of the checkpoint."""
    folder, state = start
    saved = read(folder / folders.PLAN)
    check_order(saved, plan, folder)
    changes = [*differences(state.fingerprint, fingerprint)] if state.fingerprint else []
    changes += plan_differences(saved, plan)
    refuse(changes, config.trainer.allow_changes, folder)


def _losses(plan: Plan) -> str:
    """Coefficients of auxiliary losses, as layers have them."""
    each = (", ".join(f"{name}={value:g}" for name, value in layer.balance.losses.items()) for layer in plan.layers)
    return " and ".join(text or "none" for text in dict.fromkeys(each))


def starting_point(
    config: Config, plan: Plan, run_dir: Path, fingerprint: dict[str, Any], *, is_restart: bool
) -> tuple[Path, State] | None:
    """The checkpoint that this run resumes from, and its state; None: a new run. All ranks call it; it changes nothing.

    Args:
        fingerprint: of the model and the data.
        is_restart: whether an attempt before this one has trained in `run_dir`.

    Raises:
        ConfigError: the checkpoint does not exist or is of another run, or a new run's directory has checkpoints.
        PlanError: it does not fit the plan.
    """
    checkpoints, resume = folders.checkpoints_of(run_dir), config.trainer.resume
    folder = folders.find(folders.AUTO, run_dir) if is_restart else None
    if folder is None and resume is not None:
        folder = folders.find(resume, run_dir)
    if folder is not None:
        check(folder, [folders.STATE])
    start = None if folder is None else (folder, read_state(folder))
    if start is not None:
        check(start[0], [folders.PLAN])
        check_settings(start[1], config, start[0])
        _check_function(start, plan, config, fingerprint)
    if (start is None or start[0].parent != checkpoints.resolve()) and folders.steps(checkpoints):
        raise ConfigError(
            "hydra.run.dir", run_dir, "holds the checkpoints of another run",
            "Go on with that run by trainer.resume=auto, or use another directory",
        )  # fmt: skip
    if start is not None and dist.get_rank() == 0:
        print(f"going on from step {start[1].step} of {start[0]}", flush=True)
        theirs, ours = _losses(read(start[0] / folders.PLAN)), _losses(plan)
        if theirs != ours:
            print(f"losses of the routers were {theirs}, and are {ours} here (balance=)", flush=True)
        if unknown := not_compared(start[1], config):
            print(f"This checkpoint is of an earlier version: not compared: {', '.join(unknown)}", flush=True)
    return start
