"""Refuses config files that change how Hydra itself runs.

Hydra instantiates the objects in its own node (callbacks, launcher, sweeper, log handlers) and sets the environment
variables in it, before any of our code runs. So that node may differ from the shipped one only by overrides on the
command line; options that these name (`hydra/launcher=joblib`) are those of installed packages, not of the user's
folders.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath

from moecompile.errors import UserError

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
