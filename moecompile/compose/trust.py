"""What a config file may not do: change how Hydra itself runs.

Hydra makes the objects that its own node names (callbacks, launcher, sweeper, log handlers) and sets the environment
variables that stand there, before any of our code runs. So that node may differ from the shipped one only by what the
command line says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from moecompile.errors import UserError

# What Hydra itself fills in from the overrides and the place; nothing of it is run.
_FILLED_IN = ("runtime", "overrides", "mode", "job.override_dirname", "job.config_name")


def of_hydra(overrides: Iterable[str]) -> list[str]:
    """The overrides that are about Hydra's own node."""
    return [item for item in overrides if item.lstrip("+~").startswith(("hydra.", "hydra/", "hydra="))]


def check_hydra_node(found: Mapping[str, Any], shipped: Mapping[str, Any]) -> None:
    """Whether a composed `hydra` node is the shipped one with the command line's overrides.

    Raises:
        UserError: a recipe or another config file has changed it.
    """
    ours, theirs = dict(_leaves(shipped)), dict(_leaves(found))
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
