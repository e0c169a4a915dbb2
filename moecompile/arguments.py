"""What the functions of the Python API take: anything else is one error that names the argument and says what to do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from moecompile.errors import ArgumentError
from moecompile.plan import Plan
from moecompile.schema import Config

_LOAD_MODEL = "Load it first, for example by transformers.AutoModelForCausalLM.from_pretrained"
_LOAD_PLAN = "Read it first: moecompile.plan.load(path)"


def check_model(value: Any, name: str = "model") -> None:
    """Whether `value` is a module.

    Raises:
        ArgumentError: it is not.
    """
    if isinstance(value, nn.Module):
        return
    wanted = "a torch.nn.Module is taken"
    if isinstance(value, str | os.PathLike):
        raise ArgumentError(name, os.fspath(value), f"is a path, and {wanted}", _LOAD_MODEL)
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise ArgumentError(name, value.__name__, f"is a class, and {wanted}", f"Make one: {value.__name__}(...)")
    raise ArgumentError(name, _kind(value), f"is the wrong type, and {wanted}", "Give the model itself")


def check_graph(value: Any) -> None:
    """Whether `value` is a GraphModule.

    Raises:
        ArgumentError: it is not.
    """
    check_model(value, "graph_module")
    if not isinstance(value, fx.GraphModule):
        raise ArgumentError(
            "graph_module", _kind(value), "is a module without a graph, and a torch.fx.GraphModule is taken",
            "Use moecompile.compile_model(model, ..., example=...), or give torch.fx.symbolic_trace(model)",
        )  # fmt: skip


def check_plan(value: Any, name: str = "plan") -> None:
    """Whether `value` is a plan.

    Raises:
        ArgumentError: it is not.
    """
    if isinstance(value, Plan):
        return
    if isinstance(value, str | os.PathLike):
        raise ArgumentError(name, os.fspath(value), "is a path, and a moecompile.Plan is taken", _LOAD_PLAN)
    fix = "Make one with moecompile.make_plan" + ("; overrides=... takes the list" if _is_list(value) else "")
    raise ArgumentError(name, _kind(value), "is the wrong type, and a moecompile.Plan is taken", fix)


def check_example(value: Any) -> None:
    """Whether `value` is what one forward takes.

    Raises:
        ArgumentError: it is not.
    """
    if isinstance(value, Tensor | tuple | Mapping):
        return
    fix = "Give keyword tensors ({'input_ids': ...}), a tuple of arguments, or one tensor"
    raise ArgumentError("example", _kind(value), "is not what a forward takes", fix)


def check_overrides(value: Any, name: str = "overrides") -> None:
    """Whether `value` is a config or a list of override strings.

    Raises:
        ArgumentError: it is not.
    """
    if isinstance(value, Config):
        return
    wanted = "a list of strings is taken, as the command line takes them"
    if isinstance(value, str):
        fix = (
            f'Write ["{value}"]'
            if "=" in value
            else _LOAD_PLAN
            if value.endswith((".yaml", ".yml"))
            else "Write a list"
        )
        raise ArgumentError(name, value, f"is one string, and {wanted}", fix)
    if isinstance(value, Plan):
        raise ArgumentError(name, "Plan", f"is a plan, and {wanted}", "Give it as plan=...")
    if isinstance(value, os.PathLike):
        raise ArgumentError(name, os.fspath(value), f"is a path, and {wanted}", _LOAD_PLAN)
    if isinstance(value, Mapping):
        example = next((f"{key}={item}" for key, item in value.items()), "experts.num_routed=8")
        raise ArgumentError(name, _kind(value), f"is a mapping, and {wanted}", f'Write ["{example}"]')
    if not _is_list(value):
        raise ArgumentError(name, _kind(value), f"is the wrong type, and {wanted}", 'Write ["experts.num_routed=8"]')
    for i, item in enumerate(value):
        if not isinstance(item, str):
            raise ArgumentError(f"{name}[{i}]", item, f"is no string, and {wanted}", 'Write "key=value"')


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _kind(value: Any) -> str:
    return type(value).__name__
