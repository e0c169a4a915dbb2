"""The files of a run directory, as far as they are there: a run that is not over has fewer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from moecompile import plan as plans
from moecompile.errors import MoecompileError
from moecompile.libyaml import load_yaml
from moecompile.load_history import LOAD_HISTORY, LoadHistory
from moecompile.metrics_table import METRICS, read_rows
from moecompile.rundir import BASELINE, FORECAST, PROFILE, RESOLVED, RESULT

_LARGE = ("load/", "node_tokens/")  # columns of metrics.csv for each expert, which load.npz has too


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run. result: result.json, empty while it runs. rows: of metrics.csv, numbers by column, without empty cells.
    forecast: seconds of the predicted step, its parts and prices. profile: what was measured in the last steps.
    dense_rows: as rows, of the dense model that was trained beside it.
    """

    folder: Path
    task: str
    result: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    plan: plans.Plan | None = None
    rows: tuple[Mapping[str, float], ...] = ()
    history: LoadHistory | None = None
    forecast: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)
    checks: tuple[Mapping[str, Any], ...] = ()
    dense_rows: tuple[Mapping[str, float], ...] = ()

    @property
    def name(self) -> str:
        """Of the recipe or config."""
        return str(self.result.get("recipe") or self.config.get("name") or self.folder.name)

    @property
    def is_over(self) -> bool:
        """Whether the task has written its result."""
        return bool(self.result)

    @cached_property
    def layers(self) -> list[str]:
        """Names of the MoE layers, as columns of metrics.csv end with them."""
        return [] if self.history is None else self.history.layers

    def columns(self, prefix: str) -> Iterator[tuple[str, list[float], list[float]]]:
        """(rest of the name, steps, values) of every column that begins with `prefix`, in order."""
        for name in sorted({name for row in self.rows for name in row if name.startswith(prefix)}):
            found = [(row["step"], row[name]) for row in self.rows if name in row and "step" in row]
            yield name.removeprefix(prefix), [step for step, _ in found], [value for _, value in found]


def read_run(folder: Path, task: str) -> Run:
    """Reads what is there. A file that is missing or half written is as if it were empty."""
    result = _json(folder / RESULT)
    if result.get("task") != task:  # of an earlier task in this directory
        result = {}
    trained = task == "train"
    forecast = result if "step_parts" in result else _json(folder / FORECAST) if trained else {}
    return Run(
        folder=folder,
        task=task,
        result=result,
        config=read_config(folder),
        plan=_plan(folder),
        rows=metric_rows(folder) if trained else (),
        history=_history(folder / LOAD_HISTORY) if trained else None,
        forecast=forecast,
        profile=_json(folder / PROFILE) if trained else {},
        checks=tuple(result.get("checks", ())),
        dense_rows=metric_rows(folder / BASELINE) if trained else (),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved config, nested; empty: there is none."""
    try:
        found = load_yaml((folder / RESOLVED).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def flatten(value: Any, path: str = "") -> dict[str, str]:
    """Dotted key -> value as text, of every leaf; lists are leaves."""
    if isinstance(value, Mapping) and value:
        found: dict[str, str] = {}
        for key, child in value.items():
            found |= flatten(child, f"{path}.{key}" if path else str(key))
        return found
    return {path: "null" if value is None else str(value)}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _plan(folder: Path) -> plans.Plan | None:
    try:
        return plans.read(folder / "plan.yaml")
    except (OSError, MoecompileError):
        return None


def _history(path: Path) -> LoadHistory | None:
    try:
        history = LoadHistory.read(path)
    except (OSError, ValueError, KeyError):
        return None
    return history if history.steps else None


def metric_rows(folder: Path) -> tuple[Mapping[str, float], ...]:
    """The rows of a folder's metrics.csv: numbers by column, without empty cells. Empty: there is none."""
    try:
        return tuple(read_rows(folder / METRICS, without=_LARGE))
    except OSError:
        return ()
