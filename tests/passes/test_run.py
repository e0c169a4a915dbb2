"""The list of passes and its runner: one kind of pass, one order, and contracts that nobody goes round."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import moecompile
from moecompile import Region
from moecompile.bench.layers import layer_pairs
from moecompile.errors import PassError
from moecompile.passes.adapters import AttachAdapters
from moecompile.passes.base import GraphPass, ModelPass
from moecompile.passes.lower import Lower
from moecompile.passes.recompute import Recompute, recompute
from moecompile.passes.rewrite import Rewrite
from moecompile.passes.run import on_one_device, on_the_mesh
from moecompile.passes.shard import ShardModel, bind_axes, device_mesh_of
from moecompile.pipeline import compile_with_report, make_plan
from moecompile.plan import LayerPlan
from tests.existing_models import moe_inputs, moe_model
from tests.tiny import COPY4, TinyGPT, UpDown, config, ids, one_rank, tiny_llama, tokens, trace

CONTRACT = ("requires", "run", "ensures")


class Seen:
    """Changes nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def requires(self, region: Region, layers: Sequence[LayerPlan]) -> None: ...

    def run(self, region: Region, layers: Sequence[LayerPlan]) -> Region:
        return region

    def ensures(self, before: Region, after: Region, layers: Sequence[LayerPlan]) -> None: ...


def parameters(owner: object, method: str) -> list[str]:
    return [name for name in inspect.signature(getattr(owner, method)).parameters if name != "self"]


@pytest.mark.parametrize(
    ("protocol", "steps"),
    [
        (GraphPass, (*on_one_device(0), *on_the_mesh(), Seen("a user's"))),
        (ModelPass, (ShardModel(device_mesh=None), Recompute(checkpointing="full"), AttachAdapters(seed=0))),
    ],
)
def test_every_pass_is_of_one_kind(protocol: type, steps: Sequence[object]) -> None:
    for step in steps:
        for method in CONTRACT:
            assert parameters(step, method) == parameters(protocol, method), (step, method)


def test_the_list_is_the_order() -> None:
    after_rewrite = moecompile.register_pass(Seen("early"), after="rewrite")
    with after_rewrite, moecompile.register_pass(Seen("late"), after="lower"):
        compiled = compile_with_report(TinyGPT(), config(*COPY4), example=ids())
    names = [record.name for record in compiled.records]
    assert names == ["capture", "match", "build_plan", "rewrite", "early", "lower", "late", "fuse"]


def test_a_pass_that_returns_a_graph_module_is_told_what_is_meant() -> None:
    class Bare(Seen):
        def run(self, region: Region, layers: Sequence[LayerPlan]) -> Region:
            return region.graph

    rule = r"^pass bare, .*: run returned a \w+, not a Region: return region\.with_graph\(graph_module\)$"
    with moecompile.register_pass(Bare("bare"), after="lower"), pytest.raises(PassError, match=rule):
        moecompile.transform(trace(UpDown()), config(*COPY4))


def _transform() -> None:
    moecompile.transform(trace(UpDown()), config(*COPY4))


def _compile() -> None:
    moecompile.compile_model(TinyGPT(), config(*COPY4), example=ids())


def _existing() -> None:
    moecompile.compile_model(moe_model("mixtral"), config(), example=moe_inputs("mixtral", ids()))


def _bench() -> None:
    model, settings = tiny_llama(), config(*COPY4, "data.seq_len=8", "data.micro_batch_size=1")
    example = {"input_ids": ids(length=8)}
    plan = make_plan(model, settings, example=example)
    next(layer_pairs(model, plan, settings, example, torch.device("cpu")))


@pytest.mark.parametrize("step", [Rewrite, Lower])
@pytest.mark.parametrize("use", [_transform, _compile, _existing, _bench])
def test_nobody_goes_round_the_contract(step: type, use: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, before: Region, after: Region, layers: Sequence[LayerPlan]) -> None:
        raise PassError("any", layers[0].site.fqn, "is broken by hand")

    use()
    monkeypatch.setattr(step, "ensures", broken)
    with pytest.raises(PassError, match="is broken by hand"):
        use()


def test_the_proof_of_existing_experts_runs_the_pass_with_its_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked before anything is planned."""
    calls: list[str] = []
    was = Rewrite.ensures
    monkeypatch.setattr(Rewrite, "ensures", lambda *args: (calls.append("proof"), was(*args))[1])
    make_plan(moe_model("mixtral"), config(), example=moe_inputs("mixtral", ids()))
    assert calls == ["proof"] * 2


# -- whole models ----------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_lowered_is_not_sharded(tmp_path: Path) -> None:
    ep2 = config(*COPY4, "mesh.ranks_per_node=2", "dispatch.kind=flat")
    model = moecompile.compile_model(TinyGPT(), ep2, example=ids(), until="rewrite")
    plan = moecompile.plan_of(model)
    with one_rank(tmp_path):
        mesh = device_mesh_of(make_plan(trace(UpDown()), config(*COPY4)).mesh, "cpu")
        step = ShardModel(device_mesh=_Sizes(mesh))
        rule = r"^pass shard, the model: the model holds the exchanges \{\}, planned are \{'exchange_counts': 2, "
        with pytest.raises(PassError, match=rule):
            step.requires(model, plan)


class _Sizes:
    """A device mesh of one rank that says it has the planned sizes."""

    mesh_dim_names = ("dp_replicate", "edp", "ep")

    def __init__(self, mesh: object) -> None:
        self.mesh = mesh

    def __getitem__(self, axis: str) -> _Sizes:
        self.axis = axis
        return self

    def size(self) -> int:
        return {"dp_replicate": 1, "edp": 1, "ep": 2}[self.axis]


def test_what_shard_leaves_undone_is_noticed(tmp_path: Path) -> None:
    ep2 = config(*COPY4, "mesh.ranks_per_node=2", "dispatch.kind=flat")
    model = moecompile.compile_model(TinyGPT(), ep2, example=ids())
    plan, step = moecompile.plan_of(model), ShardModel(device_mesh=None)
    with pytest.raises(PassError, match=r"pass shard, blocks\.0\.mlp: .* is still on the logical axis ep"):
        step.ensures(model, plan)
    with one_rank(tmp_path):
        bind_axes(model, device_mesh_of(make_plan(trace(UpDown()), config(*COPY4)).mesh, "cpu"))
    with pytest.raises(PassError, match=r"Experts holds every expert's up_proj on every rank"):
        step.ensures(model, plan)


def test_layers_compute_again_once() -> None:
    model = moecompile.compile_model(TinyGPT(), config(*COPY4), example=ids())
    recompute(model, moecompile.plan_of(model), "full")
    with pytest.raises(PassError, match="its layers compute again already"):
        recompute(model, moecompile.plan_of(model), "full")


class Headed(nn.Module):
    """Layers, and an FFN that is none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([UpDown(), UpDown()]), UpDown()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def test_experts_outside_of_the_layers_compute_again_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is predicted for all of them."""
    model = moecompile.compile_model(Headed(), config(*COPY4), example=tokens())
    plan = moecompile.plan_of(model)
    with pytest.raises(PassError, match=r"pass recompute, layers\.0: its experts would keep"):
        Recompute(checkpointing="full").ensures(model, plan)
    recompute(model, plan, "full")
    runs: list[int] = []
    model.head.get_submodule("experts").register_forward_hook(lambda *_: runs.append(1))
    model(tokens().requires_grad_()).sum().backward()
    assert len(runs) == 2
