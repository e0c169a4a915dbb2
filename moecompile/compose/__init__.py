"""Composes configs with Hydra and OmegaConf into the typed schema; only this package imports them.

    command line   main(run)            Hydra composes, `run` gets a checked Config and its run directory
    Python         compose_config(...)  the same composition; the state of the caller's own Hydra is preserved
    workers        save_resolved(...), load_resolved(...)

jobs.py runs one job; hydra_state.py changes Hydra's global state meanwhile; typed.py builds the typed schema.

Every mistake in a config is raised as one `UserError`: dotted path, value, rule, what to change.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from moecompile.compose.hydra_state import (
    CONFIG_DIR_VARIABLE,
    VERSION_BASE,
    changed_flags,
    command_line_hydra,
    narrow_help,
    own_hydra,
)
from moecompile.compose.jobs import RunFolders, asks_debug, remove_unused, report, run_job
from moecompile.compose.typed import conf_dir, explained, load_resolved, save_resolved, spelled, to_config
from moecompile.rundir import OVERRIDES, RESOLVED
from moecompile.schema import Config

__all__ = [
    "CONFIG_DIR_VARIABLE",
    "OVERRIDES",
    "RESOLVED",
    "RunFolders",
    "compose_config",
    "conf_dir",
    "load_resolved",
    "main",
    "own_folders",
    "report",
    "save_resolved",
    "to_config",
]

_LOCK = threading.Lock()  # Hydra's state is global to the process


def main(
    run: Callable[[Config, Path], int],
    prepare: Callable[[Config, Path], Config] = lambda config, _: config,
    check: Callable[[Config], None] = lambda _: None,
    summarize: Callable[[Path], None] = lambda _: None,
) -> int:
    """The command line: composes `sys.argv`, calls `run(config, run_dir)` for each job and returns the exit code.

    `prepare(config, run_dir)` completes each config before it is checked and written; `check(config)` checks what it
    refers to, such as files; `summarize(directory)` is called at the end of a multirun.

    A failed job is reported as one message on stderr (with a traceback if `debug=true`, or if it is a defect and not a
    mistake in the config), and the other jobs of a multirun still run.
    """
    exit_codes: list[int] = []
    RunFolders.summarize = staticmethod(summarize)

    def job(cfg: DictConfig) -> int:
        exit_codes.append(run_job(cfg, run, prepare, check))
        return exit_codes[-1]

    decorate = hydra.main(version_base=VERSION_BASE, config_path=str(conf_dir()), config_name="config")
    try:
        arguments = sys.argv[1:]
        with command_line_hydra(arguments), changed_flags(), narrow_help():
            decorate(job)()
    except KeyboardInterrupt:
        return 130
    except SystemExit as error:  # the end of a multirun with a failure, or a signal
        if isinstance(error.code, int):
            return error.code
        raise
    except Exception as error:  # the config could not be composed: no job has started
        if RunFolders.sweep:
            remove_unused(RunFolders.sweep, keep=RunFolders.existing)
        return report(error, debug=asks_debug(sys.argv))
    return max(exit_codes, default=0)


def compose_config(overrides: Sequence[str] = (), folders: Sequence[Path] = ()) -> Config:
    """The config that the command line would compose from `overrides`, for Python callers; it is not validated.

    It works anywhere, also inside a function decorated with `@hydra.main`.

    Args:
        folders: with groups and recipes, as of `--config-dir`.

    Raises:
        UserError: an override or a config file cannot be composed.
    """
    overrides = [spelled(word) for word in overrides]
    searched = ",".join(f"'file://{folder.absolute()}'" for folder in folders)
    words = [*overrides, *([f"hydra.searchpath=[{searched}]"] if folders else [])]
    with _LOCK, own_hydra(), explained(overrides):
        cfg = hydra.compose("config", words)
    return to_config(cfg, overrides)


def own_folders() -> list[Path]:
    """The folder of the command line's `--config-dir`, if it has one."""
    if not HydraConfig.initialized():
        return []
    sources = HydraConfig.get().runtime.config_sources
    return [Path(each.path) for each in sources if each.provider == "command-line"]
