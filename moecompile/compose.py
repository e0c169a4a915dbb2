"""Hydra and OmegaConf in, typed schema out: the only file that imports them.

    command line   main(run)            Hydra composes, `run` gets a checked Config and its run directory
    Python         compose_config(...)  the same composition; the caller's own Hydra is left as it was
    workers        save_resolved(...), load_resolved(...)

Whatever is wrong with a config leaves this file as one `UserError`: dotted path, value, rule, what to change.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import re
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime
from hydra.experimental.callback import Callback
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.basecontainer import BaseContainer
from omegaconf.resolvers import oc

from moecompile import waiting
from moecompile.errors import ConfigError, MoecompileError, UserError
from moecompile.explain import explain
from moecompile.flags import PROGRAM, own_flags
from moecompile.rundir import go_on, held, kept_apart, place
from moecompile.schema import Config, check_name, validate, with_implied
from moecompile.trust import check_hydra_node, of_hydra

CONFIG_DIR_VARIABLE = "MOECOMPILE_CONFIG_DIR"
"""Environment variable: a folder of one's own config groups and recipes, searched after the shipped ones."""

RESOLVED = "resolved.yaml"
FAILURES = "failures.txt"
OVERRIDES = "overrides.txt"
_VERSION_BASE = "1.3"
_HELP_WIDTH = 110
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)
_LOCK = threading.Lock()  # Hydra's state is global to the process

OmegaConf.register_new_resolver("moecompile.add", lambda *numbers: sum(numbers), replace=True)  # ${moecompile.add:a,b}


# -- the ways in ---------------------------------------------------------------------------------------------------


def main(
    run: Callable[[Config, Path], int],
    prepare: Callable[[Config, Path], Config] = lambda config, _: config,
    check: Callable[[Config], None] = lambda _: None,
) -> int:
    """The command line: composes `sys.argv`, calls `run(config, run_dir)` for each job and returns the exit code.

    `prepare(config, run_dir)` completes each config before it is checked and written; `check(config)` looks at what it
    names, such as files.

    A job that fails is reported in one message on stderr (with a traceback if `debug=true`, or if it is a defect and
    not a mistake) and does not stop the other jobs of a multirun.
    """
    exit_codes: list[int] = []

    def job(cfg: DictConfig) -> int:
        exit_codes.append(_run_job(cfg, run, prepare, check))
        return exit_codes[-1]

    decorate = hydra.main(version_base=_VERSION_BASE, config_path=str(conf_dir()), config_name="config")
    try:
        arguments = sys.argv[1:]
        with _hydra(arguments), _own_flags(), _narrow_help():
            decorate(job)()
    except KeyboardInterrupt:
        return 130
    except SystemExit as error:  # the end of a multirun with a failure, or a signal
        if isinstance(error.code, int):
            return error.code
        raise
    except Exception as error:  # the config could not be composed: no job has started
        if RunFolders.sweep:
            _remove_unused(RunFolders.sweep, keep=RunFolders.existing)
        return _report(error, debug=_asks_debug(sys.argv))
    return max(exit_codes, default=0)


def compose_config(overrides: Sequence[str] = ()) -> Config:
    """The config that the command line would compose from `overrides`, for Python callers; it is not validated.

    Works anywhere, also inside a function decorated with `@hydra.main`.

    Raises:
        UserError: an override or a config file that cannot be composed.
    """
    overrides = list(overrides)
    with _LOCK, _own_hydra(), _explained(overrides):
        cfg = hydra.compose("config", overrides)
    return to_config(cfg, overrides)


def to_config(cfg: DictConfig, overrides: Sequence[str]) -> Config:
    """The typed config. `overrides` are those of the caller, the only place where `model.factory` may be set.

    Raises:
        UserError: an unknown key, a value of the wrong type, or a missing value.
    """
    with _explained(overrides), _no_environment(overrides):
        config = _typed(cfg)
    if "_target_" in _keys(config.model.config):
        raise ConfigError(
            "model.config", "_target_", "a config never chooses code to run", "Remove the key, or use model.factory"
        )
    if config.model.factory and not any(re.match(r"\+{0,2}model\.factory=", item) for item in overrides):
        raise ConfigError(
            "model.factory", config.model.factory, "a config file may not choose code to run",
            "Give model.factory=... on the command line or in Python",
        )  # fmt: skip
    if config.given:
        raise ConfigError("given", config.given, "is filled in by the program", "Leave it out")
    keys = [found[1] for item in overrides if (found := re.match(r"\+{0,2}(\w+(?:\.\w+)*)=", item))]
    groups = [key for key in keys if "." not in key]
    config.given = [key for key in keys if "." in key or key in ("per_layer", "model")]
    return with_implied(config, groups)


def save_resolved(config: Config, path: Path) -> None:
    """Writes `config` as YAML, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def load_resolved(path: Path) -> Config:
    """Reads what `save_resolved` wrote.

    Raises:
        UserError: an unknown key or a value of the wrong type.
    """
    with _explained(()), _no_environment(()):
        return _typed(OmegaConf.load(path))


def conf_dir() -> Path:
    """The shipped config groups: `moecompile/conf` in an installed package, `conf` beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


# -- one job, and the end of a multirun ----------------------------------------------------------------------------


def _run_job(
    cfg: DictConfig,
    run: Callable[[Config, Path], int],
    prepare: Callable[[Config, Path], Config],
    check: Callable[[Config], None],
) -> int:
    """Runs one job in its run directory; raises nothing but a request to end, so that a multirun goes on."""
    job = HydraConfig.get()
    run_dir, multirun = Path(job.runtime.output_dir), job.mode == RunMode.MULTIRUN
    overrides = _unresolved(job.overrides.task)
    if multirun:
        print(f"job {job.job.num}: {' '.join(overrides)}", flush=True)
    debug, message = _asks_debug(overrides), ""
    try:
        with held(run_dir), _used(run_dir, multirun=multirun), kept_apart(run_dir):
            code = _in_directory(cfg, overrides, run_dir, multirun, run, prepare, check)
    except Exception as error:
        debug = debug or _plain(cfg).get("debug") is True
        code, message = _report(error, debug=debug), " ".join(str(error).split())
        if isinstance(getattr(error, "number", None), int):  # asked to end
            if _task_of(cfg) == "train":
                print(go_on(overrides, run_dir), file=sys.stderr, flush=True)
            if multirun:
                raise SystemExit(code) from None
    if code and multirun:
        with Path(job.sweep.dir, FAILURES).open("a", encoding="utf-8") as file:
            file.write(f"{job.job.num}\t{code}\t{message}\n")
    return code


def _task_of(cfg: DictConfig) -> str:
    name = _plain(cfg)["task"]["name"]
    return str(getattr(name, "value", name))


def _in_directory(
    cfg: DictConfig, overrides: list[str], run_dir: Path, multirun: bool,
    run: Callable[[Config, Path], int], prepare: Callable[[Config, Path], Config], check: Callable[[Config], None],
) -> int:  # fmt: skip
    """Writes the config, checks it and runs it."""
    if multirun:
        (place(run_dir) / OVERRIDES).write_text("\n".join(overrides), encoding="utf-8")  # what the table names
    config = prepare(to_config(cfg, overrides), run_dir)
    save_resolved(config, place(run_dir) / RESOLVED)
    validate(config)
    check(config)
    return run(config, run_dir)


def _report(error: Exception, *, debug: bool) -> int:
    """Prints one message, with the traceback if asked for or if the error is a defect; returns the exit code."""
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        error = UserError(
            f"{error.filename or 'the run directory'}: {error.strerror}. A run directory must be one that can be "
            "written, give another one: hydra.run.dir=FOLDER."
        )
    known = isinstance(error, MoecompileError)
    waiting.done()
    if isinstance(error, MoecompileError) and error.told:
        return error.exit_code
    if debug or not known:
        traceback.print_exception(error)
    if known:
        word = "" if hasattr(error, "number") else "error: "
        print(f"{word}{error}", file=sys.stderr, flush=True)
    return error.exit_code if isinstance(error, MoecompileError) else 1


def _asks_debug(overrides: Iterable[str]) -> bool:
    return any(re.fullmatch(r"\+{0,2}debug=(true|yes|on|1)", item, re.IGNORECASE) for item in overrides)


@contextmanager
def _used(run_dir: Path, *, multirun: bool) -> Iterator[None]:
    """Removes a new directory in which nothing came to be; a crash keeps its config, a multirun its table's rows."""
    is_new = place(run_dir) == run_dir and not multirun
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError | OSError) and is_new:
            _remove_unused(run_dir, keep=RunFolders.existing)
        raise
    if is_new:
        _remove_unused(run_dir, keep=RunFolders.existing)


def _remove_unused(folder: Path, *, keep: Path) -> None:
    """Removes a run directory in which nothing was written but its config, and its empty parents below `keep`.

    So it is after a mistake in the config, and on all ranks but the first where a job starter has made the ranks.
    """
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - {RESOLVED, "multirun.yaml"}:
        return
    for path in folder.iterdir():
        path.unlink()
    with suppress(OSError):  # not empty
        while folder != keep:
            folder.rmdir()
            folder = folder.parent


class RunFolders(Callback):
    """Hydra's callback around a run: knows the directories, ends a multirun with a table and the exit code."""

    existing: ClassVar[Path]  # the part of the directory that was there before the run
    sweep: ClassVar[Path | None] = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remembers what exists before Hydra makes the run directory."""
        RunFolders.existing = _existing(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Pins the sweep directory: jobs that sweep `recipe` or `name` would each compute another one."""
        RunFolders.existing = _existing(config.hydra.sweep.dir)
        _check_sweep(Path(config.hydra.sweep.dir), list(config.hydra.overrides.task))
        RunFolders.sweep = Path(config.hydra.sweep.dir).absolute()
        quoted = str(RunFolders.sweep).replace("\\", "\\\\").replace("'", "\\'")
        with read_write(config.hydra):
            config.hydra.sweep.dir = str(RunFolders.sweep)
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the table; exits if a job failed (read from a file, as jobs may run in other processes)."""
        sweep = Path(config.hydra.sweep.dir)
        failures = sweep / FAILURES
        codes = [int(line.split("\t")[1]) for line in failures.read_text().splitlines()] if failures.exists() else []
        try:
            importlib.import_module("moecompile.report.sweep").summarize(sweep)
        except Exception as error:  # Hydra would turn it into a warning
            codes.append(_report(error, debug=False))
        if codes:
            sys.exit(max(codes))


def _check_sweep(folder: Path, overrides: Sequence[str]) -> None:
    """Ends the process if the directory holds a sweep, unless its jobs go on. Hydra would only warn of an error."""
    if not (folder / "multirun.yaml").exists():
        return
    if not any(re.match(r"\+{0,2}trainer\.resume=", word) for word in overrides):
        refused = ConfigError(
            "hydra.sweep.dir", folder, "holds another sweep",
            "Use another directory, or go on with its jobs by trainer.resume=auto",
        )  # fmt: skip
        sys.exit(_report(refused, debug=False))
    (folder / FAILURES).unlink(missing_ok=True)


def _existing(folder: str) -> Path:
    path = Path(folder).absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


# -- Hydra's global state ------------------------------------------------------------------------------------------


@contextmanager
def _hydra(arguments: Sequence[str]) -> Iterator[None]:
    """Hydra as the command line runs it."""
    with _raising_hydra(), _guarded_hydra(), _explained(arguments), _no_environment(arguments):
        yield


@contextmanager
def _raising_hydra() -> Iterator[None]:
    """Hydra raises its errors instead of printing them."""
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
    """Every composition is checked before Hydra runs what its own node says."""
    load = ConfigLoaderImpl.load_configuration

    def checked(self: ConfigLoaderImpl, config_name: str | None, overrides: list[str], *rest: Any, **more: Any) -> Any:
        if config_name is None:  # --hydra-help: no file of ours or of the user's is read, and nothing is run
            return load(self, None, of_hydra(overrides), *rest, **more)
        cfg = load(self, config_name, overrides, *rest, **more)
        shipped = load(self, "config", of_hydra(overrides), *rest, **more)
        check_hydra_node(_plain(cfg.hydra), _plain(shipped.hydra))
        if RunFolders.sweep is None:  # it is part of a folder that Hydra makes before our code runs
            check_name(cfg.name)
        return cfg

    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = load  # type: ignore[method-assign]


def _unresolved(overrides: Any) -> list[str]:
    """Overrides as they were given: one may refer to a key that is not there."""
    words: Any = OmegaConf.to_container(overrides, resolve=False)
    return [str(word) for word in words]


def _plain(node: DictConfig) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(node, resolve=False)
    return dict(values)


@contextmanager
def _no_environment(overrides: Iterable[str]) -> Iterator[None]:
    """`${oc.env:...}` works in what the caller gives, and nowhere else: a file of others must not read it.

    Hydra's own node has been checked by `moecompile.trust`, and repeats what the caller gives.
    """
    given = {item.lstrip("+").partition("=")[0] for item in overrides if "oc.env" in item}

    def environment(key: str, *default: Any, _node_: Any) -> Any:
        path = str(_node_._get_full_key(None))
        if not path.startswith("hydra.") and not any(
            path == name or path.startswith((f"{name}.", f"{name}[")) for name in given
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


@contextmanager
def _own_flags() -> Iterator[None]:
    """Hydra's command line, as `moecompile.flags` changes it."""
    module: Any = sys.modules["hydra.main"]
    make = module.get_args_parser
    module.get_args_parser = lambda: own_flags(make())
    program, sys.argv[0] = sys.argv[0], PROGRAM  # what a shell completes
    try:
        yield
    finally:
        module.get_args_parser, sys.argv[0] = make, program


@contextmanager
def _narrow_help() -> Iterator[None]:
    """Breaks the lines of `--help`: Hydra writes all options of a group in one.

    It also looks for them in a new copy of all its configs each time, which is most of what `--help` would take.
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
            broken = textwrap.wrap(line, _HELP_WIDTH, subsequent_indent="    ") if len(line) > _HELP_WIDTH else [line]
            print("\n".join(broken))


@contextmanager
def _own_hydra() -> Iterator[None]:
    """A Hydra of our own over the shipped configs; the caller's is put back afterwards."""
    kinds: tuple[type, ...] = (GlobalHydra, VersionBase, JobRuntime)
    saved = {kind: Singleton._instances.pop(kind) for kind in kinds if kind in Singleton._instances}
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base=_VERSION_BASE):
            yield
    finally:
        for kind in kinds:
            Singleton._instances.pop(kind, None)
        Singleton._instances.update(saved)


class _OwnConfigs(SearchPathPlugin):
    """Adds the folder that CONFIG_DIR_VARIABLE names to the search path of our configs, not of other Hydra programs."""

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
    """Entries of `per_layer` may come key by key (`+per_layer.first.layers=0:1`); `_typed` checks what has come."""

    per_layer: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(name="moecompile_schema", node=_ComposedConfig, provider="moecompile")


@contextmanager
def _explained(overrides: Sequence[str]) -> Iterator[None]:
    """Errors about the config become UserErrors; all others are defects and pass."""
    try:
        yield
    except Exception as error:
        explanation = explain(error, overrides)
        if explanation is None:
            raise
        raise explanation from error


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
