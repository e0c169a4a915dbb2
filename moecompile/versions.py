"""Which versions made a result or a checkpoint."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("torch", "transformers", "lightning", "moecompile")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a run, read without importing them; null: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
