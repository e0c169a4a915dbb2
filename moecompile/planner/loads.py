"""The rows of every expert of a run, from its `load.npz` or the columns `load/LAYER/EXPERT` of its `metrics.csv`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from moecompile.errors import ConfigError
from moecompile.load_history import LOAD_HISTORY, NO_EXPERT, LoadHistory
from moecompile.metrics_table import METRICS, read_rows
from moecompile.plan import Plan

_PREFIX = "load/"
_Steps = list[NDArray[np.float64]]  # one array per logged step


def loads_of(path: Path, plan: Plan, last: int | None = None) -> list[list[float]]:
    """Rows of each routed expert of each planned layer, as means over the logged steps.

    Args:
        path: a run directory, or one of the two files. last: only this many last steps; None: all.

    Raises:
        ConfigError: there are no loads, or they are of another model.
    """
    sizes = {layer.site.fqn: (layer.experts.num_routed, layer.experts.num_identity) for layer in plan.layers}
    return list(site_loads(path, sizes, last).values())


def site_loads(
    path: Path, sizes: Mapping[str, tuple[int, int]], last: int | None = None, key: str = "place.run"
) -> dict[str, list[float]]:
    """Site -> rows of each of its routed experts, as means over the logged steps.

    Args:
        path, last: as for `loads_of`. sizes: site -> its experts with and without weights. key: for errors.

    Raises:
        ConfigError: there are no loads, or they are of another model.
    """
    by_name = read_loads(path, key)
    if len(by_name) != len(sizes):
        rule = f"is of another model: it has loads of {len(by_name)} MoE layers, the plan has {len(sizes)}"
        raise ConfigError(key, path, rule, "Give a run of this model")
    found = {}
    for (fqn, (routed, identity)), steps in zip(sizes.items(), _in_order(by_name, list(sizes)), strict=True):
        mean = np.mean(steps[-last:] if last else steps, axis=0)
        if len(mean) != routed + identity:
            rule = f"is of another model: {fqn} has {len(mean)} experts in it, {routed} here"
            raise ConfigError(key, path, rule, "Give a run of this model")
        found[fqn] = [round(float(rows), 3) for rows in mean[:routed]]
    return found


def read_loads(path: Path, key: str) -> dict[str, _Steps]:
    """Layer -> the rows of its experts at each logged step.

    Raises:
        ConfigError: there are none, or they cannot be read; about `key`.
    """
    history = path / LOAD_HISTORY if path.is_dir() else path
    if path.is_dir() and not history.is_file():
        history = path / METRICS
    if not history.is_file():
        rule = f"is neither a run directory with {LOAD_HISTORY} or {METRICS}, nor one of these files"
        raise ConfigError(key, path, rule, "Give a run that has trained")
    try:
        by_name = _metrics(history) if history.suffix == ".csv" else _history(history)
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:  # a file may be cut off anywhere
        raise ConfigError(key, history, f"cannot be read: {error}", "Give that of a run") from error
    if not by_name:
        raise ConfigError(key, history, "has no loads of experts", "Give a run whose logged steps have them")
    return by_name


def _history(path: Path) -> dict[str, _Steps]:
    history = LoadHistory.read(path)
    return {
        name: [loads[i][loads[i] != NO_EXPERT].astype(np.float64) for loads in history.loads]
        for i, name in enumerate(history.layers)
    }


def _metrics(path: Path) -> dict[str, _Steps]:
    rows = read_rows(path)
    columns: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        if name.startswith(_PREFIX):
            columns.setdefault(name.removeprefix(_PREFIX).rpartition("/")[0], []).append(name)
    return {
        layer: [np.array([row[name] for name in sorted(names, key=_expert)]) for row in rows if names[0] in row]
        for layer, names in columns.items()
    }


def _expert(column: str) -> int:
    return int(column.rpartition("/")[2])


def _in_order(by_name: dict[str, _Steps], sites: Sequence[str]) -> list[_Steps]:
    """The loads of each site: of the meter inside it, or if names do not tell, in model order."""
    inside = [[name for name in by_name if f".{site}." in f".{name}."] for site in sites]
    if all(len(names) == 1 for names in inside):
        return [by_name[names[0]] for names in inside]
    return list(by_name.values())
