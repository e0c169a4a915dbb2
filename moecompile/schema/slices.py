"""Parses `layers` keys: Python slices over sites, as text."""

from __future__ import annotations

from moecompile.errors import ConfigError


def site_slice(text: str, path: str = "experts.layers") -> slice:
    """Parses text such as `1:` or `::2` as a slice.

    Raises:
        ConfigError: not a Python slice.
    """
    parts = text.strip().strip("[]").split(":")
    try:
        numbers = [int(part) if part.strip() else None for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 3) or (len(numbers) == 3 and numbers[2] == 0):
        raise ConfigError(
            path, text, "must be a Python slice over the matched sites",
            "Use ':' for all, '1:' for all but the first, '::2' for every other",
        )  # fmt: skip
    return slice(*numbers)
