"""Code that a config names, and who may name it: the caller alone, on the command line or in Python.

A file may not: neither a recipe or a group's file, nor `per_layer`, a plan, or the config of a run. It may repeat what
the caller names too. Every reader of files compares what it has read with what the caller names (`refuse_unnamed`), and
every import of a name is made here (`imported`), so that a key which is missing in `KEYS` cannot be used at all.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from moecompile.errors import ConfigError

FACTORY, EXPERTS, DISPATCH = "model.factory", "experts.backend", "dispatch.backend"
IMPORTED = (FACTORY, EXPERTS, DISPATCH)
"""Keys whose value is imported."""
KEYS = (*IMPORTED, "launcher.setup", "launcher.directives", "launcher.python")
"""Keys that name code: what is imported, and what a batch job runs or sets in its environment. A key of `experts` is
meant in `per_layer.NAME` too."""

VARIABLE = "MOECOMPILE_NAMED_CODE"
"""Environment variable in which a rank is told what the caller names: it did not see the command line."""

Named = Mapping[str, Any]
"""Dotted key -> its value, of code that is named."""


def named_in(config: Any) -> dict[str, Any]:
    """The code that a config names; one that `compose` made names what the caller names, and nothing else."""
    found = {key: functools.reduce(getattr, key.split("."), config) for key in KEYS}
    for name, change in config.per_layer.items():
        for key in KEYS:
            group, _, field = key.partition(".")
            values = getattr(change, group, None) or {}
            found[f"per_layer.{name}.{key}"] = values.get(field)
    return {key: value for key, value in found.items() if value}


def without(config: Any, keys: Collection[str]) -> Any:
    """A copy of a config that names no code at `keys`."""
    copied = copy.deepcopy(config)
    for key in keys:
        group, _, field = key.partition(".")
        owner = getattr(copied, group)
        setattr(owner, field, getattr(type(owner)(), field))
        for change in copied.per_layer.values():
            getattr(change, group, {}).pop(field, None)
    return copied


def refuse_unnamed(found: Named, named: Named, path: str, source: Any) -> None:
    """Refuses code that a file names and the caller does not.

    Args:
        found: in the file. named: by the caller. path, source: the key that names the file, and its value.

    Raises:
        ConfigError: with the text that names it.
    """
    for key, value in found.items():
        if key not in named or named[key] != value:
            text = override(key, value)
            raise ConfigError(path, source, f"names code to run, {text}", f"Give {text} too, if you trust it")


def override(key: str, value: Any) -> str:
    """`key=value` as the command line takes it."""
    if not isinstance(value, list):
        return f"{key}={value}"
    quoted = ("'" + str(item).replace("\\", "\\\\").replace("'", "\\'") + "'" for item in value)
    return f"{key}=[{','.join(quoted)}]"


def for_ranks(named: Named) -> str:
    """What the environment variable tells a rank."""
    return json.dumps(dict(named))


def from_launcher(text: str | None) -> Named:
    """What the launcher has told this rank."""
    return dict(json.loads(text)) if text else {}


def imported(key: str, name: str) -> Any:
    """The object `module:name` that a key of the config names.

    Raises:
        Exception: whatever its module raises, or ImportError, AttributeError, ValueError.
    """
    if key not in IMPORTED:
        raise KeyError(f"{key} is not listed in moecompile.named_code, so a file could name it")
    module, _, path = name.partition(":")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))
