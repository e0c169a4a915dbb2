"""Rules of `export`, which only task=export reads."""

from __future__ import annotations

from moecompile.errors import ConfigError
from moecompile.named_code import FACTORY
from moecompile.schema.config import Config
from moecompile.schema.enums import ExportFormat, TaskName


def check_export(config: Config) -> None:
    """Checks the rules that need no run.

    Raises:
        ConfigError: the first rule that is broken.
    """
    export = config.export
    if config.task.name is not TaskName.export:
        return
    if export.run is None and export.checkpoint is None:
        raise ConfigError(
            "export.run", None, "task=export needs a run that was trained", "Give export.run=RUN_DIRECTORY"
        )
    if export.family is not None and export.format is ExportFormat.native:
        raise ConfigError(
            "export.family", export.family, "has no meaning with export.format=native", "Leave one of them out"
        )
    given = [key for key in config.given if key != FACTORY]  # the run's, which the caller must name again
    if others := [key for key in given if key.partition(".")[0] not in ("export", "task", "hydra")]:
        raise ConfigError(
            others[0], "...", "task=export takes the model and its plan from the run, so other keys have no effect",
            "Leave it out",
        )  # fmt: skip
