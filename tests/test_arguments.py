"""Arguments of the Python API that are something else: one typed error each, and nothing is changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import moecompile
from moecompile.compose import compose_config

X = torch.zeros(1, 8)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def a_plan(*overrides: str) -> moecompile.Plan:
    return moecompile.make_plan(mlp(), list(overrides), example=X)


LIST = "and a list of strings is taken, as the command line takes them."
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "one string": (
        lambda: moecompile.compile_model(mlp(), "experts.num_routed=8", example=X),
        f'overrides=experts.num_routed=8: is one string, {LIST} Write ["experts.num_routed=8"].',
    ),
    "one string for a plan": (
        lambda: moecompile.make_plan(mlp(), "mesh=cpu_1", example=X),
        f'overrides=mesh=cpu_1: is one string, {LIST} Write ["mesh=cpu_1"].',
    ),
    "a mapping": (
        lambda: moecompile.compile_model(mlp(), {"routing.top_k": 2}, example=X),
        f'overrides=dict: is a mapping, {LIST} Write ["routing.top_k=2"].',
    ),
    "a number in the list": (
        lambda: moecompile.compile_model(mlp(), ["seed=1", 8], example=X),
        f'overrides[1]=8: is no string, {LIST} Write "key=value".',
    ),
    "none": (
        lambda: moecompile.compile_model(mlp(), None, example=X),
        f'overrides=NoneType: is the wrong type, {LIST} Write ["experts.num_routed=8"].',
    ),
    "a plan as overrides": (
        lambda: moecompile.compile_model(mlp(), a_plan(), example=X),
        f"overrides=Plan: is a plan, {LIST} Give it as plan=....",
    ),
    "a folder as model": (
        lambda: moecompile.compile_model("runs/model", example=X),
        "model=runs/model: is a path, and a torch.nn.Module is taken. Load it first, for example by "
        "transformers.AutoModelForCausalLM.from_pretrained.",
    ),
    "a path as model": (
        lambda: moecompile.make_plan(Path("model"), example=X),
        "model_or_graph=model: is a path, and a torch.nn.Module is taken. Load it first, for example by "
        "transformers.AutoModelForCausalLM.from_pretrained.",
    ),
    "a class": (
        lambda: moecompile.compile_model(nn.Linear, example=X),
        "model=Linear: is a class, and a torch.nn.Module is taken. Make one: Linear(...).",
    ),
    "a function": (
        lambda: moecompile.plan_of(mlp),
        "model=function: is the wrong type, and a torch.nn.Module is taken. Give the model itself.",
    ),
    "a path as plan": (
        lambda: moecompile.compile_model(mlp(), plan="plan.yaml", example=X),
        "plan=plan.yaml: is a path, and a moecompile.Plan is taken. Read it first: moecompile.plan.load(path).",
    ),
    "a path as overrides or plan": (
        lambda: moecompile.transform(fx.symbolic_trace(mlp()), Path("plan.yaml")),
        f"overrides_or_plan=plan.yaml: is a path, {LIST} Read it first: moecompile.plan.load(path).",
    ),
    "a text as overrides or plan": (
        lambda: moecompile.transform(fx.symbolic_trace(mlp()), "plan.yaml"),
        f"overrides_or_plan=plan.yaml: is one string, {LIST} Read it first: moecompile.plan.load(path).",
    ),
    "a list as plan": (
        lambda: moecompile.compile_model(mlp(), plan=["mesh=cpu_1"], example=X),
        "plan=list: is the wrong type, and a moecompile.Plan is taken. Make one with moecompile.make_plan; "
        "overrides=... takes the list.",
    ),
    "transform of a module": (
        lambda: moecompile.transform(mlp()),
        "graph_module=Sequential: is a module without a graph, and a torch.fx.GraphModule is taken. Use "
        "moecompile.compile_model(model, ..., example=...), or give torch.fx.symbolic_trace(model).",
    ),
    "a list as example": (
        lambda: moecompile.compile_model(mlp(), example=[X]),
        "example=list: is not what a forward takes. Give keyword tensors ({'input_ids': ...}), a tuple of arguments, "
        "or one tensor.",
    ),
    "a path to shard": (
        lambda: moecompile.shard("model", a_plan(), None),
        "model=model: is a path, and a torch.nn.Module is taken.",
    ),
    "a plan file to shard by": (
        lambda: moecompile.shard(mlp(), Path("p.yaml"), None),
        "plan=p.yaml: is a path, and a moecompile.Plan is taken.",
    ),
    "overrides beside a plan": (
        lambda: moecompile.compile_model(mlp(), ["routing.top_k=1", "seed=3"], plan=a_plan(), example=X),
        f"overrides=routing.top_k=1: would make another plan than the given one ({a_plan().hash}), which decides. Leave "
        "them out, or make the plan with them: moecompile.make_plan(model, overrides, example=...).",
    ),
    "a group beside a plan": (
        lambda: moecompile.compile_model(mlp(), ["mesh=cpu_1x2"], plan=a_plan(), example=X),
        "overrides=mesh=cpu_1x2: would make another plan",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_argument_of_another_kind(name: str) -> None:
    call, message = CASES[name]
    with pytest.raises(moecompile.ArgumentError, match=f"^{re.escape(message)}") as raised:
        call()
    assert isinstance(raised.value, moecompile.UserError)
    assert isinstance(raised.value, TypeError)


def test_what_made_a_plan_may_be_given_with_it() -> None:
    overrides = ["experts.num_routed=4", "routing.top_k=1"]
    plan = a_plan(*overrides)
    first = moecompile.compile_model(mlp(), [*overrides, "seed=3"], plan=plan, example=X)
    second = moecompile.compile_model(mlp(), ["seed=3"], plan=plan, example=X)
    third = moecompile.compile_model(mlp(), compose_config(["seed=3"]), plan=plan, example=X)
    assert moecompile.plan_of(first) == moecompile.plan_of(second) == moecompile.plan_of(third) == plan


def test_every_error_that_a_user_can_mend_has_one_base() -> None:
    for error in (moecompile.ConfigError, moecompile.ArgumentError, moecompile.PlanError, moecompile.CaptureError):
        assert issubclass(error, moecompile.UserError)
        assert error.__name__ in moecompile.__all__
    assert "UserError" in moecompile.__all__
