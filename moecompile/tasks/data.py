"""task=data: reads the data as training does, and says what is in them. In one process, without weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from moecompile.models.build import pretrained_folder
from moecompile.models.chat import load_chat_template
from moecompile.report.console import print_data
from moecompile.report.result import write_result
from moecompile.rundir import accept
from moecompile.runtime.data import ChatRows, TextData, TokenWindows, data_warnings, load_data, marked
from moecompile.schema import Config, TaskName, validate


def run(config: Config, run_dir: Path) -> None:
    """Prints what is in the data, and writes `result.json`."""
    fields = data_fields(read_data(config), config)
    accept(run_dir)
    print_data(fields, Console(soft_wrap=False))
    write_result(run_dir, "data", config.name, {**fields, "warnings": fields["data_warnings"]})


def read_data(config: Config) -> TextData:
    """The data of a config, in this process alone; what is tokenized stays in the cache.

    Raises:
        ConfigError: they cannot be read, or are too short.
    """
    model = config.model  # of which only the tokenizer must be there
    beside = Path(model.pretrained) if model.pretrained else pretrained_folder(model)
    with TemporaryDirectory() as folder:  # for the tokenizer that a run keeps
        return load_data(
            config.data, Path(folder), rank=0, barrier=lambda: None, model_folder=beside, seed=config.seed,
            chat_template=load_chat_template,
        )  # fmt: skip


def data_fields(data: TextData, config: Config) -> dict[str, Any]:
    """The fields of result.json about the data; every name begins with `data_`."""
    counts = {} if data.counts is None else dataclasses.asdict(data.counts)
    rows, batch = len(data.train), config.data.global_batch_size
    fields: dict[str, Any] = {f"data_{name}": value for name, value in counts.items()}
    fields |= {
        "data_sequences": rows,
        "data_held_out": len(data.val),
        "data_sequences_per_step": batch,
        "data_steps_per_epoch": steps_of(1, rows, batch),
        "data_steps": config.trainer.max_steps,
        "data_epochs": config.trainer.max_steps * batch / rows,
        "data_warnings": data_warnings(data, config.data.seq_len),
    }
    if isinstance(data.train, TokenWindows) and isinstance(data.val, TokenWindows):
        fields["data_tokens"] = len(data.train.tokens) + len(data.val.tokens)
    if isinstance(data.train, ChatRows):
        fields["data_example"], fields["data_example_tokens"] = marked(data.train, data.tokenizer)
    return fields


# -- data.epochs: how long to train, in passes over the data --------------------------------------------------------


def steps_of(epochs: float, rows: int, global_batch_size: int) -> int:
    """Optimizer steps in which each of `rows` is seen `epochs` times; the next pass fills the last step."""
    return max(1, math.ceil(round(epochs * rows / global_batch_size, 6)))


_TASKS = (TaskName.train, TaskName.plan, TaskName.data)


def with_epochs(config: Config) -> Config:
    """The config with the steps of `data.epochs` as `trainer.max_steps`; unchanged without.

    So schedule, validation, progress and what a resumed run has to do follow from the steps alone.

    Raises:
        ConfigError: the config breaks a rule, or the data cannot be read.
    """
    epochs = config.data.epochs
    if epochs is None or config.task.name not in _TASKS:
        return config
    validate(config)
    steps = steps_of(epochs, len(read_data(config).train), config.data.global_batch_size)
    return with_steps(config, steps)


def with_steps(config: Config, steps: int) -> Config:
    """The config with other `trainer.max_steps`."""
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, max_steps=steps))
