"""cut: keeps the stages of a pipeline that this rank has (moecompile.nn.stages), before anything is sharded.

Routers keep their number in the whole model, by which random numbers are drawn. Before a model with values is cut, its
stages are run one after another in this process: they must give what the whole model gives, bit by bit.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from moecompile.capture import Example, call_with, undisturbed
from moecompile.errors import PassError
from moecompile.nn.router import number_routers
from moecompile.nn.stages import StageEnded, cut_into_stages, end_stages, passage_of, put, uncut
from moecompile.passes.base import ModelPass, op_name
from moecompile.passes.context_parallel import check_positions
from moecompile.passes.lookups import read_here
from moecompile.passes.tensor_parallel import check_modules
from moecompile.plan import Plan
from moecompile.stages import Pipeline, stage_of
from moecompile.torch_private import tree_leaves, without_values


@dataclass(frozen=True, kw_only=True)
class Cut(ModelPass):
    """index: of this rank along pp."""

    index: int
    name: str = "cut"

    def wants(self, plan: Plan) -> bool:
        """Whether the plan has stages."""
        return plan.pipeline is not None

    def requires(self, model: nn.Module, plan: Plan) -> None:
        """The units are there, each weight belongs to one of them, and those of two stages are tied. What other axes
        split is there: afterwards some of it is on other ranks.
        """
        assert plan.pipeline is not None
        check_modules(model, plan)
        check_positions(model, plan)
        paths = {path for path, _ in model.named_modules(remove_duplicate=False)}
        for stage in plan.pipeline.stages:
            if missing := [unit.path for unit in stage.units if unit.path not in paths]:
                raise PassError(self.name, missing[0], "is planned to be in a stage, and the model has no such module")
        stages: dict[nn.Parameter, set[int | None]] = {}
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            stages.setdefault(parameter, set()).add(stage_of(plan.pipeline, name))
            names.setdefault(parameter, []).append(name)
        for parameter, found in stages.items():
            if None in found:
                raise PassError(self.name, names[parameter][0], "is a weight of no stage")
            if len(found) > 1 and set(names[parameter]) not in [set(pair) for pair in plan.pipeline.tied]:
                raise PassError(self.name, names[parameter][0], f"is also {names[parameter][1]}, of another stage")

    def run(self, model: nn.Module, plan: Plan) -> None:
        """Changes the model in place."""
        assert plan.pipeline is not None
        number_routers(model)
        cut_into_stages(model, plan.pipeline, plan.pipeline.stages_of(self.index), _shapes_of)
        gc.collect()  # a GraphModule and its graph refer to each other: weights of other stages would stay for a while

    def ensures(self, model: nn.Module, plan: Plan) -> None:
        """All weights that are left are those of this rank's stages."""
        assert plan.pipeline is not None
        own = plan.pipeline.stages_of(self.index)
        for name, _ in model.named_parameters():
            if stage_of(plan.pipeline, name) not in own:
                raise PassError(self.name, name, "belongs to another rank's stage, and is still here")


def _shapes_of(module: nn.Module) -> nn.Module:
    """What has the shapes of a module of another stage: it sends nothing."""
    new = without_values(module)
    for path, graph in list(module.named_modules()):
        if isinstance(graph, fx.GraphModule) and any(op_name(node) == "return_rows" for node in graph.graph.nodes):
            alone = without_values(read_here(graph))
            if not path:
                return alone
            put(new, {path: alone})
    return new


def stage_plan(plan: Plan, index: int) -> Plan:
    """The part of a plan that the rank at `index` along pp has: layers, tables, what is computed again."""
    if plan.pipeline is None:
        return plan
    stages = [plan.pipeline.stages[i] for i in plan.pipeline.stages_of(index)]

    def here(path: str) -> bool:
        return any(stage.holds(path) for stage in stages)

    again = (replace(each, layers=tuple(path for path in each.layers if here(path))) for each in plan.recomputed)
    return replace(
        plan,
        layers=tuple(layer for layer in plan.layers if here(layer.site.fqn)),
        recomputed=tuple(each for each in again if each.layers),
        lookups=tuple(lookup for lookup in plan.lookups if here(lookup.weight)),
    )


def run_in_stages(model: nn.Module, pipeline: Pipeline, call: Any) -> Any:
    """What `call()`, which calls the model, returns if the stages run one after another in this process."""
    cut_into_stages(model, pipeline, range(len(pipeline.stages)))
    hooks = end_stages(model)
    try:
        passage, sent = passage_of(model), tuple[Tensor, ...]()
        assert passage is not None
        for stage in range(len(pipeline.stages)):
            with passage.running(model, stage, sent):
                try:
                    result = call()
                except StageEnded as ended:
                    sent = ended.sent
        return result
    finally:
        for hook in hooks:
            hook.remove()
        uncut(model)


def check_stages(model: nn.Module, pipeline: Pipeline, example: Example) -> None:
    """Runs the example through the whole model and through its stages.

    Raises:
        PassError: the outputs are not equal, or a stage cannot be run.
    """

    def call() -> list[Tensor]:
        return [leaf for leaf in tree_leaves(call_with(model, example)) if isinstance(leaf, Tensor)]

    with undisturbed(model):
        whole = call()
        try:
            staged = run_in_stages(model, pipeline, call)
        except (Exception, StageEnded) as error:
            rule = f"cannot be run in {len(pipeline.stages)} stages: {type(error).__name__}: {error}"
            raise PassError("cut", "the model", rule) from error
    if len(whole) != len(staged) or not all(_equal(a, b) for a, b in zip(whole, staged, strict=True)):
        raise PassError("cut", "the model", f"does not compute the same in {len(pipeline.stages)} stages")


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
