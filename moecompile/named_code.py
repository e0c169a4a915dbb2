"""Code that a config names, and who may name it: the caller alone, on the command line or in Python.

A file may not: neither a recipe or a group's file, nor `per_layer`, a plan, or the config of a run. It may repeat what
the caller names too. Every reader of files compares what it has read with what the caller names (`refuse_unnamed`), and
every import of a name is made here (`imported`, `load_plugins`), so that a key which is missing in `KEYS` has no use.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from moecompile.errors import ConfigError

FACTORY, EXPERTS, DISPATCH, PLUGINS = "model.factory", "experts.backend", "dispatch.backend", "plugins"
IMPORTED = (FACTORY, EXPERTS, DISPATCH)
"""Keys whose value is `module:name`, which is imported where it is used."""
KEYS = (*IMPORTED, PLUGINS, "launcher.setup", "launcher.directives", "launcher.python")
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
        group, _, field = key.rpartition(".")
        owner = getattr(copied, group) if group else copied
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


_plugins: dict[str, None] = {}  # those that this process has imported, in order


def load_plugins(names: Sequence[str], *, only: bool = False) -> None:
    """Imports the modules and `.py` files that `plugins` names, each once in a process, for what they register.

    Args:
        only: whether this process may have imported no others: what they have registered stays.

    Raises:
        ConfigError: one cannot be imported.
    """
    if only and (others := [name for name in _plugins if name not in names]):
        rule = f"an earlier job of this process has imported {', '.join(others)}, and what it has registered stays"
        raise ConfigError(PLUGINS, list(names), rule, "Start a command for each: plugins cannot be swept")
    for name in names:
        try:
            _plugin(name)
        except (Exception, SystemExit) as error:
            reason, line = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix("."), _line_of(error)
            fix = "Correct it" if line else "Give modules that Python finds on every rank, or paths of .py files"
            raise ConfigError(PLUGINS, name, f"cannot be imported{line}: {reason}", fix) from error
        _plugins[name] = None


def _plugin(name: str) -> None:
    if not name.endswith(".py"):
        importlib.import_module(name)
        return
    path = Path(name).resolve()
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    spec = importlib.util.find_spec(path.stem)  # of what Python has, or would find
    if spec is not None and Path(spec.origin or "").resolve() != path:
        raise ImportError(f"Python has another module of the name {path.stem}: rename the file")
    if path.stem in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise


def _line_of(error: BaseException) -> str:
    """Where a plugin's own code has failed, if it has begun."""
    ours, frames = str(Path(__file__).parent), traceback.extract_tb(error.__traceback__)
    own = [each for each in frames if "importlib" not in each.filename and not each.filename.startswith(ours)]
    return f" ({Path(own[-1].filename).name} line {own[-1].lineno})" if own else ""
