"""Compositions of tests: Hydra composes the groups that tests name once a session, and the values of each test are set in
a copy, by Hydra's own function. To compose takes a sixth of a second or more, which was a third of the time of many ranks.
Processes of a session share what is composed as files.

`use()` puts this in the place of `hydra.compose` for `compose_config`. Command lines, programs (tests/forked.py) and
tests/compose have Hydra's own. What is unusual or fails is left to Hydra's own too, so every message is its own.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from moecompile.atomic import replacing
from moecompile.compose.hydra_state import CONFIG_DIR_VARIABLE

FOLDER_VARIABLE = "MOECOMPILE_TESTS_COMPOSED"
"""Environment variable: the folder of the session; without one, each process composes for itself."""

HYDRAS_OWN = hydra.compose
_VALUE = re.compile(r"\+{0,2}\w+(\.\w+)+=")  # of a key within a group
_GROUP = re.compile(r"\w+=\w+")


@cache
def of_groups(words: tuple[str, ...]) -> bytes:
    """What Hydra composes of `mesh=cpu_1x2` and the like, pickled: to copy a config takes five times as long."""
    folder = os.environ.get(FOLDER_VARIABLE)
    path = Path(folder, hashlib.sha256(repr(words).encode()).hexdigest()) if folder else None
    if path and path.is_file():
        return path.read_bytes()
    made = pickle.dumps(HYDRAS_OWN("config", list(words)))
    if path:
        with replacing(path) as partial:
            partial.write_bytes(made)
    return made


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """What `hydra.compose` returns, for the shipped configs."""
    values = [word for word in overrides if _VALUE.match(word)]
    groups = [word for word in overrides if word not in values]
    usual = all(map(_GROUP.fullmatch, groups)) and not any("hydra" in word for word in overrides)
    if not usual or os.environ.get(CONFIG_DIR_VARIABLE):
        return HYDRAS_OWN(config_name, overrides)
    try:
        parsed = OverridesParser.create().parse_overrides(values)
        if any(each.is_sweep_override() for each in parsed):
            return HYDRAS_OWN(config_name, overrides)
        made: DictConfig = pickle.loads(of_groups(tuple(groups)))
        ConfigLoaderImpl._apply_overrides_to_config(parsed, made)
    except Exception:
        return HYDRAS_OWN(config_name, overrides)
    return made


def use() -> None:
    """Composes like this from now on, in this process and those that are forked from it."""
    place: Any = hydra
    place.compose = compose


def use_hydras_own() -> None:
    """Ends `use`."""
    hydra.compose = HYDRAS_OWN
