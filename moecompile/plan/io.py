"""YAML round trip of a Plan. Only plain YAML is read; unknown or missing keys are errors."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from moecompile.atomic import write_text
from moecompile.errors import PlanError
from moecompile.libyaml import load_yaml
from moecompile.named_code import DISPATCH, EXPERTS, Named, refuse_unnamed
from moecompile.plan.checks import plan_errors
from moecompile.plan.plan import IF_EVEN, TOO_LARGE, Plan

FORMAT = 1


def to_yaml(plan: Plan) -> str:
    """The plan as YAML text, with its hash and a format number in front."""
    body = {"format": FORMAT, "hash": plan.hash, **_plain(plan)}
    return yaml.safe_dump(body, sort_keys=False, width=120)


def from_yaml(text: str, source: str = "plan.yaml", *, named: Named = MappingProxyType({})) -> Plan:
    """Reads a plan from YAML text, to compile a model by it.

    Args:
        source: where the text is from, for messages.
        named: the back ends that it may name: `{"experts.backend": "package.module:function"}`.

    Raises:
        ConfigError: it names code to run that is not in `named`.
        PlanError: not YAML, another format, unknown or missing keys, wrong types, or an inconsistent plan.
    """
    plan = _plan_of(text, source)
    _refuse_unnamed(plan, named, source)
    return plan


def _plan_of(text: str, source: str) -> Plan:
    try:
        body = load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an invalid date
        raise PlanError(source, "...", f"is not plain YAML: {error}", "Write it with moecompile, or fix it") from error
    if not isinstance(body, dict):
        raise PlanError(source, type(body).__name__, "must be a mapping", "Write it with moecompile")
    if body.pop("format", None) != FORMAT:
        raise PlanError(f"{source}: format", "...", f"must be {FORMAT}", "Plan again with this version")
    body.pop("hash", None)  # a plan may be edited by hand; its hash is computed again
    estimate = body.get("estimate")
    if isinstance(estimate, dict) and isinstance(fits := estimate.get("fits"), bool):  # of version 0.2.0
        body["estimate"] = estimate = {**estimate, "fits": IF_EVEN if fits else TOO_LARGE, "remedies": []}
    assumes = estimate.get("assumes") if isinstance(estimate, dict) else None
    if isinstance(assumes, dict) and "number_bytes" not in assumes:  # version 0.2.0 had it in words
        precision = str(assumes.get("precision"))
        stored = re.search(r"on weights of (\d+) bytes", precision)
        assumes["number_bytes"] = int(stored[1] if stored else 4) if precision.startswith("fp32") else 2
    plan = _build(Plan, body, source)
    assert isinstance(plan, Plan)
    return plan


def save(plan: Plan, path: str | Path) -> None:
    """Writes `path` atomically."""
    write_text(Path(path), to_yaml(plan))


def load(path: str | Path, *, named: Named = MappingProxyType({})) -> Plan:
    """Reads `path`, to compile a model by it.

    Args:
        named: as for `from_yaml`.

    Raises:
        ConfigError, PlanError: the file cannot be read, or as in `from_yaml`.
    """
    plan = read(path)
    _refuse_unnamed(plan, named, path)
    return plan


def read(path: str | Path) -> Plan:
    """Reads `path`, to look at it: what is compiled by it may be code that the file chose.

    Raises:
        PlanError: the file cannot be read, or is no plan.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError("plan", path, f"cannot be read: {error}", "Give the path of a plan.yaml") from error
    return _plan_of(text, Path(path).name)


def _refuse_unnamed(plan: Plan, named: Named, source: str | Path) -> None:
    for layer in plan.layers:
        found = {EXPERTS: layer.experts.backend, DISPATCH: layer.dispatch.backend}
        refuse_unnamed({key: name for key, name in found.items() if name}, named, "plan", source)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _build(kind: Any, value: Any, path: str) -> Any:
    """Converts `value` to `kind`: a dataclass, a tuple of one type, an optional, or a plain scalar."""
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, path)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise PlanError(path, value, "must be a list", "Correct the plan")
        return tuple(_build(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _build(_option(args, value), value, path)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise PlanError(path, value, f"must be of type {kind.__name__}", "Correct the plan")
    return value


def _option(options: tuple[Any, ...], value: Any) -> Any:
    """The dataclass of a union whose `kind` is that of the value, else the first option."""
    kind = value.get("kind") if isinstance(value, dict) else None
    return next((o for o in options if dataclasses.is_dataclass(o) and getattr(o, "kind", None) == kind), options[0])


def _build_dataclass(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise PlanError(path, value, "must be a mapping", "Correct the plan")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            raise PlanError(f"{path}.{key}", "...", "is not a key of the plan", f"Use one of {list(fields)}")
    missing = [n for n, f in fields.items() if n not in value and f.default is dataclasses.MISSING]
    if missing:
        raise PlanError(f"{path}.{missing[0]}", None, "is missing", "Add it, or plan again")
    built = {key: _build(hints[key], item, f"{path}.{key}") for key, item in value.items()}
    with plan_errors():
        return kind(**built)
