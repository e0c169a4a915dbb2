"""What transformers reports of loaded weights, as one error: it goes on with random numbers for what is missing."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

from moecompile.errors import ConfigError

UNREADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, SafetensorError)
"""What reading a folder may raise."""
_SHOWN = 3


def refuse_incomplete(
    info: Mapping[str, Any], path: str, value: object, fix: str = "Use a whole checkpoint of this model"
) -> None:
    """Refuses weights that are not exactly the model's. Tied weights, and what a class says may miss, are not reported.

    Args:
        info: `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)` gave it.
        path, value: of the config, that name the weights.

    Raises:
        ConfigError: weights are missing, unknown or of another shape; names the first of each.
    """
    said = []
    if info["missing_keys"]:
        said.append(f"lacks {some(info['missing_keys'])}")
    if info["unexpected_keys"]:
        said.append(f"holds {some(info['unexpected_keys'])}, for which the model has no place")
    if shapes := [f"{name} as {list(found)}, not {list(here)}" for name, found, here in info["mismatched_keys"]]:
        said.append(f"holds {some(shapes)}")
    if info.get("error_msgs"):
        said.append(some(info["error_msgs"]))
    if said:
        raise ConfigError(path, value, "; ".join(said), fix)


@contextmanager
def told() -> Iterator[list[str]]:
    """Keeps transformers' own report off the terminal; the names of the weights in it that it could not make."""
    names: list[str] = []

    def seen(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        names.extend(re.findall(r"^(\S+)\s*\|.*CONVERSION", text, re.MULTILINE))
        return "LOAD REPORT" not in text

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(seen)
    try:
        yield names
    finally:
        logger.removeFilter(seen)


def unreadable(error: BaseException, path: str, value: object, names: Iterable[str] = ()) -> ConfigError:
    """One line for what reading a folder has raised. names: weights that could not be made."""
    if parts := set(names):
        rule = f"parts of {some(parts)} are missing or do not fit each other"
        return ConfigError(path, str(value), rule, "Use a whole checkpoint")
    text = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(path, str(value), f"cannot be loaded: {text[:500]}", "Check the folder")


def some(names: Iterable[str]) -> str:
    """The first names, in order, and how many more there are."""
    ordered = sorted(map(str, names))
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
