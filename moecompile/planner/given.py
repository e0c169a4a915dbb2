"""A given plan decides: the config takes over its mesh, dispatch, experts, routers and balance. Needs no model.

Algorithm:
  1. A key that the caller set must have the plan's value; `auto` always has. One that the plan does not record is
     refused. So is a mesh, a dispatch or adapters of another kind, and code to run that the caller does not name
     (moecompile.named_code).
  2. The mesh of the config becomes the plan's, and so does when weights are gathered and gradients reduced.
  3. Where all layers are alike, so do dispatch, experts, routing and balance, so that the config says what runs. Where
     they differ, the plan alone says it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.named_code import named_in
from moecompile.plan import ExpertsSite, LayerPlan, Plan, PlannedSite, load
from moecompile.routing import LOSSES, BalanceRule
from moecompile.schema import AdapterKind, Checkpointing, Config, Gather, Reduce, TaskName

FILE = "plan.yaml"
_SHOWN = 3  # names of layers in a note
_TASKS = (TaskName.plan, TaskName.rehearse, TaskName.compile, TaskName.train)
_GROUPS = ("mesh", "dispatch", "experts", "routing", "balance", "adapters", "per_layer")
_LOSSES = "balance.losses."
_MESH = tuple(field.name for field in fields(MeshSpec))
_CHECKPOINTING = "trainer.checkpointing"
_SCHEDULE = ("trainer.reduce", "trainer.gather")
_KEYS = {
    "mesh": tuple(f"mesh.{name}" for name in _MESH if name != "device"),
    "dispatch": ("dispatch.kind",),
    "balance": ("balance.rule", *(f"{_LOSSES}{loss}" for loss in LOSSES)),
}
"""A group that the caller selected -> its keys that a plan must have."""


def plan_file(path: str, key: str = "plan") -> Path:
    """The plan.yaml that a path names: itself, or the one in a run directory.

    Raises:
        ConfigError: there is none.
    """
    found = Path(path).absolute()
    found = found / FILE if found.is_dir() else found
    if not found.is_file():
        raise ConfigError(key, path, "is neither a plan.yaml nor a run directory with one", "Give the path of one")
    return found


def given_plan(config: Config) -> Plan | None:
    """The plan that `config.plan` names, if it names one.

    Raises:
        ConfigError: it names code to run that the config does not.
        PlanError: it cannot be read.
    """
    return None if config.plan is None else load(plan_file(config.plan), named=named_in(config))


def with_plan(config: Config) -> Config:
    """The config in which the given plan decides; unchanged without one.

    Raises:
        ConfigError: the task makes its own plan, or the caller set a key to something else (the first one).
    """
    if config.compare is not None and config.task.name is not TaskName.plan:
        raise ConfigError("compare", config.compare, "is for task=plan", "Use task=plan, or leave it out")
    if config.plan is None:
        return config
    if config.task.name not in _TASKS:
        rule = f"task={config.task.name.value} makes its own plan"
        raise ConfigError("plan", config.plan, rule, "Use task=plan, rehearse, compile or train, or leave it out")
    file = plan_file(config.plan)
    plan = load(file, named=named_in(config))
    for key in config.given:  # Step 1
        for each in _KEYS.get(key, (key,)):
            _check(each, config, plan)
    _check_adapters(config, plan)
    mesh = {name: getattr(plan.mesh, name) for name in _MESH}  # Step 2
    config = scheduled(replace(config, plan=str(file), mesh=replace(config.mesh, **mesh, dp_shard="auto")), plan)
    return _like_layers(config, plan.layers)  # Step 3


def scheduled(config: Config, plan: Plan) -> Config:
    """The config with the plan's `trainer.reduce` and `trainer.gather`, and its budget if it has one.

    Raises:
        ConfigError: the plan says what is computed again, and the caller something else.
    """
    trainer = replace(config.trainer, reduce=Reduce(plan.reduce), gather=Gather(plan.gather))
    if plan.recomputed:
        now = config.trainer.checkpointing
        if _CHECKPOINTING in config.given and now not in (Checkpointing.auto, Checkpointing.budget):
            raise ConfigError(
                _CHECKPOINTING, now.value, f"the plan of {config.plan} says what each layer computes again",
                "Leave it out, or plan again without plan=...",
            )  # fmt: skip
        trainer = replace(trainer, checkpointing=Checkpointing.budget)
    return replace(config, trainer=trainer)


def left_notes(plan: Plan, sites: Sequence[PlannedSite]) -> list[str]:
    """A note of what a given plan leaves as it is, of the model's sites of its kind."""
    planned = {layer.site.fqn for layer in plan.layers}
    left = [site.fqn for site in sites if site.fqn not in planned]
    if not left:
        return []
    shown = ", ".join(left[:_SHOWN]) + ", ..." * (len(left) > _SHOWN)
    count = f"{len(planned)} of the model's {len(sites)} layers to rewrite"
    return [f"the plan has {count}; it leaves as they are: {shown}"]


def _check_adapters(config: Config, plan: Plan) -> None:
    kind = config.adapters.kind
    if (kind is AdapterKind.none) != (plan.adapters is None):
        has = "none" if plan.adapters is None else "some"
        rule = f"the plan of {config.plan} has {has}"
        raise ConfigError("adapters.kind", kind.value, rule, "Select the same, adapters=none or lora, or plan again")


def _check(key: str, config: Config, plan: Plan) -> None:
    if key.partition(".")[0] not in _GROUPS and key not in _SCHEDULE:
        return
    value = _plain(_value(config, key))
    is_loss = key.startswith(_LOSSES) and value is None
    if value == "auto" or (is_loss and config.balance.rule is BalanceRule.auto):
        return
    value = 0.0 if is_loss else value
    decided = list(_decided(key, plan))
    if not decided:
        rule = f"the plan of {config.plan} decides that"
        raise ConfigError(key, value, rule, "Leave it out, or plan again without plan=...")
    if any(each != value for each in decided):
        shown = " and ".join(map(str, dict.fromkeys(decided)))
        raise ConfigError(key, value, f"the plan of {config.plan} has {shown}", "Leave it out, or plan again")


def _decided(key: str, plan: Plan) -> Iterator[object]:
    """The values of a key in a plan; none if it does not record it."""
    group, _, name = key.partition(".")
    if key in _SCHEDULE:
        owners: list[object] = [plan]
    elif group == "mesh":
        owners = [plan.mesh]
    elif group == "adapters":
        owners = [plan.adapters] if plan.adapters is not None else []
    else:
        owners = [getattr(layer, group, None) for layer in plan.layers]
    name = key.removeprefix(_LOSSES) if key.startswith(_LOSSES) else name
    yield from (_plain(getattr(owner, name)) for owner in owners if hasattr(owner, name))


def _like_layers(config: Config, layers: tuple[LayerPlan, ...]) -> Config:
    if not layers or any(isinstance(layer.site, ExpertsSite) for layer in layers):
        parts: tuple[str, ...] = ("dispatch",)
    else:
        parts = ("dispatch", "experts", "routing", "balance")
    for part in parts:
        found = {getattr(layer, part) for layer in layers}
        if len(found) == 1:
            config = replace(config, **{part: _filled(getattr(config, part), vars(found.pop()))})
    if "routing" in parts and config.routing.groups != "auto":
        config = replace(config, routing=replace(config.routing, max_nodes=None))
    return config


def _filled(node: Any, values: Mapping[str, Any]) -> Any:
    """A node of the config with a plan's values of the same names; `balance.losses` has those of its own."""
    changed: dict[str, Any] = {}
    for field in fields(node):
        now = getattr(node, field.name)
        if is_dataclass(now):
            changed[field.name] = _filled(now, values)
        elif field.name in values and _is_kept(field.name, values):
            changed[field.name] = type(now)(values[field.name]) if isinstance(now, Enum) else values[field.name]
    return replace(node, **changed)


def _is_kept(name: str, values: Mapping[str, Any]) -> bool:
    """Whether a plan's value is one that a config may have; a plan writes others where a setting has no effect."""
    without_effect = {"chunks": 1, "slots": 0, "drop": "none", "drop_ratio": 0.0, "rate": 0.0, "backend": ""}
    return name not in without_effect or bool(values[name] != without_effect[name])


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return value


def _plain(value: Any) -> object:
    return value.value if isinstance(value, Enum) else value
