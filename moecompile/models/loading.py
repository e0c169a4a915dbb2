"""Turns transformers' report on loaded weights into one error: transformers itself replaces missing ones at random."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

from moecompile.errors import ConfigError

UNREADABLE = (
    OSError, ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, ImportError, SafetensorError,
)  # fmt: skip
"""Exceptions that reading a folder may raise."""
_SHOWN = 3


def refuse_incomplete(
    info: Mapping[str, Any], path: str, value: object, fix: str = "Use a whole checkpoint of this model"
) -> None:
    """Refuses weights that do not match the model exactly. Tied and optional weights may be missing.

    Args:
        info: from `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)`.
        path, value: config key that names the weights, and its value.

    Raises:
        ConfigError: weights are missing, unknown or of another shape; names the first of each.
    """
    problems = []
    if info["missing_keys"]:
        problems.append(f"lacks {some(info['missing_keys'])}")
    if info["unexpected_keys"]:
        problems.append(f"holds {some(info['unexpected_keys'])}, which the model does not have")
    if shapes := [f"{name} as {list(stored)}, not {list(own)}" for name, stored, own in info["mismatched_keys"]]:
        problems.append(f"holds {some(shapes)}")
    if info.get("error_msgs"):
        problems.append(some(info["error_msgs"]))
    if problems:
        raise ConfigError(path, value, "; ".join(problems), fix)


def dequantized(config: Any, path: str, value: object) -> dict[str, Any]:
    """Options of `from_pretrained` for whole weights: of FP8, a GPU would keep modules that cannot be trained.

    Args:
        config: of transformers. path, value: as for `refuse_incomplete`.

    Raises:
        ConfigError: transformers makes no whole weights of these.
    """
    found = getattr(config, "quantization_config", None)
    if not found:
        return {}
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    stored: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    method = str(stored.get("quant_method"))
    kind: Any = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    if kind is None or "dequantize" not in inspect.signature(kind).parameters:
        rule = f"holds weights that are quantized by {method}, which transformers does not make whole ones of"
        raise ConfigError(path, value, rule, "Give a folder with the weights before they were quantized")
    return {"quantization_config": kind.from_dict({**stored, "dequantize": True})}


@contextmanager
def unconverted_weights() -> Iterator[list[str]]:
    """Keeps transformers' own report off the terminal, and collects the weights that it could not convert."""
    names: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        names.extend(re.findall(r"^(\S+)\s*\|.*CONVERSION", text, re.MULTILINE))
        return "LOAD REPORT" not in text

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(collect)
    try:
        yield names
    finally:
        logger.removeFilter(collect)


def unreadable(error: BaseException, path: str, value: object, unconverted: Iterable[str] = ()) -> ConfigError:
    """A one-line error for an exception from reading a folder. unconverted: weights that could not be converted."""
    if weights := set(unconverted):
        rule = f"parts of {some(weights)} are missing or do not fit each other"
        return ConfigError(path, str(value), rule, "Use a whole checkpoint")
    text = " ".join(str(error).split())[:500].rstrip(".") or type(error).__name__
    return ConfigError(path, str(value), f"cannot be loaded: {text}", "Check the folder")


def some(names: Iterable[str]) -> str:
    """The first names in sorted order, and the number of others."""
    ordered = sorted(map(str, names))
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
