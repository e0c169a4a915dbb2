"""Settings of one layer: the groups `experts`, `routing` and `balance` with the changes of `per_layer` applied."""

from __future__ import annotations

import difflib
import types
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from moecompile.errors import ConfigError
from moecompile.schema.config import BalanceConfig, Config, ExpertsConfig, PerLayerConfig, RoutingConfig
from moecompile.schema.slices import site_slice

_PER_MODEL = {"experts": ("sites", "match", "layers")}  # they select the layers, so no layer can differ in them
_Group = TypeVar("_Group")


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """What holds for one layer. source: `per_layer.NAME` of the last change, "" if there is none."""

    experts: ExpertsConfig
    routing: RoutingConfig
    balance: BalanceConfig
    source: str = ""


def layer_settings(config: Config, fqn: str, position: int, count: int) -> LayerSettings:
    """The settings of the layer at `fqn`, number `position` of `count` rewritten ones.

    Raises:
        ConfigError: a change has an unknown key or a value of the wrong type.
    """
    settings = LayerSettings(experts=config.experts, routing=config.routing, balance=config.balance)
    for name, change in config.per_layer.items():
        path = f"per_layer.{name}"
        if not _selects(change, path, fqn, position, count):
            continue
        settings = LayerSettings(
            experts=changed(settings.experts, change.experts, f"{path}.experts", _PER_MODEL["experts"]),
            routing=changed(settings.routing, change.routing, f"{path}.routing"),
            balance=changed(settings.balance, change.balance, f"{path}.balance"),
            source=path,
        )
    return settings


def _selects(change: PerLayerConfig, path: str, fqn: str, position: int, count: int) -> bool:
    return fnmatchcase(fqn, change.match) and position in range(count)[site_slice(change.layers, f"{path}.layers")]


def changed(group: _Group, values: dict[str, Any], path: str, fixed: tuple[str, ...] = ()) -> _Group:
    """A copy of the dataclass `group` with `values`, checked against its annotations.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type.
    """
    assert is_dataclass(group)
    hints = get_type_hints(type(group))
    known = [field.name for field in fields(group) if field.name not in fixed]
    new: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            fix = f"Did you mean {close[0]}" if close else f"Use one of {', '.join(known)}"
            raise ConfigError(f"{path}.{key}", value, "is not a key that a layer can have of its own", fix)
        old = getattr(group, key)
        if is_dataclass(old) and isinstance(value, dict):
            new[key] = changed(old, value, f"{path}.{key}")
        else:
            new[key] = _typed(value, hints[key], f"{path}.{key}")
    return replace(group, **new)  # type: ignore[type-var]


def _typed(value: Any, hint: Any, path: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if isinstance(option, type) and issubclass(option, Enum):
            if value in [member.value for member in option]:
                return option(value)
        elif option is float and type(value) in (int, float):
            return float(value)
        elif type(value) is option:
            return value
    known = [f"one of {[m.value for m in o]}" if issubclass(o, Enum) else o.__name__ for o in options]
    raise ConfigError(path, value, f"must be {' or '.join(known)}", "Change the value")
