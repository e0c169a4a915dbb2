"""Loggers and Lightning callbacks that the config names."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from moecompile.errors import ConfigError
from moecompile.runtime.saving import rows_until, write_again
from moecompile.schema import Config, LoggerKind, TrainerConfig

CALLBACKS = ("EarlyStopping", "Timer")
"""Lightning's callbacks that end a run. Others change weights, batches or checkpoints, or log what is there already."""


def make_loggers(config: Config, run_dir: Path, start: Path | None = None, first_step: int = 0) -> list[Logger]:
    """Those of the config, and always metrics.csv, with the earlier rows of the checkpoint `start`.

    Weights & Biases stays offline unless WANDB_MODE says otherwise; MLflow writes to `run_dir`/mlruns unless
    MLFLOW_TRACKING_URI does.
    """
    rows = [] if start is None or int(os.environ["RANK"]) else rows_until(start, first_step)
    table = CSVLogger(run_dir, name="", version="")
    write_again(table, rows)
    purge = None if start is None else first_step + 1
    loggers: list[Logger] = [table]
    for kind in config.trainer.loggers:
        if kind is LoggerKind.tensorboard:
            loggers.append(TensorBoardLogger(run_dir, name="tensorboard", version="", purge_step=purge))
            continue
        logger = _wandb(config, run_dir) if kind is LoggerKind.wandb else _mlflow(config, run_dir)
        logger.log_hyperparams(_plain(asdict(config)))
        loggers.append(logger)
    return loggers


@contextmanager
def finished(trainer: Trainer) -> Iterator[None]:
    """Afterwards, also after an error, loggers have written everything: ranks may end without exit handlers."""
    code = 1
    try:
        yield
        code = 0
    finally:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                logger.experiment.finish(exit_code=code)


def _wandb(config: Config, run_dir: Path) -> Logger:
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    same = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]  # a resumed run goes on in its own
    project = os.environ.get("WANDB_PROJECT", "moecompile")
    return WandbLogger(name=config.name, project=project, save_dir=run_dir, id=same, resume="allow")


def _mlflow(config: Config, run_dir: Path) -> Logger:
    where = os.environ.get("MLFLOW_TRACKING_URI") or f"file:{run_dir.resolve() / 'mlruns'}"
    if where.startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "moecompile")
    return _MLflow(experiment_name=experiment, run_name=config.name, tracking_uri=where)


class _MLflow(MLFlowLogger):
    """A metric is a file with its name, which cannot be a folder of others (`max_violation`, `max_violation/LAYER`)."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs them with dots."""
        super().log_metrics({name.replace("/", "."): value for name, value in metrics.items()}, step)


def make_callbacks(trainer: TrainerConfig) -> list[Callback]:
    """Lightning's callbacks, with the arguments of the config.

    Raises:
        ConfigError: an unknown one, or arguments that it does not take.
    """
    import lightning.pytorch.callbacks

    made = []
    for name, arguments in trainer.callbacks.items():
        key = f"trainer.callbacks.{name}"
        if name not in CALLBACKS:
            raise ConfigError("trainer.callbacks", name, f"must be one of {', '.join(CALLBACKS)}", "Use one of these")
        kind: Any = getattr(lightning.pytorch.callbacks, name)
        given: Any = {} if arguments is None else arguments
        if not isinstance(given, Mapping):
            raise ConfigError(key, given, "must be a mapping of arguments", f"Use {{{name}: {{}}}} for none")
        known = [each for each in inspect.signature(kind).parameters if each != "kwargs"]
        for argument in given:
            if argument not in known:
                raise ConfigError(f"{key}.{argument}", given[argument], f"{name} takes {', '.join(known)}", "Use these")
        try:
            made.append(kind(**given))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ConfigError(key, dict(given), f"Lightning says: {reason}", "Correct the arguments") from error
    return made


def _plain(value: Any) -> Any:
    """Of the config, without types that loggers cannot write."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return getattr(value, "value", value)
