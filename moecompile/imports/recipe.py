"""A draft as a recipe: a folder in the layout of `conf/`, for `--config-dir FOLDER recipe=NAME`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moecompile.atomic import write_text
from moecompile.imports.settings import Draft

_WIDTH = 110


def write_recipe(draft: Draft, folder: Path, source: str) -> None:
    """Writes `recipe/NAME.yaml`, and the options that it selects: `workload`, `mesh`, `stack` and, unless it is a
    shipped one, `model`.

    Args:
        source: the file that was read, for comments.
    """
    name, chosen = draft.name, dict[str, Any](workload=draft.name, stack=draft.stack)
    options: dict[str, Mapping[str, Any]] = {
        "workload": {"name": name, **draft.workload, "source": source},
    }
    if isinstance(draft.stack, dict):
        options["stack"], chosen["stack"] = {"name": name, **draft.stack}, name
    if isinstance(draft.model, dict):
        options["model"], chosen["model"] = {"name": name, **draft.model}, name
    elif draft.model is not None:
        chosen["model"] = draft.model
    nodes, ranks = draft.mesh
    options["mesh"] = {
        "defaults": [{"override /hardware@_global_.hardware": draft.hardware}],
        "num_nodes": nodes, "ranks_per_node": ranks, "device": "cuda",
    }  # fmt: skip
    chosen["mesh"] = name
    for group, content in options.items():
        _write(folder / group / f"{name}.yaml", f"# Of {source}.", content)
    values = draft.values | {"mesh": {"ep": draft.ep, **draft.values.get("mesh", {})}}
    body: dict[str, Any] = {"defaults": _overrides(chosen), "name": name, **values}
    _write(folder / "recipe" / f"{name}.yaml", f"# @package _global_\n#\n# Imported from {source}, as it says.", body)


def write_runnable(
    draft: Draft, folder: Path, source: str, settings: Mapping[str, Any], data: Mapping[str, Any], precision: str
) -> str:
    """Writes the recipe of a layout that this package runs, beside that of the file, and returns its name.

    Args:
        settings: dotted keys of the layout -> values. data: the batch. precision: of `trainer`.
    """
    name = f"{draft.name}_runs"
    model = draft.name if isinstance(draft.model, dict) else draft.model
    chosen = {"workload": "data", "stack": "runtime", "mesh": draft.name} | ({"model": model} if model else {})
    body: dict[str, Any] = {"defaults": _overrides(chosen), "name": name}
    values = {group: dict(each) for group, each in draft.values.items()}
    values.setdefault("data", {}).update(data)
    values.setdefault("trainer", {})["precision"] = precision
    for key, value in settings.items():
        group, _, field = key.partition(".")
        values.setdefault(group, {})[field] = value
    _write(
        folder / "recipe" / f"{name}.yaml",
        f"# @package _global_\n#\n# The layout that task=search found for {source}: this package runs it.",
        body | values,
    )
    return name


def _overrides(chosen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A model selects its workload, and a mesh its hardware, so these come first."""
    order = ("model", "workload", "stack", "mesh")
    return [{f"override /{group}": chosen[group]} for group in order if group in chosen]


def _write(path: Path, comment: str, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(content), sort_keys=False, width=_WIDTH, allow_unicode=True)
    write_text(path, f"{comment}\n{text}")
