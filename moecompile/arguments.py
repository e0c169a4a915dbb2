"""Checks the arguments of the Python API; an error names the argument and says what to pass instead."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh

from moecompile.errors import ArgumentError
from moecompile.plan import Plan
from moecompile.schema import Config

_LOAD_MODEL = "Load it first, for example by transformers.AutoModelForCausalLM.from_pretrained"
_LOAD_PLAN = "Read it first: moecompile.plan.load(path)"


def check_model(value: Any, name: str = "model") -> None:
    """Checks that `value` is a module.

    Raises:
        ArgumentError: it is not.
    """
    if isinstance(value, nn.Module):
        return
    rule = "must be a torch.nn.Module"
    if isinstance(value, str | os.PathLike):
        raise ArgumentError(name, os.fspath(value), f"{rule}, not a path", _LOAD_MODEL)
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise ArgumentError(name, value.__name__, f"{rule}, not a class", f"Create one: {value.__name__}(...)")
    raise ArgumentError(name, _kind(value), rule, "Give the model itself")


def check_graph(value: Any) -> None:
    """Checks that `value` is a GraphModule.

    Raises:
        ArgumentError: it is not.
    """
    check_model(value, "graph_module")
    if not isinstance(value, fx.GraphModule):
        raise ArgumentError(
            "graph_module", _kind(value), "must be a torch.fx.GraphModule, not a module without a graph",
            "Use moecompile.compile_model(model, ..., example=...), or give torch.fx.symbolic_trace(model)",
        )  # fmt: skip


def check_plan(value: Any, name: str = "plan") -> None:
    """Checks that `value` is a plan.

    Raises:
        ArgumentError: it is not.
    """
    if isinstance(value, Plan):
        return
    if isinstance(value, str | os.PathLike):
        raise ArgumentError(name, os.fspath(value), "must be a moecompile.Plan, not a path", _LOAD_PLAN)
    fix = "Make one with moecompile.make_plan" + ("; overrides=... takes the list" if _is_list(value) else "")
    raise ArgumentError(name, _kind(value), "must be a moecompile.Plan", fix)


def check_device_mesh(value: Any) -> None:
    """Checks that `value` is a device mesh.

    Raises:
        ArgumentError: it is not.
    """
    if not isinstance(value, DeviceMesh):
        fix = "Make it by moecompile.device_mesh_of(plan.mesh, device_type)"
        raise ArgumentError("device_mesh", _kind(value), "must be a torch DeviceMesh", fix)


def check_example(value: Any) -> None:
    """Checks that `value` has inputs for one forward.

    Raises:
        ArgumentError: it is not.
    """
    if isinstance(value, Tensor | tuple | Mapping):
        return
    fix = "Give keyword tensors ({'input_ids': ...}), a tuple of arguments, or one tensor"
    raise ArgumentError("example", _kind(value), "must be the inputs of one forward", fix)


def check_overrides(value: Any, name: str = "overrides") -> None:
    """Checks that `value` is a config or a list of override strings.

    Raises:
        ArgumentError: it is not.
    """
    if isinstance(value, Config):
        return
    rule = "must be a list of strings, as on the command line"
    if isinstance(value, str):
        fix = (
            f'Write ["{value}"]'
            if "=" in value
            else _LOAD_PLAN
            if value.endswith((".yaml", ".yml"))
            else "Write a list"
        )
        raise ArgumentError(name, value, f"{rule}, not one string", fix)
    if isinstance(value, Plan):
        raise ArgumentError(name, "Plan", f"{rule}, not a plan", "Give it as plan=...")
    if isinstance(value, os.PathLike):
        raise ArgumentError(name, os.fspath(value), f"{rule}, not a path", _LOAD_PLAN)
    if isinstance(value, Mapping):
        example = next((f"{key}={item}" for key, item in value.items()), "experts.num_routed=8")
        raise ArgumentError(name, _kind(value), f"{rule}, not a mapping", f'Write ["{example}"]')
    if not _is_list(value):
        raise ArgumentError(name, _kind(value), rule, 'Write ["experts.num_routed=8"]')
    for i, item in enumerate(value):
        if not isinstance(item, str):
            raise ArgumentError(f"{name}[{i}]", item, "must be a string", 'Write "key=value"')


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _kind(value: Any) -> str:
    return type(value).__name__
