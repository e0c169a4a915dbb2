"""shard on one rank: axes are bound once, and the device mesh must be the planned one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.utils._python_dispatch import TorchDispatchMode

import moecompile
from moecompile.errors import MoecompileError, PassError, PlanError
from moecompile.passes.base import exchanges_of
from moecompile.passes.shard import bind_axes, device_mesh_of, expert_parameters, shard
from moecompile.pipeline import compile_with_report
from moecompile.torch_private import groups_of, one_chunk_each
from tests.existing_models import moe_model
from tests.tiny import COPY4, TinyGPT, UpDown, config, fake_rank, ids, max_diff, one_rank, tokens, trace

EP2 = (*COPY4, "mesh.ranks_per_node=2", "dispatch.kind=flat")


def test_one_rank_runs_without_a_wrapper(tmp_path: Path) -> None:
    model = TinyGPT().eval()
    wanted = model(ids())
    with one_rank(tmp_path):
        compiled = compile_with_report(model, config(*COPY4), example=ids(), until="shard")
        assert compiled.records[-1].name == "shard"
        assert max_diff(compiled.model(ids()), wanted) <= 1e-5
        assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["flat", "dedup"])
def test_axes_are_replaced_by_process_groups_and_the_graph_then_runs(kind: str, tmp_path: Path) -> None:
    """An `ep` axis of one rank: the exchanges are there, are bound, and change nothing."""
    ffn = UpDown()
    plan = moecompile.make_plan(trace(ffn), config(*EP2, f"dispatch.kind={kind}"))
    lowered = moecompile.transform(trace(ffn), plan)
    with one_rank(tmp_path) as name:
        device_mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("ep",))
        bind_axes(lowered, device_mesh)
        assert {node.args[-1] for node in exchanges_of(lowered)} == {device_mesh.get_group("ep").group_name}
        assert f"'{device_mesh.get_group('ep').group_name}'" in lowered.code
        if kind == "flat":  # the packed rows are for two ranks
            assert max_diff(lowered(tokens()), ffn(tokens())) <= 1e-5
        with pytest.raises(
            PassError, match=rf"pass shard, the graph: exchange_counts uses axis {name}, which is bound"
        ):
            bind_axes(lowered, device_mesh)


def test_an_axis_that_the_mesh_does_not_have_is_refused(tmp_path: Path) -> None:
    lowered = moecompile.transform(trace(UpDown()), config(*EP2))
    with one_rank(tmp_path):
        device_mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("edp",))
        with pytest.raises(PassError, match="uses axis ep, which is bound already or not in the mesh"):
            bind_axes(lowered, device_mesh)


def test_a_device_mesh_of_another_size_is_refused(tmp_path: Path) -> None:
    model = TinyGPT()
    plan = compile_with_report(model, config(*EP2), example=ids()).plan
    one = moecompile.make_plan(trace(UpDown()), config(*COPY4))
    with one_rank(tmp_path):
        message = "mesh.ep=2: the device mesh has 1 ranks there. Plan for this device mesh."
        with pytest.raises(PlanError, match=re.escape(message)):
            shard(model, plan, device_mesh_of(one.mesh, "cpu"))


def test_layers_that_are_left_out_by_chance_are_refused_on_several_ranks() -> None:
    """Their exchanges would meet those of other layers."""

    class Dropping(TinyGPT):
        layerdrop = 0.1

    for sizes in (["mesh.ranks_per_node=2"], ["mesh.ranks_per_node=2", "mesh.ep=1"]):
        compiled = compile_with_report(Dropping(), config(*COPY4, *sizes), example=ids())
        with fake_rank(0, 2), pytest.raises(PlanError, match=r"layerdrop=0[.]1: leaves layers out by chance"):
            shard(compiled.model, compiled.plan, device_mesh_of(compiled.plan.mesh, "cpu"))
    compiled.model.layerdrop = 0.0
    with fake_rank(0, 2):
        shard(compiled.model, compiled.plan, device_mesh_of(compiled.plan.mesh, "cpu"))


def test_a_part_that_is_called_without_the_model_is_named() -> None:
    """Its weights are in shards then; torch's error is of DTensors. Within a call of the model it runs."""
    compiled = compile_with_report(TinyGPT(), config(*COPY4, "mesh.ranks_per_node=2", "mesh.ep=1"), example=ids())
    model = compiled.model
    with fake_rank(0, 2):
        shard(model, compiled.plan, device_mesh_of(compiled.plan.mesh, "cpu"))
        with pytest.raises(MoecompileError, match=r"^embed: called by itself, but its weights are in shards"):
            model.embed(ids())
        model(ids()).sum().backward()
        with pytest.raises(MoecompileError, match=r"^embed: called by itself.* a call of TinyGPT gathers"):
            model.embed(ids())


def test_gradient_hooks_of_weights_that_shards_replace_are_refused(tmp_path: Path) -> None:
    """FSDP2's shards get their gradients without them."""
    compiled = compile_with_report(TinyGPT(), config(*COPY4), example=ids())
    compiled.model.get_parameter("embed.weight").register_hook(lambda grad: grad * 0)
    with one_rank(tmp_path):
        mesh = device_mesh_of(compiled.plan.mesh, "cpu")
        shard(compiled.model, compiled.plan, mesh)  # the weight stays as it is
        message = (
            "embed.weight=a weight with a gradient hook: shards replace the weight, and the hook would not run any "
            "more. Put the hook on a module, or change gradients in on_before_optimizer_step."
        )
        with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
            shard(compiled.model, compiled.plan, mesh, torch.bfloat16)


def test_expert_parameters_are_those_stacked_over_experts(tmp_path: Path) -> None:
    """Of experts that were made and of experts that the model has; routers, norms and shared experts are not."""
    made = compile_with_report(UpDown(), config(*COPY4), example=tokens()).model
    found = [(owner is made.get_submodule("experts"), name) for owner, name in expert_parameters(made)]
    assert found == [(True, name) for name in ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")]
    had = moe_model("gpt_oss", num_hidden_layers=1)
    moecompile.compile_model(had, [], example={"input_ids": ids()})
    owner = had.get_submodule("model.layers.0.mlp.experts")
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    assert [(each is owner, name) for each, name in expert_parameters(had)] == [(True, name) for name in names]


class Ops(TorchDispatchMode):
    """Counts ops."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def ops_of_sharding(num_nodes: int) -> int:
    model = TinyGPT()
    mesh = (f"mesh.num_nodes={num_nodes}", "mesh.ranks_per_node=4", "mesh.ep=4", "dispatch.kind=flat")
    plan = compile_with_report(model, config(*COPY4, *mesh), example=ids()).plan
    with fake_rank(0, plan.mesh.world_size), Ops() as ops:
        shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
    return ops.number


def test_a_rank_makes_no_shards_of_others() -> None:
    """FSDP2 makes empty ones up to the number of ranks of each weight, twice."""
    few, many = ops_of_sharding(64), ops_of_sharding(512)
    assert 0 < many <= few


def test_gradients_that_no_other_rank_has_are_not_divided_by_one() -> None:
    """FSDP2 would make another of the same size for it, in fp32."""
    model = TinyGPT()
    mesh = ("mesh.ranks_per_node=4", "mesh.ep=4", "dispatch.kind=flat")
    plan = compile_with_report(model, config(*COPY4, *mesh), example=ids()).plan
    with fake_rank(0, 4):
        shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
        layers = [module for module in model.modules() if isinstance(module, FSDPModule)]
        groups = [group for layer in layers for group in groups_of(layer)]
        factors = {group.mesh_info.shard_mesh_size: group.gradient_divide_factor for group in groups}
    assert factors == {4: 1.0, 1: None}


@pytest.mark.parametrize(("size", "num"), [(7, 3), (6, 3), (2, 5), (1, 1), (0, 2)])
@pytest.mark.parametrize("dim", [0, 1])
def test_single_shards_are_those_of_torch(size: int, num: int, dim: int) -> None:
    tensor = torch.arange(float(size * 2)).view(*((size, 2) if dim == 0 else (2, size)))
    theirs = list(torch.chunk(tensor, num, dim))
    theirs += [tensor.new_empty(0)] * (num - len(theirs))
    with one_chunk_each():
        ours = _fsdp_param._chunk_with_empty(tensor, num, dim=dim)
    assert len(ours) == num == len(theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
