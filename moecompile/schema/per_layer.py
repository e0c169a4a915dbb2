"""Settings of one layer: the groups `experts`, `routing` and `balance` with the changes of `per_layer` applied."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from moecompile.errors import ConfigError
from moecompile.schema.config import BalanceConfig, Config, ExpertsConfig, PerLayerConfig, RoutingConfig

# -- `layers` keys: Python slices over sites, as text ---------------------------------------------------------------


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


# -- the settings of one layer --------------------------------------------------------------------------------------

_PER_MODEL = {"experts": ("sites", "match", "layers"), "routing": ("replay",)}  # they concern all layers
_Group = TypeVar("_Group")


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """The settings of one layer.

    sources: dotted key (`routing.top_k`) -> `per_layer.NAME` that set it. source: the last `per_layer.NAME` that
    selects the layer, "" if there is none.
    """

    experts: ExpertsConfig
    routing: RoutingConfig
    balance: BalanceConfig
    source: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)

    def path_of(self, key: str) -> str:
        """The path that an error about `key` names: in the change that set it, else in the layer's last change."""
        source = self.sources.get(key, self.source)
        return f"{source}.{key}" if source else key


def layer_settings(config: Config, fqn: str, position: int, count: int) -> LayerSettings:
    """The settings of the layer at `fqn`, at `position` among `count` rewritten layers.

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
            routing=changed(settings.routing, change.routing, f"{path}.routing", _PER_MODEL["routing"]),
            balance=changed(settings.balance, change.balance, f"{path}.balance"),
            source=path,
            sources={**settings.sources, **dict.fromkeys(_keys(change), path)},
        )
    return settings


def check_selections(config: Config, fqns: Sequence[str]) -> None:
    """Checks that every change selects a rewritten layer.

    Raises:
        ConfigError: a change selects none of the layers at `fqns`.
    """
    for name, change in config.per_layer.items():
        path = f"per_layer.{name}"
        if fqns and not any(_selects(change, path, fqn, i, len(fqns)) for i, fqn in enumerate(fqns)):
            known = ", ".join(fqns[:3])
            raise ConfigError(
                f"{path}.match", change.match,
                f"with layers={change.layers} selects none of the {len(fqns)} rewritten layers ({known}, ...)",
                "Change match or layers, or remove it",
            )  # fmt: skip


def _keys(change: PerLayerConfig) -> Iterator[str]:
    """Dotted keys that a change sets."""
    for group in ("experts", "routing", "balance"):
        for key, value in getattr(change, group).items():
            nested = value if isinstance(value, dict) else {}
            yield from (f"{group}.{key}.{inner}" for inner in nested)
            yield f"{group}.{key}"


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
    raise ConfigError(
        path, value, f"must be {' or '.join(_in_words(option) for option in options)}", "Change the value"
    )


def _in_words(option: Any) -> str:
    if issubclass(option, Enum):
        return f"one of {[member.value for member in option]}"
    if is_dataclass(option):
        return f"a mapping with keys of {[field.name for field in fields(option)]}"
    return {type(None): "null", str: "a word", int: "a whole number", float: "a number", bool: "true or false"}[option]
