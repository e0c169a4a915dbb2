"""Rules of `adapters`."""

from __future__ import annotations

from moecompile.errors import ConfigError
from moecompile.schema.config import Config
from moecompile.schema.enums import AdapterKind


def check_adapters(config: Config) -> None:
    """Checks the rules that need no model.

    Raises:
        ConfigError: the first rule that is broken.
    """
    adapters = config.adapters
    if adapters.kind is AdapterKind.none:
        given = [key for key in config.given if key.startswith("adapters.") and key != "adapters.kind"]
        if given:
            value = getattr(adapters, given[0].partition(".")[2], None)
            raise ConfigError(given[0], value, "has no effect without adapters", "Use adapters=lora, or leave it out")
        return
    if adapters.dense is None and adapters.experts is None:
        raise ConfigError(
            "adapters.dense", None, "is null as adapters.experts is, so there would be no adapters",
            "Give a pattern for one of them, or use adapters=none",
        )  # fmt: skip
    if adapters.dropout and adapters.experts is not None:
        raise ConfigError(
            "adapters.dropout", adapters.dropout, "has no meaning for adapters of experts, in peft as here: they are "
            "added to stacked weights, which have no input of their own", "Use 0, or adapters.experts=null",
        )  # fmt: skip
