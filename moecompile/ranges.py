"""Checks of single values: integers and real numbers in a range, words from a list. They raise ConfigErrors."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from moecompile.errors import ConfigError

_MOST = 2**31 - 1


def number(default: Any, allowed: Whole | Real) -> Any:
    """A field of the config that holds a number, with its range: `steps: int = number(3, Whole(1))`."""
    return field(default=default, metadata={"range": allowed})


@dataclass(frozen=True)
class Whole:
    """A whole number in [low, high]."""

    low: int
    high: int = _MOST

    def __str__(self) -> str:
        return f"{self.low} to {self.high:,}" if self.high < _MOST else f"{self.low} or more"

    def check(self, path: str, value: Any) -> None:
        """Raises ConfigError unless `value` is an integer in the range."""
        if type(value) is not int:
            raise ConfigError(path, value, "has the wrong type", "Give a whole number")
        if value < self.low:
            raise ConfigError(path, value, f"must be at least {self.low}", f"Use {self.low} or more")
        if value > self.high:
            raise ConfigError(path, value, f"must be at most {self.high}", f"Use {self.high} or less")


@dataclass(frozen=True)
class Real:
    """A finite number in an interval in the usual notation: `[` includes the end, `(` excludes it."""

    interval: str
    fix: str

    def __str__(self) -> str:
        return {"(0, inf)": "positive", "[0, inf)": "0 or more"}.get(self.interval, f"in {self.interval}")

    def check(self, path: str, value: Any) -> None:
        """Raises ConfigError unless `value` is in the interval, also for NaN and infinities."""
        if type(value) not in (int, float):
            raise ConfigError(path, value, "has the wrong type", "Give a number")
        low, high = (float(end) for end in self.interval[1:-1].split(","))
        above = value > low or (value == low and self.interval[0] == "[")
        below = value < high or (value == high and self.interval[-1] == "]")
        if not math.isfinite(value):
            raise ConfigError(path, value, "must be a finite number", self.fix)
        if not (above and below):
            rules = {"(0, inf)": "must be positive", "[0, inf)": "must not be negative"}
            raise ConfigError(path, value, rules.get(self.interval, f"must lie in {self.interval}"), self.fix)


def check_object(path: str, value: str) -> None:
    """Raises ConfigError unless `value` names an object of a module, `module:name`."""
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*", value):
        raise ConfigError(path, value, "must be module:name", "Name an object that every rank can import")


@dataclass(frozen=True)
class Words:
    """One of the words in a table, which may grow. fix: what to change if it is not there."""

    known: Collection[str]
    fix: str

    def __str__(self) -> str:
        return ", ".join(f"`{word}`" for word in self.known)

    def check(self, path: str, value: Any) -> None:
        """Raises ConfigError unless `value` is in the table."""
        check_word(self.known, path, value, self.fix)


def check_word(known: Iterable[str], path: str, value: str, fix: str = "Use one of these") -> None:
    """Raises ConfigError unless `value` is one of the words (or the value of an enum member) in `known`."""
    words = [item.value if isinstance(item, Enum) else item for item in known]
    if value not in words:
        close = difflib.get_close_matches(str(value), words, n=1, cutoff=0.7)
        fix = f"Did you mean {close[0]}? {fix}" if close else fix
        raise ConfigError(path, value, f"must be one of {words}", fix)
