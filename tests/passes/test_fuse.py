"""fuse in its own notation; what is fused computes the same, and what cannot be is left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moecompile.errors import PassError, PlanError
from moecompile.match.experts import is_swiglu
from moecompile.match.regions import Region
from moecompile.nn import Experts
from moecompile.passes.base import exchanges_of, experts_calls
from moecompile.passes.fuse import Fuse
from moecompile.passes.lower import Lower
from moecompile.passes.rewrite import Rewrite
from moecompile.pipeline import compile_with_report
from moecompile.plan import LayerPlan, on_one_rank
from tests.existing_models import moe_inputs, moe_model
from tests.tiny import (
    COPY4,
    Gated,
    UpDown,
    config,
    ids,
    max_diff,
    only_region,
    passed,
    plan_for,
    randomize,
    text,
    tokens,
)

SHARDED = [*COPY4, "mesh.num_nodes=2", "mesh.ranks_per_node=2"]


def lowered(kind: str, ffn: nn.Module | None = None) -> tuple[Region, list[LayerPlan]]:
    """A lowered FFN and its layer."""
    ffn = ffn or Gated()
    (layer,) = plan_for(ffn, COPY4 if kind == "local" else [*SHARDED, f"dispatch.kind={kind}"]).layers
    return passed(only_region(ffn), layer, Rewrite(), Lower()), [layer]


def fused(region: Region, layers: list[LayerPlan]) -> Region:
    (layer,) = layers
    return passed(region, layer, Fuse())


EXPECTED_LOCAL = """\
%0 = placeholder x
%1 = moecompile.flatten_tokens(%0)
%2 = router[Router](%0)
%3 = getitem(%2, 0)
%4 = getitem(%2, 1)
%5 = moecompile.sort_assignments(%4, %3, 4)
%6 = getitem(%5, 0)
%7 = getitem(%5, 1)
%8 = getitem(%5, 3)
%9 = experts[Experts](%1, %8, source_R=%7, weights_R=%6)
%10 = moecompile.unflatten_tokens(%9, %0)
output(%10)
"""


def test_expected_graph() -> None:
    before, layers = lowered("local")
    shown = text(before.graph)
    after = fused(before, layers)
    assert text(after.graph) == EXPECTED_LOCAL
    assert text(before.graph) == shown
    assert after.graph.experts is before.graph.experts


SORTING = {
    "local": "sort_assignments", "dedup": "sort_received", "hierarchical": "sort_received",
    "allgather": "sort_gathered",
}  # fmt: skip
COPYING = ("permute", "expand_rows", "take_local", "reduce_rows", "unpermute")


@pytest.mark.parametrize("kind", SORTING)
def test_every_dispatch_sorts_and_does_not_copy(kind: str) -> None:
    before, layers = lowered(kind)
    after = text(fused(before, layers).graph)
    assert f"moecompile.{SORTING[kind]}(" in after
    assert not [op for op in COPYING if f"moecompile.{op}(" in after]
    for exchange in ("all_to_all", "exchange_assignments", "all_gather", "reduce_scatter"):
        assert after.count(f"moecompile.{exchange}(") == text(before.graph).count(f"moecompile.{exchange}(")


def test_a_lost_exchange_and_a_foreign_order_break_the_contract() -> None:
    before, layers = lowered("dedup")
    step, after = Fuse(), fused(before, layers)
    (call,) = experts_calls(after.graph)
    counts = call.args[1]
    call.args = (call.args[0], call.args[0], *call.args[2:])
    with pytest.raises(PassError, match="counts, sources and weights come from"):
        step.ensures(before, after, layers)
    call.args = (call.args[0], counts, *call.args[2:])
    exchange = exchanges_of(after.graph)[-1]
    exchange.replace_all_uses_with(exchange.args[0])
    after.graph.graph.erase_node(exchange)
    with pytest.raises(PassError, match="exchanges were"):
        step.ensures(before, after, layers)


def test_the_plan_decides_and_the_pass_does_it() -> None:
    before, (layer,) = lowered("dedup")
    assert layer.fused
    (left,) = layers = [dataclasses.replace(layer, fused=False)]
    assert text(fused(before, layers).graph) == text(before.graph)
    step, after = Fuse(), fused(before, [layer])
    for graph, planned, message in ((before, layer, "but is not"), (after, left, "is not planned so")):
        with pytest.raises(PassError, match=message):
            step.ensures(before, graph, [planned])
    with pytest.raises(PassError, match="is fused already"):
        step.requires(after, [layer])


def test_what_cannot_be_fused_as_planned_is_an_error() -> None:
    before, (layer,) = lowered("local")
    _, (other,) = lowered("local", UpDown())
    assert not other.fused
    foreign = lowered("local", UpDown())[0]
    with pytest.raises(PassError, match="its experts are not SwiGLU"):
        Fuse().requires(foreign, [layer])
    (call,) = experts_calls(before.graph)
    with before.graph.graph.inserting_after(call):
        between = before.graph.graph.call_function(torch.neg, (call,))
    call.replace_all_uses_with(between, delete_user_cb=lambda user: user is not between)
    with pytest.raises(PassError, match=r"its experts are between permute and \['neg'\]; set fused: false"):
        Fuse().run(before, [layer])


def test_flat_is_not_planned_so_because_each_row_travels_by_itself() -> None:
    before, (layer,) = lowered("flat")
    assert layer.site.swiglu
    assert not layer.fused
    assert text(fused(before, [layer]).graph) == text(before.graph)
    with pytest.raises(
        PlanError, match=r"fused=True: needs SwiGLU experts without biases .*, and a dispatch that is not"
    ):
        dataclasses.replace(layer, fused=True)


def test_one_rank_fuses_what_no_dispatch_forbids() -> None:
    (flat,), (dedup,) = lowered("flat")[1], lowered("dedup")[1]
    assert on_one_rank(flat).fused
    assert on_one_rank(dedup).fused
    assert not on_one_rank(dataclasses.replace(dedup, fused=False)).fused  # decided by hand


class Clamped(Gated):
    """As gpt-oss does it: values beyond a limit are cut off."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x).clamp(max=7.0)) * self.up(x))
        return out


class Dropped(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.dropout(F.silu(self.gate(x)) * self.up(x)))
        return out


@pytest.mark.parametrize("ffn", [UpDown, Clamped, Dropped])
def test_other_activations_stay(ffn: Callable[[], nn.Module]) -> None:
    before, (layer,) = lowered("local", ffn())
    assert not layer.site.swiglu
    assert text(fused(before, [layer]).graph) == text(before.graph)


class Act(nn.Module):
    """`like(gate) * up`."""

    def __init__(self, like: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.like = like

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.like(gate) * up


@pytest.mark.parametrize(
    ("like", "known"),
    [
        (F.silu, True),
        (lambda x: x * torch.sigmoid(x), True),
        (lambda x: x / (1 + torch.exp(-x)), True),
        (F.gelu, False),
        (lambda x: x * torch.sigmoid(1.001 * x), False),
    ],
)
def test_any_spelling_of_swiglu_counts(like: Callable[[Tensor], Tensor], known: bool) -> None:
    assert is_swiglu(Experts(8, 16, 4, gated=True, activation=Act(like))) is known


@pytest.mark.parametrize("biases", [{"bias_up": True}, {"bias_down": True}])
def test_biases_are_not_fused(biases: dict[str, bool]) -> None:
    assert not is_swiglu(Experts(8, 16, 4, gated=True, activation=Act(F.silu), **biases))


def gradients(graph_module: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of its squares for the input and every weight."""
    x = x.clone().requires_grad_()
    out = graph_module(x)
    names, parameters = zip(*graph_module.named_parameters(), strict=True)
    grads = torch.autograd.grad(out.square().sum(), (x, *parameters))
    return dict(zip(("out", "x", *names), (out.detach(), *grads), strict=True))


@pytest.mark.parametrize("overrides", [[], ["routing.capacity_factor=0.5"], ["routing.top_k=1"]])
def test_outputs_and_gradients_are_those_of_the_lowered_graph(overrides: list[str]) -> None:
    ffn = Gated().double()
    (layer,) = plan_for(ffn, [*COPY4, *overrides]).layers
    lowered = passed(only_region(ffn), layer, Rewrite(), Lower())
    after = fused(lowered, [layer])
    randomize(lowered.graph)  # both have the same modules
    x = tokens(40, dtype=torch.float64)
    wanted, got = (gradients(region.graph, x) for region in (lowered, after))
    assert wanted.keys() == got.keys()
    assert {name: max_diff(wanted[name], got[name]) < 1e-12 for name in wanted} == dict.fromkeys(wanted, True)


@pytest.mark.parametrize(("architecture", "is_fused"), [("mixtral", True), ("deepseek_v3", True), ("gpt_oss", False)])
def test_experts_that_a_model_has(architecture: str, is_fused: bool) -> None:
    model = moe_model(architecture)
    names = list(model.state_dict())
    compiled = compile_with_report(model, config(), example=moe_inputs(architecture, ids()))
    for graph in compiled.graphs["fused"].values():
        (call,) = experts_calls(graph)
        assert bool(call.kwargs) is is_fused
    assert {layer.fused for layer in compiled.plan.layers} == {is_fused}
    assert list(compiled.model.state_dict()) == names
