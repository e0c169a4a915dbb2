"""Converts what OmegaConf has composed to the typed schema, and writes and reads it as YAML."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.resolvers import oc

from moecompile.atomic import write_text
from moecompile.compose.explain import explain
from moecompile.errors import ConfigError
from moecompile.named_code import KEYS, Named, named_in, override, refuse_unnamed, without
from moecompile.schema import Config, with_implied

GIVEN_GROUPS = ("per_layer", "model", "mesh", "dispatch")
"""Words without a dot that `Config.given` keeps."""


def _started(what: str, default: int) -> int:
    """`${moecompile.started:nodes,1}`: the number of `nodes`, or of `ranks_per_node`, that torchrun started."""
    return int(os.environ.get(_TORCHRUN[what], default))


_TORCHRUN = {"nodes": "GROUP_WORLD_SIZE", "ranks_per_node": "LOCAL_WORLD_SIZE"}
OmegaConf.register_new_resolver("moecompile.add", lambda *numbers: sum(numbers), replace=True)  # ${moecompile.add:a,b}
OmegaConf.register_new_resolver("moecompile.started", _started, replace=True)


def to_config(cfg: DictConfig, overrides: Sequence[str]) -> Config:
    """The typed config. `overrides` are the caller's, and only they may name code to run.

    Raises:
        UserError: an unknown key, a value of the wrong type, a missing value, or code that a file names.
    """
    with explained(overrides), no_environment(overrides):
        config = _typed(cfg)
    if "_target_" in _keys(config.model.config):
        raise ConfigError(
            "model.config", "_target_", "a config never chooses code to run", "Remove the key, or use model.factory"
        )
    for key, value in named_in(config).items():
        if key not in _typed_keys(overrides):
            raise ConfigError(
                key, value, "a config file may not choose code to run",
                f"Give {override(key, value)} on the command line or in Python, if you trust it",
            )  # fmt: skip
    if config.given:
        raise ConfigError("given", config.given, "is filled in by the program", "Leave it out")
    keys = [match[1] for item in overrides if (match := re.match(r"\+{0,2}(\w+(?:\.\w+)*)=", item))]
    groups = [key for key in keys if "." not in key]
    config.given = [key for key in keys if "." in key or key in GIVEN_GROUPS]
    return with_implied(config, groups)


def save_resolved(config: Config, path: Path) -> None:
    """Writes `config` as YAML, atomically."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def load_resolved(
    path: Path,
    *,
    named: Named = MappingProxyType({}),
    runs: Collection[str] = KEYS,
    given_as: tuple[str, Any] | None = None,
) -> Config:
    """Reads a file that `save_resolved` wrote. Of code that it names, it keeps what the caller names too.

    Args:
        named: what the caller names. runs: the keys whose code is going to be run; others are left out of the config.
        given_as: the key that led to the file, and its value, for messages.

    Raises:
        UserError: an unknown key, a value of the wrong type, or code in `runs` that only the file names.
    """
    with explained(()), no_environment(()):
        config = _typed(OmegaConf.load(path))
    found = named_in(config)
    run = {key: value for key, value in found.items() if key.endswith(tuple(runs))}
    refuse_unnamed(run, named, *(given_as or (path.name, path)))
    kept: Config = without(config, [key for key in KEYS if key not in runs])
    return kept


@contextmanager
def explained(overrides: Sequence[str]) -> Iterator[None]:
    """Turns errors about the config into UserErrors; all others are defects and pass through."""
    try:
        yield
    except Exception as error:
        explanation = explain(error, overrides)
        if explanation is None:
            raise
        raise explanation from error


@contextmanager
def no_environment(overrides: Iterable[str]) -> Iterator[None]:
    """Allows `${oc.env:...}` only in the caller's overrides: a config file must not read the environment.

    Hydra's own node repeats these overrides; `moecompile.compose.trust` has checked it.
    """
    allowed = {item.lstrip("+").partition("=")[0] for item in overrides if "oc.env" in item}

    def environment(key: str, *default: Any, _node_: Any) -> Any:
        path = str(_node_._get_full_key(None))
        if not path.startswith("hydra.") and not any(
            path == name or path.startswith((f"{name}.", f"{name}[")) for name in allowed
        ):
            raise ConfigError(
                path, f"${{oc.env:{key}}}", "a config file may not read the environment",
                f"Write the value there, or give {path}=... on the command line",
            )  # fmt: skip
        return oc.env(key, *default)

    saved = BaseContainer._resolvers["oc.env"]
    OmegaConf.register_new_resolver("oc.env", environment, replace=True)
    try:
        yield
    finally:
        BaseContainer._resolvers["oc.env"] = saved


def unresolved(overrides: Any) -> list[str]:
    """The overrides without interpolation, because one may refer to a key that does not exist."""
    words: Any = OmegaConf.to_container(overrides, resolve=False)
    return [str(word) for word in words]


def plain(node: DictConfig) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(node, resolve=False)
    return dict(values)


def _typed_keys(overrides: Sequence[str]) -> set[str]:
    """The dotted keys whose values the caller has typed, also those within a mapping (`per_layer.first={...}`)."""
    found: set[str] = set()
    for each in OverridesParser.create().parse_overrides(list(overrides)):
        found.update(_leaves(each.key_or_group, None if each.is_delete() else each.value()))
    return found


def _leaves(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _leaves(f"{key}.{name}", each)
    else:
        yield key


def _keys(values: Any) -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield key
            yield from _keys(value)


def _typed(cfg: Any) -> Config:
    values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    assert isinstance(config, Config)
    return config
