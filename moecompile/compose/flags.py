"""The flags of the command line: Hydra's, with our name and version, one message per mistake, and without two flags.

--config-path         would replace the shipped configs; `--config-dir` adds to them
--config-name         would replace their first file, which says where Hydra searches
--experimental-rerun  runs code from a pickle; a run keeps no pickle, only `resolved.yaml`
"""

from __future__ import annotations

import argparse
import os
from dataclasses import is_dataclass
from typing import Any, NoReturn, get_type_hints

from moecompile.errors import UserError
from moecompile.schema import Config
from moecompile.version import __version__

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
        _check(parsed)
        return parsed

    parser.parse_args = checked  # type: ignore[method-assign, assignment]
    return parser


def _check(flags: argparse.Namespace) -> None:
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
    raise UserError(f"{message}. --hydra-help lists the flags.")
