"""Whether a checkpoint fits a plan and a model, and if not, all differences.

Of the plan everything is compared, except what `MAY_DIFFER` lists: the mesh, the placement, the dispatch and settings
that only training uses (balance, capacity, jitter). Names and shapes of weights are always compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moecompile.errors import PlanError
from moecompile.plan import LayerPlan, Plan

_SHOWN, _WIDTH = 8, 80
MODEL_CLASS = "model.class"
MAY_DIFFER = (
    "adapters.dropout", "context_parallel", "estimate*", "layers.balance.*", "layers.cut_over", "layers.dispatch.*",
    "layers.fused", "layers.placement.*", "layers.routing.capacity_factor", "layers.routing.drop",
    "layers.routing.hot_experts", "layers.routing.jitter", "layers.routing.skew", "layers.routing.workload", "mesh.*",
    "gather", "lookups", "pipeline*", "recomputed", "reduce", "reductions", "tensor_parallel",
)  # fmt: skip
"""Keys of a plan that change neither the weights nor the function."""


def check_plan(saved: Plan, plan: Plan, folder: Path, allowed: Sequence[str] = ()) -> None:
    """Checks that the plan `saved` in a checkpoint describes the same model as `plan`.

    Raises:
        PlanError: lists the entries that differ and are not in `allowed`.
    """
    check_order(saved, plan, folder)
    refuse(plan_differences(saved, plan), allowed, folder)


def check_order(saved: Plan, plan: Plan, folder: Path) -> None:
    """Checks that slices of a dense FFN are in the order in which the checkpoint has them.

    Raises:
        PlanError: they are not, so that experts of a group would be slices that no token has together.
    """
    before = {layer.site.fqn: layer for layer in saved.layers}
    for layer in plan.layers:
        theirs, name = before.get(layer.site.fqn, layer).routing.even_groups, layer.site.fqn
        if layer.experts.virtual_group > 1 and theirs != layer.routing.even_groups:
            order = "slice by slice" if theirs else "copy by copy"
            rule = f"the experts of {name} in the checkpoint {folder} are the slices of its FFN in order, {order}"
            fix = f"Use {str(theirs).lower()}, or start a new run"
            raise PlanError("routing.even_groups", str(not theirs).lower(), rule, fix)


def refuse(differences: Iterable[tuple[str, Any, Any]], allowed: Sequence[str], folder: Path) -> None:
    """Raises unless the names of all (name, saved value, value now) match the patterns in `allowed`.

    Raises:
        PlanError: lists the others.
    """
    refused = [entry for entry in differences if not any(fnmatchcase(entry[0], pattern) for pattern in allowed)]
    names = list(dict.fromkeys(entry[0] for entry in refused))
    listed = [f"{name}: {_short(saved)} in the checkpoint, {_short(now)} here" for name, saved, now in refused]
    if MODEL_CLASS in names and len(names) > _SHOWN:  # a class alone may have got another name
        fix = "Give the options of that run again (its overrides.txt), or start a new run"
    else:
        allow = ",".join(names) if len(names) <= _SHOWN else "'*'"
        fix = f"Set these as they were, start a new run, or go on all the same with trainer.allow_changes=[{allow}]"
    _raise_if_any(listed, folder, fix)


def check_entries(
    saved: Mapping[str, tuple[int, ...]], model: Mapping[str, tuple[int, ...]], folder: Path, *,
    key: str = "trainer.resume",
) -> None:  # fmt: skip
    """Checks that a checkpoint has exactly the entries (name -> shape) of a model.

    Raises:
        PlanError: lists names that are missing or unknown, and shapes that differ.
    """
    differences = []
    for name in sorted(model.keys() | saved.keys()):
        ours, theirs = model.get(name), saved.get(name)
        if ours != theirs:
            differences.append(f"{name}: {_shape(theirs)} in the checkpoint, {_shape(ours)} here")
    _raise_if_any(differences, folder, "Set these as they were, or start a new run", key)


def plan_differences(saved: Plan, plan: Plan) -> Iterator[tuple[str, Any, Any]]:
    """(name, saved value, value now) of each difference that affects the model's weights or outputs."""
    yield from _changes("", _function("", saved), _function("", plan))
    theirs, ours = ({layer.site.fqn: layer for layer in each.layers} for each in (saved, plan))
    for fqn in [*theirs, *(fqn for fqn in ours if fqn not in theirs)]:
        if fqn not in ours or fqn not in theirs:
            yield fqn, "experts" if fqn in theirs else "dense", "experts" if fqn in ours else "dense"
            continue
        yield from _changes(f"{fqn}.", _function("layers", theirs[fqn]), _function("layers", ours[fqn]))


def _changes(where: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in [*before, *(key for key in now if key not in before)]:
        if before.get(key) != now.get(key):
            yield f"{where}{key}", before.get(key), now.get(key)


def _function(where: str, noun: Plan | LayerPlan) -> dict[str, Any]:
    """The settings of a plan without its layers, or of a layer, that affect weights and outputs, by dotted name."""
    found = {}
    for path, value in _leaves(where, noun):
        if path != "layers" and not any(fnmatchcase(path, free) for free in MAY_DIFFER):
            found[path.removeprefix("layers.")] = value
    return found


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not dataclasses.is_dataclass(value):
        yield path, value
        return
    for entry in dataclasses.fields(value):
        yield from _leaves(f"{path}.{entry.name}" if path else entry.name, getattr(value, entry.name))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 4]} ..."


def _raise_if_any(differences: list[str], folder: Path, fix: str, key: str = "trainer.resume") -> None:
    if not differences:
        return
    more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    raise PlanError(key, folder, f"the checkpoint does not fit this run: {'; '.join(differences[:_SHOWN])}{more}", fix)
