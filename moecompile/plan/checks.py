"""Plans may be edited by hand, so the rules of configs are checked for them too, and raise PlanErrors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moecompile.errors import ConfigError, PlanError
from moecompile.ranges import Whole


@contextmanager
def plan_errors(where: str = "") -> Iterator[None]:
    """Turns a ConfigError into a PlanError, with `where` before its path."""
    try:
        yield
    except ConfigError as error:
        raise PlanError(f"{where}{error.path}", error.value, error.rule, error.fix) from None


def at_least(least: int, path: str, **values: int) -> None:
    """Raises ConfigError if one of `values` is smaller than `least`."""
    for name, value in values.items():
        Whole(least).check(f"{path}.{name}", value)
