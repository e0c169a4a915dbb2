"""Our version, which pyproject.toml says too, and the versions that made a result or a checkpoint."""

from __future__ import annotations

import platform

__version__ = "0.2.0"
_PACKAGES = ("torch", "transformers", "lightning", "moecompile")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a run, read without importing them; null: not installed."""
    from importlib.metadata import PackageNotFoundError, version  # it takes a while, and our own version needs it not

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
