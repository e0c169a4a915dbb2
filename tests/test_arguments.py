"""Arguments of the Python API that are something else: one typed error each, and nothing is changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.distributed.device_mesh import init_device_mesh

import moecompile
from moecompile.compose import compose_config
from tests.tiny import one_rank

X = torch.zeros(1, 8)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def a_plan(*overrides: str) -> moecompile.Plan:
    return moecompile.make_plan(mlp(), list(overrides), example=X)


LIST = "must be a list of strings, as on the command line"
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "one string": (
        lambda: moecompile.compile_model(mlp(), "experts.num_routed=8", example=X),
        f'overrides=experts.num_routed=8: {LIST}, not one string. Write ["experts.num_routed=8"].',
    ),
    "one string for a plan": (
        lambda: moecompile.make_plan(mlp(), "mesh=cpu_1", example=X),
        f'overrides=mesh=cpu_1: {LIST}, not one string. Write ["mesh=cpu_1"].',
    ),
    "a mapping": (
        lambda: moecompile.compile_model(mlp(), {"routing.top_k": 2}, example=X),
        f'overrides=dict: {LIST}, not a mapping. Write ["routing.top_k=2"].',
    ),
    "a number in the list": (
        lambda: moecompile.compile_model(mlp(), ["seed=1", 8], example=X),
        'overrides[1]=8: must be a string. Write "key=value".',
    ),
    "none": (
        lambda: moecompile.compile_model(mlp(), None, example=X),
        f'overrides=NoneType: {LIST}. Write ["experts.num_routed=8"].',
    ),
    "a plan as overrides": (
        lambda: moecompile.compile_model(mlp(), a_plan(), example=X),
        f"overrides=Plan: {LIST}, not a plan. Give it as plan=....",
    ),
    "a folder as model": (
        lambda: moecompile.compile_model("runs/model", example=X),
        "model=runs/model: must be a torch.nn.Module, not a path. Load it first, for example by "
        "transformers.AutoModelForCausalLM.from_pretrained.",
    ),
    "a path as model": (
        lambda: moecompile.make_plan(Path("model"), example=X),
        "model_or_graph=model: must be a torch.nn.Module, not a path. Load it first, for example by "
        "transformers.AutoModelForCausalLM.from_pretrained.",
    ),
    "a class": (
        lambda: moecompile.compile_model(nn.Linear, example=X),
        "model=Linear: must be a torch.nn.Module, not a class. Create one: Linear(...).",
    ),
    "a function": (
        lambda: moecompile.plan_of(mlp),
        "model=function: must be a torch.nn.Module. Give the model itself.",
    ),
    "a path as plan": (
        lambda: moecompile.compile_model(mlp(), plan="plan.yaml", example=X),
        "plan=plan.yaml: must be a moecompile.Plan, not a path. Read it first: moecompile.plan.load(path).",
    ),
    "a path as overrides or plan": (
        lambda: moecompile.transform(fx.symbolic_trace(mlp()), Path("plan.yaml")),
        f"overrides_or_plan=plan.yaml: {LIST}, not a path. Read it first: moecompile.plan.load(path).",
    ),
    "a text as overrides or plan": (
        lambda: moecompile.transform(fx.symbolic_trace(mlp()), "plan.yaml"),
        f"overrides_or_plan=plan.yaml: {LIST}, not one string. Read it first: moecompile.plan.load(path).",
    ),
    "a list as plan": (
        lambda: moecompile.compile_model(mlp(), plan=["mesh=cpu_1"], example=X),
        "plan=list: must be a moecompile.Plan. Make one with moecompile.make_plan; "
        "overrides=... takes the list.",
    ),
    "transform of a module": (
        lambda: moecompile.transform(mlp()),
        "graph_module=Sequential: must be a torch.fx.GraphModule, not a module without a graph. Use "
        "moecompile.compile_model(model, ..., example=...), or give torch.fx.symbolic_trace(model).",
    ),
    "a list as example": (
        lambda: moecompile.compile_model(mlp(), example=[X]),
        "example=list: must be the inputs of one forward. Give keyword tensors ({'input_ids': ...}), a tuple of arguments, "
        "or one tensor.",
    ),
    "a path to shard": (
        lambda: moecompile.shard("model", a_plan(), None),
        "model=model: must be a torch.nn.Module, not a path.",
    ),
    "a plan file to shard by": (
        lambda: moecompile.shard(mlp(), Path("p.yaml"), None),
        "plan=p.yaml: must be a moecompile.Plan, not a path.",
    ),
    "no device mesh to shard on": (
        lambda: moecompile.shard(mlp(), a_plan(), None),
        "device_mesh=NoneType: must be a torch DeviceMesh. Make it by moecompile.device_mesh_of(plan.mesh, device_type).",
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


@pytest.mark.parametrize("key", ["plan", "compare"])
def test_a_plan_of_the_command_line_is_no_override(key: str) -> None:
    with pytest.raises(moecompile.ConfigError, match=rf"^{key}=runs/mine: is for the command line\. Leave it out; "):
        moecompile.make_plan(mlp(), [f"{key}=runs/mine"], example=X)


def test_ranks_and_a_device_mesh_must_be_those_of_the_plan_before_anything_changes(tmp_path: Path) -> None:
    def refused(message: str, *overrides: str, until: str = "shard", **given: Any) -> None:
        model = nn.Sequential(nn.LayerNorm(8), mlp())
        before = list(model.state_dict())
        with pytest.raises(moecompile.ConfigError, match=f"^{message}"):
            moecompile.compile_model(model, list(overrides), example=X, until=until, **given)
        assert list(model.state_dict()) == before

    with one_rank(tmp_path):
        other = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
        refused(r"mesh=1 x 2: the plan is for 2 ranks, the process group has 1\. Change", "mesh.ranks_per_node=2")
        refused(r"mesh\.dp_replicate=1: the device mesh has no such axis, but dp\. Make it", device_mesh=other)
        refused(r"device_mesh=str: must be a torch DeviceMesh\. Make it", device_mesh="cpu")
        refused(r"device_mesh=.*: is for until=shard, not lower\. Leave it out", until="lower", device_mesh=other)


def test_a_plan_is_saved_and_read_by_a_path_or_its_text(tmp_path: Path) -> None:
    plan = a_plan()
    moecompile.plan.save(plan, str(tmp_path / "plan.yaml"))
    assert moecompile.plan.load(str(tmp_path / "plan.yaml")) == moecompile.plan.load(tmp_path / "plan.yaml") == plan


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
