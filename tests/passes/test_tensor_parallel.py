"""Which class a weight belongs to, and modules that are split on one rank."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from moecompile.errors import PlanError
from moecompile.mesh import MeshSpec
from moecompile.nn.split import SPLIT_DIMS
from moecompile.passes.lower import Lower
from moecompile.passes.rewrite import Rewrite
from moecompile.passes.split_tokens import SplitTokens
from moecompile.passes.tensor_parallel import classes_of, split_dense
from moecompile.plan import STYLES, Plan, SplitModules, reductions
from tests.tiny import COPY4, D_FF, D_MODEL, max_diff, one_rank, only_region, passed, plan_for

FOUR = MeshSpec(ranks_per_node=4, ep=4, tp=2)


class Learned(nn.Module):
    """An FFN whose activation has a learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D_MODEL, D_FF), nn.Linear(D_FF, D_MODEL)
        self.scale = nn.Parameter(torch.ones(D_FF))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        out: Tensor = self.down(nn.functional.silu(self.up(x)) * self.scale)
        return out


class Block(nn.Module):
    """Heads between split linears, with tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, D_MODEL, padding_idx=3), nn.Linear(D_MODEL, 12, bias=False)
        self.head.weight = self.embed.weight
        self.q, self.o, self.q_norm = nn.Linear(D_MODEL, D_FF), nn.Linear(D_FF, D_MODEL), nn.LayerNorm(D_FF)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, S) -> (B, S, 12)"""
        out: Tensor = self.head(self.o(self.q_norm(self.q(self.embed(ids)))))
        return out


def plan_of_block() -> Plan:
    entries = {
        "embed": "embedding_rowwise", "head": "colwise_gather_output", "q": "colwise", "o": "rowwise",
        "q_norm": "replicated_with_grad_allreduce",
    }  # fmt: skip
    split = tuple(SplitModules(modules=modules, style=style) for modules, style in entries.items())
    return Plan(mesh=FOUR, layers=(), reductions=reductions(FOUR), tensor_parallel=split)


def test_every_style_of_the_plan_has_a_form() -> None:
    assert set(SPLIT_DIMS) == set(STYLES)


def test_weights_between_cut_and_join_see_a_part_of_the_tokens() -> None:
    (layer,) = plan_for(Learned(), [*COPY4, "experts.num_shared=1", "mesh.ranks_per_node=4"]).layers
    layer = dataclasses.replace(layer, cut_over=("tp",))
    model = passed(only_region(Learned()), layer, Rewrite(), SplitTokens(), Lower()).graph
    plan = Plan(mesh=FOUR, layers=(layer,), reductions=reductions(FOUR))
    classes = {name: classes_of(model, plan)[parameter] for name, parameter in model.named_parameters()}
    assert {name for name, kind in classes.items() if kind == "router"} == {"router.weight"}
    inside = {name for name, kind in classes.items() if kind == "inside MoE layers"}
    assert {"shared_experts.up_proj.weight", "shared_experts.down_proj.bias"} <= inside
    assert any("activation" in name and name.startswith("experts.") for name in inside)
    assert set(classes.values()) == {"router", "inside MoE layers"}  # the stacks are told apart by shard


def test_a_split_module_on_one_rank_computes_what_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Block(), torch.tensor([[1, 3, 11], [0, 5, 3]])
    wanted = model(ids)
    wanted.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    with one_rank(tmp_path):
        split_dense(model, plan_of_block(), init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)))
        out = model(ids)
        assert max_diff(out, wanted) <= 1e-6
        out.square().sum().backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        for name, grad in grads.items():
            assert grad is not None and found[name] is not None
            got = found[name].to_local() if isinstance(found[name], DTensor) else found[name]  # type: ignore[union-attr]
            assert max_diff(got, grad) <= 1e-5, name  # type: ignore[arg-type]
        assert model.head.weight is model.embed.weight and isinstance(model.head.weight, DTensor)
        assert isinstance(model.q, nn.Linear) and type(model.q).__name__ == "ColwiseLinear"
        classes = {name: classes_of(model, plan_of_block())[p] for name, p in model.named_parameters()}
        assert classes["q.bias"] == classes["embed.weight"] == "dense, split over tp"
        assert classes["o.bias"] == "dense" and classes["q_norm.weight"] == "norms of heads"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            SplitModules(modules="v", style="colwise"),
            "tensor_parallel=v: is planned to be split over tp, but no module",
        ),
        (
            SplitModules(modules="head", style="colwise"),
            "tensor_parallel=weight: is split over tp, but Embedding uses it",
        ),
    ],
)
def test_a_plan_for_another_model_is_refused(entry: SplitModules, message: str, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan_of_block(), tensor_parallel=(entry,))
    with one_rank(tmp_path), pytest.raises(PlanError, match=re.escape(message)):
        split_dense(Block(), plan, init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)))
