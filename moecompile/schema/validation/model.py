"""Rules of `model`."""

from __future__ import annotations

from moecompile.errors import ConfigError
from moecompile.schema.config import Config
from moecompile.schema.enums import ModelDevice, TaskName
from moecompile.schema.implied import SOURCES


def check_model(config: Config) -> None:
    """Checks that one model is given, on a device that the task can use.

    Raises:
        ConfigError: the first rule that is broken.
    """
    sources = {name: getattr(config.model, name) for name in SOURCES}
    given = [name for name, value in sources.items() if value]
    if len(given) != 1:
        raise ConfigError(
            "model",
            given or None,
            "exactly one of model.architecture, model.pretrained, model.package and model.factory must be given",
            "Select a model group, for example model=llama_nano, or give one of the four",
        )
    task = config.task.name
    if config.model.device is ModelDevice.meta and task in (TaskName.train, TaskName.bench):
        raise ConfigError(
            "model.device", "meta", f"the model has shapes but no values, so task={task.value} cannot run it",
            "Use task=plan or task=compile, or model.device=cpu if it fits into memory",
        )  # fmt: skip
    if config.model.device is ModelDevice.meta and (config.model.pretrained or config.model.package):
        raise ConfigError(
            "model.device", "meta", f"model.{given[0]} loads values", "Use model.device=cpu, or model.architecture"
        )
