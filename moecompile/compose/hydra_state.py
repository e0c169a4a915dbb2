"""Hydra for our command line: changes its process-global state while it runs, and restores it at the end.

Flags are Hydra's, with our name and version, one message per mistake, and without three of them:

--config-path         would replace the shipped configs; `--config-dir` adds to them
--config-name         would replace their first file, which says where Hydra searches
--experimental-rerun  runs code from a pickle; a run keeps no pickle, only `resolved.yaml`

Hydra instantiates the objects in its own node (callbacks, launcher, sweeper, log handlers) and sets the environment
variables in it, before any of our code runs. So that node may differ from the shipped one only by overrides on the
command line; options that these name (`hydra/launcher=joblib`) are those of installed packages, not of the user's
folders.
"""

from __future__ import annotations

import argparse
import copy
import io
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.version import VersionBase

from moecompile.compose.jobs import RunFolders
from moecompile.compose.typed import (
    conf_dir,
    explained,
    no_environment,
    plain,
    read_by_libyaml,
    spelled,
    written_as_flag,
)
from moecompile.errors import ConfigError, UserError
from moecompile.schema import Config, check_name
from moecompile.version import __version__

CONFIG_DIR_VARIABLE = "MOECOMPILE_CONFIG_DIR"
"""Environment variable: a folder with the user's config groups and recipes, searched after the shipped ones."""

VERSION_BASE = "1.3"
_HELP_WIDTH = 110


@contextmanager
def command_line_hydra(arguments: Sequence[str]) -> Iterator[None]:
    """All changes to Hydra for the command line."""
    with _raising_hydra(), _guarded_hydra(), explained(arguments), no_environment(arguments), read_by_libyaml():
        yield


@contextmanager
def _raising_hydra() -> Iterator[None]:
    """Makes Hydra raise its errors instead of printing them."""
    saved = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if saved is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = saved


@contextmanager
def _guarded_hydra() -> Iterator[None]:
    """Checks every composition before Hydra runs anything from its own node."""
    load = ConfigLoaderImpl.load_configuration
    known: dict[tuple[str, ...], Any] = {}  # for each job of a multirun

    def shipped(path: ConfigSearchPath, words: list[str], *args: Any, **kwargs: Any) -> Any:
        key = tuple(words)
        if key not in known:
            own = ConfigLoaderImpl(without_folders(path, str(conf_dir())))
            known[key] = load(own, "config", words, *args, **kwargs).hydra
        return known[key]

    def checked(
        self: ConfigLoaderImpl, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any
    ) -> Any:
        if config_name is None:  # --hydra-help: no file is read and nothing is run
            return load(self, None, of_hydra(overrides), *args, **kwargs)
        cfg = load(self, config_name, overrides, *args, **kwargs)
        keys = [word.partition("=")[0].lstrip("+~") for word in of_hydra(overrides)]
        words = [word for key, word in zip(keys, of_hydra(overrides), strict=True) if not key.startswith(_NOT_SHIPPED)]
        node = shipped(self.config_search_path, words, *args, **kwargs)
        check_hydra_node(plain(cfg.hydra), plain(node), overrides)
        if RunFolders.sweep is None:  # the name is part of a folder that Hydra creates before our code runs
            check_name(cfg.name)
        return cfg

    get_mode = Hydra.get_mode

    def mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        """Hydra would compose everything once more; the shipped configs leave the mode to the flags."""
        path = self.config_loader.get_search_path()
        is_shipped = len(without_folders(path, str(conf_dir())).get_path()) == len(path.get_path())
        told = any(word.lstrip("+~").startswith(_NOT_SHIPPED) for word in overrides)
        return None if is_shipped and not told else get_mode(self, config_name, overrides)

    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign]
    Hydra.get_mode = mode  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = load  # type: ignore[method-assign]
        Hydra.get_mode = get_mode  # type: ignore[method-assign]


@contextmanager
def changed_flags() -> Iterator[None]:
    """Hydra's command line with the changes of `moecompile.compose.hydra_state`."""
    module: Any = sys.modules["hydra.main"]
    make = module.get_args_parser
    module.get_args_parser = lambda: own_flags(make())
    program, sys.argv[0] = sys.argv[0], PROGRAM  # the name that shells complete
    try:
        yield
    finally:
        module.get_args_parser, sys.argv[0] = make, program


@contextmanager
def narrow_help() -> Iterator[None]:
    """Wraps the lines of `--help`, because Hydra prints all options of a group in one line.

    It also caches Hydra's config repository, which is otherwise rebuilt for every group: most of the time of `--help`.
    """
    if not {"--help", "-h", "--hydra-help"} & set(sys.argv):
        yield
        return
    text, options = io.StringIO(), ConfigLoaderImpl.get_group_options

    @cache
    def repository(self: ConfigLoaderImpl) -> Any:
        return self._parse_overrides_and_create_caching_repo(None, [])[1]

    def listed(self: ConfigLoaderImpl, group_name: str, results_filter: Any = ObjectType.CONFIG) -> Any:
        return repository(self).get_group_options(group_name, results_filter)

    ConfigLoaderImpl.get_group_options = listed  # type: ignore[assignment, method-assign]
    try:
        with redirect_stdout(text):
            yield
    finally:
        ConfigLoaderImpl.get_group_options = options  # type: ignore[method-assign]
        for line in text.getvalue().splitlines():
            wrapped = textwrap.wrap(line, _HELP_WIDTH, subsequent_indent="    ") if len(line) > _HELP_WIDTH else [line]
            print("\n".join(wrapped))


@contextmanager
def own_hydra() -> Iterator[None]:
    """Our own Hydra over the shipped configs; the caller's is restored at the end."""
    kinds: tuple[type, ...] = (GlobalHydra, VersionBase, JobRuntime)
    saved = {kind: Singleton._instances.pop(kind) for kind in kinds if kind in Singleton._instances}
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base=VERSION_BASE), read_by_libyaml():
            yield
    finally:
        for kind in kinds:
            Singleton._instances.pop(kind, None)
        Singleton._instances.update(saved)


class _OwnConfigs(SearchPathPlugin):
    """Adds the folder in CONFIG_DIR_VARIABLE to the search path of our configs, but not of other Hydra programs."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        folder = os.environ.get(CONFIG_DIR_VARIABLE)
        if not folder or str(conf_dir()) not in (element.path for element in search_path.get_path()):
            return
        if not Path(folder).is_dir():
            fix = f"Create it, or unset {CONFIG_DIR_VARIABLE}"
            raise ConfigError(CONFIG_DIR_VARIABLE, folder, "there is no such folder", fix)
        search_path.append("moecompile", f"file://{Path(folder).absolute()}")


Plugins.instance().register(_OwnConfigs)


@dataclass(kw_only=True)
class _ComposedConfig(Config):
    """Entries of `per_layer` may be set key by key (`+per_layer.first.layers=0:1`); `_typed` checks the result."""

    per_layer: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(name="moecompile_schema", node=_ComposedConfig, provider="moecompile")


PROGRAM = "moecompile"

_LEFT_OUT = {
    "config_path": "--config-path: the shipped configs are always used. Add your own by --config-dir FOLDER.",
    "config_name": "--config-name: the shipped config is always the first. Give your own as a recipe: "
    "--config-dir FOLDER recipe=NAME.",
    "experimental_rerun": "--experimental-rerun: a run keeps no pickled config. Give the same overrides again, or "
    "resume a run with trainer.resume=RUN_DIR.",
}


def own_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Hydra's parser with the changes above; parsing raises `UserError`."""
    parser.prog = PROGRAM
    parser.error = _refuse  # type: ignore[method-assign]
    for action in parser._actions:
        if isinstance(action, argparse._VersionAction):
            action.version, action.help = f"{PROGRAM} {__version__}", "Show the version and exit"
        if action.dest in _LEFT_OUT:
            action.help = argparse.SUPPRESS
    parse = parser.parse_intermixed_args  # flags may come between overrides

    def checked(*args: Any, **kwargs: Any) -> argparse.Namespace:
        parsed: argparse.Namespace = parse(*args, **kwargs)
        parsed.overrides = [spelled(word) for word in parsed.overrides]
        _check_flags(parsed)
        return parsed

    parser.parse_args = checked  # type: ignore[method-assign, assignment]
    return parser


def _check_flags(flags: argparse.Namespace) -> None:
    for name, message in _LEFT_OUT.items():
        if getattr(flags, name, None) is not None:
            raise UserError(message)
    if flags.package and not flags.cfg:
        raise UserError(f"--package {flags.package}: shows one group of a config. Give it with --cfg job.")
    if flags.package:
        _check_package(flags.package)
    completes = flags.shell_completion and any(item.startswith("query=") for item in flags.overrides)
    if completes and "COMP_LINE" not in os.environ:
        raise UserError("COMP_LINE is not set: the shell asks for completions, and `-sc install=bash` tells it to.")


def _check_package(package: str) -> None:
    hint: Any = Config
    for key in package.split("."):
        if not is_dataclass(hint) or (hint is Config and key == "hydra"):
            return  # keys of a mapping, or Hydra's own
        names = get_type_hints(hint)
        if key not in names:
            raise UserError(f"--package {package}: there is no {key}. Use one of {', '.join(names)}.")
        hint = names[key]


def _refuse(message: str) -> NoReturn:
    raise written_as_flag(sys.argv[1:]) or UserError(f"{message}. --hydra-help lists the flags.")


_NOT_SHIPPED = ("hydra.searchpath", "hydra.mode")  # not compared: Hydra adds the mode itself
# Keys that Hydra itself fills in; none of them is run. A file may add to `overrides`, which are checked apart.
_FILLED_IN = ("runtime", "overrides", "mode", "searchpath", "job.override_dirname", "job.config_name")


def of_hydra(overrides: Iterable[str]) -> list[str]:
    """The overrides of Hydra's own node."""
    return [item for item in overrides if item.lstrip("+~").startswith(("hydra.", "hydra/", "hydra="))]


def without_folders(path: ConfigSearchPath, shipped: str) -> ConfigSearchPath:
    """The search path without the user's folders: a typed `hydra/launcher=x` must not be a file of theirs."""
    kept = copy.deepcopy(path)
    kept.get_path()[:] = [x for x in kept.get_path() if x.path == shipped or not str(x.path).startswith("file:")]
    return kept


def check_hydra_node(composed: Mapping[str, Any], shipped: Mapping[str, Any], overrides: Iterable[str]) -> None:
    """Checks that a composed `hydra` node is the shipped one with the command line's overrides.

    Raises:
        UserError: a recipe or another config file has changed it.
    """
    said = composed.get("overrides", {})  # what the caller is taken to have said
    if sorted([*said.get("task", ()), *said.get("hydra", ())]) != sorted(overrides):
        raise UserError("hydra.overrides: a recipe or another config file sets it. Remove it there.")
    ours, theirs = dict(_leaves(shipped)), dict(_leaves(composed))
    for path in sorted(ours.keys() | theirs.keys()):
        if path not in ours or path not in theirs or ours[path] != theirs[path]:
            raise UserError(
                f"hydra.{path}: a recipe or another config file sets it, and Hydra would run what it says. "
                "Remove it there, or give it on the command line."
            )


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        path = f"{prefix}{key}"
        if path in _FILLED_IN:
            continue
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value
