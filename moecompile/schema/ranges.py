"""The range of every number in the config, and the table of a word, as its field says it.

Rules for more than one key are in `validation`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from moecompile.ranges import Real, Whole, Words
from moecompile.schema.config import Config, FigureConfig


def _allowed(kind: type, prefix: str = "") -> Iterator[tuple[str, Whole | Real | Words]]:
    hints = get_type_hints(kind)
    for each in fields(kind):
        path, allowed = f"{prefix}{each.name}", each.metadata.get("range")
        if allowed is not None:
            yield f"{path}.value" if hints[each.name] is FigureConfig else path, allowed
        elif is_dataclass(hints[each.name]):
            yield from _allowed(hints[each.name], f"{path}.")


_ALLOWED = dict(_allowed(Config))
NUMBERS: dict[str, Whole | Real] = {path: each for path, each in _ALLOWED.items() if not isinstance(each, Words)}
"""Dotted key -> its range; keys that may be null are checked if they are not."""


def check_numbers(config: Any) -> None:
    """Checks the numbers of a config, or of an object that has some of its groups, and the words that have a table.

    Raises:
        ConfigError: a number is out of its range, or a word is not in its table (the first one).
    """
    for path, allowed in _ALLOWED.items():
        value = config
        for key in path.split("."):
            value = getattr(value, key, None)
        if value is not None:
            allowed.check(path, value)
