"""What users add: an FFN that the compiler does not know, and a pass of their own between the built-in ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import moecompile
from moecompile import FFNMatch, GraphView, Region
from moecompile.errors import ConfigError, PassError, PlanError
from moecompile.match.linears import Linear
from moecompile.pipeline import compile_with_report
from moecompile.plan import LayerPlan
from tests.tiny import COPY4, TinyGPT, config, ids, max_diff, randomize, tokens, trace

COPY = config(*COPY4)


class Memory(nn.Module):
    """keys -> softmax -> values: an FFN whose hidden units compete, and the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.values(F.softmax(self.keys(x), dim=-1))


def memory(down: Linear, view: GraphView) -> FFNMatch | None:
    """linear -> softmax -> linear"""
    softmax = down.x
    up = view.linears.get(softmax.args[0]) if view.name(softmax) == "softmax" else None
    return FFNMatch((up,), (softmax,), down) if up else None


def build() -> nn.Module:
    model = nn.Sequential(Memory(), Memory())
    randomize(model)
    return model


def test_a_memory_the_linears_is_unknown_at_first() -> None:
    compiled = compile_with_report(build(), COPY, example=tokens())
    assert compiled.plan.layers == ()


def test_a_registered_pattern_is_found_in_a_model() -> None:
    model, x = build(), tokens()
    wanted = model(x)
    with moecompile.register_pattern(memory):
        compiled = compile_with_report(model, COPY, example=x)
    assert [(site.fqn, site.status) for site in compiled.sites] == [("0", "rewritten"), ("1", "rewritten")]
    assert max_diff(model(x), wanted) <= 1e-5


def test_and_in_a_graph() -> None:
    model, x = build(), tokens()
    with moecompile.register_pattern(memory):
        result = moecompile.transform(trace(model), COPY)
    assert len(moecompile.plan_of(result).layers) == 2
    assert max_diff(result(x), model(x)) <= 1e-5


def test_a_pattern_is_gone_after_its_handle() -> None:
    handle = moecompile.register_pattern(memory)
    handle.remove()
    assert moecompile.plan_of(moecompile.transform(trace(build()), COPY)).layers == ()


def test_a_softmax_cannot_be_sliced() -> None:
    overrides = config("experts.num_routed=4", "experts.granularity=2", "experts.init=virtual_group", "routing.top_k=2")
    rule = (
        "experts.granularity=2: must be 1 for 0: its activation (softmax) needs all hidden units"
        " at once, and slices have only some. Use experts.granularity=1 and experts.init=copy."
    )
    with moecompile.register_pattern(memory), pytest.raises(PlanError, match=f"^{re.escape(rule)}$"):
        moecompile.compile_model(build(), overrides, example=tokens())


@pytest.mark.parametrize(
    ("build_model", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 16), nn.Softmax(-1), nn.Linear(16, 4)), "width in is 8 but"),
        (lambda: nn.Sequential(nn.Linear(8, 2), nn.Softmax(-1), nn.Linear(2, 8)), "a bottleneck of 2 in 8"),
    ],
)
def test_what_a_pattern_finds_is_checked_like_any_other(build_model: Callable[[], nn.Module], reason: str) -> None:
    with moecompile.register_pattern(memory):
        compiled = compile_with_report(build_model(), COPY, example=tokens())
    assert compiled.plan.layers == ()
    assert compiled.sites[0].reason.startswith(reason)


class Scale:
    """Doubles what the experts return. A pass is this much."""

    name = "scale"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def requires(self, region: Region, layers: Sequence[LayerPlan]) -> None:
        self.seen += [layer.site.fqn for layer in layers]

    def run(self, region: Region, layers: Sequence[LayerPlan]) -> Region:
        graph = fx.Graph()
        graph.output(graph.graph_copy(region.graph.graph, {}))
        for node in graph.nodes:
            if node.target == torch.ops.moecompile.unflatten_tokens:
                with graph.inserting_after(node):
                    doubled = graph.call_function(torch.mul, (node, 2.0))
                node.replace_all_uses_with(doubled, lambda user, doubled=doubled: user is not doubled)
        return region.with_graph(fx.GraphModule(region.graph, graph))

    def ensures(self, before: Region, after: Region, layers: Sequence[LayerPlan]) -> None:
        count = sum(node.target is torch.mul for node in after.graph.graph.nodes)
        if count != len(layers):
            raise PassError(self.name, layers[0].site.fqn, f"{count} products for {len(layers)} layers")


@pytest.mark.parametrize("after", ["rewrite", "lower"])
def test_a_registered_pass_runs_where_it_says(after: str) -> None:
    model, step = TinyGPT(), Scale()
    doubled = TinyGPT()
    doubled.load_state_dict(model.state_dict())
    for block in doubled.blocks:
        block.mlp[3].weight.data *= 2
        block.mlp[3].bias.data *= 2
    told = pytest.warns(UserWarning, match="promised to stay but differ by .* scale ran after rewrite")
    with moecompile.register_pass(step, after=after), told if after == "rewrite" else nullcontext():
        compiled = compile_with_report(model, COPY, example=ids())
    assert step.seen == ["blocks.0.mlp", "blocks.1.mlp"]
    assert max_diff(model(ids()), doubled(ids())) <= 1e-5
    names = [record.name for record in compiled.records]
    assert names.index("scale") == names.index(after) + 1
    assert names.count("scale") == 1


def test_its_contract_is_checked() -> None:
    class Forgetful(Scale):
        def run(self, region: Region, layers: Sequence[LayerPlan]) -> Region:
            return region

    model = TinyGPT()
    names = list(model.state_dict())
    with (
        moecompile.register_pass(Forgetful(), after="rewrite"),
        pytest.raises(PassError, match=r"^pass scale, blocks\.0\.mlp: 0 products for 1 layers$"),
    ):
        moecompile.compile_model(model, COPY, example=ids())
    assert list(model.state_dict()) == names  # nothing was replaced


def test_a_place_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match=r"^after=capture: must be rewrite or lower\. Use one of these\.$"):
        moecompile.register_pass(Scale(), after="capture")


def test_what_is_registered_already_is_refused() -> None:
    class Idle:
        name = "idle"

    handles = [moecompile.register_pass(Idle(), after=place) for place in ("rewrite", "lower")]  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^graph_pass=idle: there is a pass of this name after lower already\."):
        moecompile.register_pass(Idle(), after="lower")  # type: ignore[arg-type]
    for handle in handles:
        handle.remove()
    moecompile.register_pass(Idle(), after="lower").remove()  # type: ignore[arg-type]
    with (
        moecompile.register_pattern(memory),
        pytest.raises(ConfigError, match=r"^pattern=memory: is registered already"),
    ):
        moecompile.register_pattern(memory)
