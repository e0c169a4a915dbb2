"""The range of every number in the config, as its field says it. Rules for more than one key are in `validation`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from moecompile.ranges import Real, Whole
from moecompile.schema.config import Config, FigureConfig


def _numbers(kind: type, prefix: str = "") -> Iterator[tuple[str, Whole | Real]]:
    hints = get_type_hints(kind)
    for each in fields(kind):
        path, allowed = f"{prefix}{each.name}", each.metadata.get("range")
        if allowed is not None:
            yield f"{path}.value" if hints[each.name] is FigureConfig else path, allowed
        elif is_dataclass(hints[each.name]):
            yield from _numbers(hints[each.name], f"{path}.")


NUMBERS: dict[str, Whole | Real] = dict(_numbers(Config))
"""Dotted key -> its range; keys that may be null are checked if they are not."""


def check_numbers(config: Any) -> None:
    """Checks the numbers of a config, or of an object that has some of its groups.

    Raises:
        ConfigError: a number is out of its range (the first one).
    """
    for path, allowed in NUMBERS.items():
        value = config
        for key in path.split("."):
            value = getattr(value, key, None)
        if value is not None:
            allowed.check(path, value)
