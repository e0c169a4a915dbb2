"""The cut of a model into the stages of a rank: what is left, what is gone, and what is refused."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import fx, nn

from moecompile.errors import MoecompileError, PassError
from moecompile.mesh import MeshSpec
from moecompile.nn.stages import Absent, passage_of, put
from moecompile.passes.base import run_on_model
from moecompile.passes.cut import Cut, stage_plan
from moecompile.plan import Plan
from moecompile.stages import stage_of
from tests.match.test_boundaries import IDS, Block, Model, boundaries, cut


def a_plan(around: str = "") -> tuple[nn.Module, Plan]:
    found = boundaries(around)
    mesh = MeshSpec(ranks_per_node=2, pp=2)
    return found.model, Plan(mesh=mesh, layers=(), reductions=(), pipeline=cut(found, "layers.2"))


def rewritten(model: nn.Module, path: str) -> None:
    """Puts a graph in the place of a layer, as passes do: it and its graph refer to each other."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.add, (x, graph.call_module("linear", (x,)))))
    put(model, {path: fx.GraphModule(model.get_submodule(path), graph)})


@pytest.mark.parametrize("index", [0, 1])
def test_weights_of_other_stages_are_gone_and_names_stay(index: int) -> None:
    model, plan = a_plan()
    assert plan.pipeline is not None
    rewritten(model, "layers.0" if index else "layers.3")
    before = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    run_on_model([Cut(index=index)], model, plan)
    here = {name for name, _ in model.named_parameters()}
    assert here == {name for name in before if stage_of(plan.pipeline, name) == index}
    gone = [ref() for name, ref in before.items() if name not in here]
    assert len(gone) > 3 and all(each is None for each in gone)
    assert isinstance(model.get_submodule("layers.0" if index else "layers.3"), Absent)


def test_what_stands_for_a_layer_has_its_attributes_and_none_of_its_hooks() -> None:
    model, plan = a_plan()
    called: list[int] = []
    layer = model.get_submodule("layers.3")
    layer.register_forward_hook(lambda *_: called.append(1))
    run_on_model([Cut(index=0)], model, plan)
    absent = model.get_submodule("layers.3")
    assert absent.name_of_kind == "full" and absent.linear.weight.shape == (4, 4) and absent.linear.weight.is_meta
    passage = passage_of(model)
    assert passage is not None
    x = torch.ones(1, 4)
    with passage.running(model, 0, ()), pytest.raises(Exception, match="a part of the model was called by itself"):
        absent(x)
    assert not called and isinstance(layer, Block)


def test_what_layers_of_other_stages_make_is_not_asked_for() -> None:
    """transformers adds a loss over the router logits of all layers, of which the last stage has those of its own."""
    model, plan = a_plan()
    run_on_model([Cut(index=1)], model, plan)
    passage = passage_of(model)
    assert passage is not None
    with passage.running(model, 1, (torch.ones(*IDS.shape, 4),)):
        with pytest.raises(MoecompileError, match="called with output_router_logits, and a stage of a pipeline"):
            model(IDS, output_router_logits=True)
        assert passage.calls == 0


def test_a_cut_model_is_not_called_by_itself() -> None:
    model, plan = a_plan()
    run_on_model([Cut(index=0)], model, plan)
    with pytest.raises(MoecompileError, match="this rank has some stages of the model alone"):
        model(IDS)


def test_a_head_that_stands_before_its_embedding_is_tied_too() -> None:
    _, plan = a_plan("tied")
    assert plan.pipeline is not None and plan.pipeline.tied == (("embed.weight", "head.weight"),)
    backwards = Model("tied")
    embed = backwards.embed
    del backwards.embed
    backwards.embed = embed  # now the last one
    run_on_model([Cut(index=1)], backwards, plan)
    assert "head.weight" in dict(backwards.named_parameters())


def test_a_plan_of_another_model_is_refused() -> None:
    _, plan = a_plan()
    with pytest.raises(PassError, match=r"layers\.3: is planned to be in a stage, and the model has no such module"):
        run_on_model([Cut(index=0)], Model(layers=3), plan)
    with pytest.raises(PassError, match=r"layers\.4\.linear\.weight: is a weight of no stage"):
        run_on_model([Cut(index=0)], Model(layers=5), plan)
    with pytest.raises(PassError, match=r"embed\.weight: is also head\.weight, of another stage"):
        run_on_model([Cut(index=0)], Model("tied"), plan)


def test_a_plan_without_stages_is_whole() -> None:
    plan = Plan(mesh=MeshSpec(), layers=(), reductions=())
    model = Model()
    run_on_model([Cut(index=0)], model, plan)
    assert passage_of(model) is None and stage_plan(plan, 0) is plan
