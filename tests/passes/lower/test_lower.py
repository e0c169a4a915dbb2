"""lower in its own notation, and the contract that its result keeps."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import moecompile
from moecompile.errors import PassError
from moecompile.match.regions import Region
from moecompile.passes.base import exchanges_of
from moecompile.passes.lower import Lower
from moecompile.passes.rewrite import Rewrite
from moecompile.plan import DispatchPlan, LayerPlan
from moecompile.report.graphs import listing
from tests.tiny import COPY4, Gated, TinyGPT, UpDown, config, ids, only_region, passed, plan_for, text, tokens, trace

EP2 = [*COPY4, "mesh.ranks_per_node=2"]


def lower(kind: str) -> tuple[Region, Region, LayerPlan]:
    """(rewritten, lowered, layer) of a gated FFN."""
    (layer,) = plan_for(Gated(), COPY4 if kind == "local" else [*EP2, f"dispatch.kind={kind}"]).layers
    rewritten = passed(only_region(Gated()), layer, Rewrite())
    return rewritten, passed(rewritten, layer, Lower()), layer


HEAD = """\
%0 = placeholder x
%1 = moecompile.flatten_tokens(%0)
%2 = router[Router](%0)
%3 = getitem(%2, 0)
%4 = getitem(%2, 1)
"""

BEFORE = f"""\
{HEAD}%5 = moecompile.permute(%1, %4, 4)
%6 = getitem(%5, 0)
%7 = getitem(%5, 1)
%8 = getitem(%5, 2)
%9 = experts[Experts](%6, %8)
%10 = moecompile.unpermute(%9, %7, %3)
%11 = moecompile.unflatten_tokens(%10, %0)
output(%11)
"""

EXPECTED = {
    "local": BEFORE,
    "flat": f"""\
{HEAD}%5 = moecompile.count_experts(%4, 4)
%6 = moecompile.exchange_counts(%5, 'ep')
%7 = getitem(%6, 0)
%8 = getitem(%6, 1)
%9 = moecompile.permute(%1, %4, 4)
%10 = getitem(%9, 0)
%11 = getitem(%9, 1)
%12 = moecompile.all_to_all(%10, %8, -1, False, 'ep')
%13 = moecompile.regroup(%12, %7)
%14 = getitem(%13, 0)
%15 = getitem(%13, 1)
%16 = getitem(%13, 2)
%17 = experts[Experts](%14, %16)
%18 = moecompile.ungroup(%17, %15)
%19 = moecompile.all_to_all(%18, %8, -1, True, 'ep')
%20 = moecompile.unpermute(%19, %11, %3)
%21 = moecompile.unflatten_tokens(%20, %0)
output(%21)
""",
    "dedup": f"""\
{HEAD}%5 = moecompile.count_rows(%4, 4, 2)
%6 = getitem(%5, 0)
%7 = getitem(%5, 1)
%8 = moecompile.exchange_counts(%7, 'ep')
%9 = getitem(%8, 1)
%10 = moecompile.pack_rows(%1, %3, %6, 4, 2, %9)
%11 = getitem(%10, 0)
%12 = getitem(%10, 1)
%13 = getitem(%10, 2)
%14 = getitem(%10, 3)
%15 = moecompile.all_to_all(%11, %9, 0, False, 'ep')
%16 = moecompile.exchange_assignments(%13, %14, %9, 1, 'ep')
%17 = getitem(%16, 0)
%18 = getitem(%16, 1)
%19 = moecompile.expand_rows(%15, %17, %18, 2)
%20 = getitem(%19, 0)
%21 = getitem(%19, 1)
%22 = getitem(%19, 2)
%23 = getitem(%19, 4)
%24 = experts[Experts](%20, %23)
%25 = moecompile.reduce_rows(%24, %21, %22, %15)
%26 = moecompile.all_to_all(%25, %9, 0, True, 'ep')
%27 = moecompile.combine_rows(%26, %12, %1)
%28 = moecompile.unflatten_tokens(%27, %0)
output(%28)
""",
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_before_and_expected_graph(kind: str) -> None:
    before, after, _ = lower(kind)
    assert text(before.graph) == BEFORE
    assert text(after.graph) == EXPECTED[kind]


def test_the_input_keeps_its_graph_and_shares_its_modules() -> None:
    before, after, _ = lower("flat")
    assert text(before.graph) == BEFORE
    assert after.graph.experts is before.graph.experts
    assert after.graph.router is before.graph.router


@pytest.mark.parametrize("kind", ["flat", "dedup"])
def test_a_printed_graph_shows_exactly_the_planned_exchanges(kind: str) -> None:
    """Two layers in one graph: what is printed is what the plan names, in order and on the axis `ep`."""
    model = nn.Sequential(Gated(), UpDown())
    lowered = moecompile.transform(trace(model), config(*EP2, f"dispatch.kind={kind}"))
    plan = moecompile.plan_of(lowered)
    wanted = [(op, "ep") for layer in plan.layers for op in layer.dispatch.exchanges]
    assert len(wanted) == 2 * {"flat": 3, "dedup": 4}[kind]
    exchange = re.compile(r"moecompile\.(exchange_counts|all_to_all|exchange_assignments)\(.*'(\w+)'\)")
    for shown in (listing(lowered), text(lowered)):
        assert [match.groups() for line in shown.splitlines() if (match := exchange.search(line))] == wanted
    exchange = re.compile(r"torch\.ops\.moecompile\.(exchange_counts|all_to_all|exchange_assignments)\(.*'(\w+)'\)")
    assert [match.groups() for line in lowered.code.splitlines() if (match := exchange.search(line))] == wanted


def test_regions_of_a_model_print_their_exchanges() -> None:
    model = TinyGPT()
    moecompile.compile_model(model, config(*EP2, "dispatch.kind=flat"), example=ids())
    for block in model.blocks:
        assert isinstance(block.mlp, fx.GraphModule)
        assert [node.args[-1] for node in exchanges_of(block.mlp)] == ["ep"] * 3
        assert "moecompile.all_to_all" in str(block.mlp.graph)


def test_an_unbound_lowered_graph_does_not_run() -> None:
    _, after, _ = lower("flat")
    with pytest.raises(moecompile.MoecompileError, match="mesh axis 'ep' is not bound to a process group"):
        after.graph(tokens())


# -- contract --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flat", "dedup"])
def test_lowering_twice_is_refused(kind: str) -> None:
    _, after, layer = lower(kind)
    message = f"pass lower, the graph: the graph is lowered already, it holds {list(DispatchPlan(kind=kind).exchanges)}"
    with pytest.raises(PassError, match=re.escape(message)):
        Lower().requires(after, [layer])


def test_a_graph_that_was_not_rewritten_is_refused() -> None:
    _, _, layer = lower("flat")
    with pytest.raises(PassError, match="0 experts calls, planned are 1"):
        Lower().requires(only_region(Gated()), [layer])


def test_an_experts_call_without_its_permute_is_refused() -> None:
    region, _, layer = lower("flat")
    before = region.graph
    (node,) = (n for n in before.graph.nodes if n.name == "unpermute")
    with before.graph.inserting_before(node):
        doubled = before.graph.call_function(torch.mul, (node.args[0], 2))
    node.args = (doubled, *node.args[1:])
    with pytest.raises(PassError, match="experts is not between one permute and one unpermute"):
        Lower().run(region, [layer])


def drop(graph_module: fx.GraphModule, which: Callable[[fx.Node], bool]) -> None:
    """Replaces the first such node by its first argument."""
    node = next(n for n in graph_module.graph.nodes if which(n))
    node.replace_all_uses_with(node.args[0])
    graph_module.graph.erase_node(node)


@pytest.mark.parametrize("kind", ["flat", "dedup"])
@pytest.mark.parametrize("position", [0, 1])
def test_an_exchange_that_was_dropped_by_hand_is_noticed(kind: str, position: int) -> None:
    before, region, layer = lower(kind)
    after = region.graph
    victim = [n for n in exchanges_of(after) if "all_to_all" in n.name][position]
    drop(after, lambda n: n is victim)
    with pytest.raises(PassError, match=r"pass lower, the graph: exchanges are \[.*\], planned are \[.*\]"):
        Lower().ensures(before, region, [layer])


def test_an_exchange_on_another_axis_is_noticed() -> None:
    before, region, layer = lower("flat")
    node = exchanges_of(region.graph)[1]
    node.args = (*node.args[:-1], "dp_shard")
    with pytest.raises(PassError, match=r"\('all_to_all', 'dp_shard'\)"):
        Lower().ensures(before, region, [layer])


def test_a_one_device_permute_that_survives_is_noticed() -> None:
    """The exchanges are all there, but the experts read rows that did not travel."""
    before, region, layer = lower("flat")
    after = region.graph
    (experts,) = (n for n in after.graph.nodes if n.name == "experts")
    (permute,) = (n for n in after.graph.nodes if n.name == "permute")
    rows = next(n for n in permute.users if n.args[1] == 0)
    experts.args = (rows, experts.args[1])
    with pytest.raises(PassError, match="rows reach remote experts without an exchange"):
        Lower().ensures(before, region, [layer])


def test_a_local_plan_allows_no_exchange() -> None:
    before, after, _ = lower("flat")
    _, _, local_layer = lower("local")
    with pytest.raises(PassError, match=r"planned are \[\]"):
        Lower().ensures(before, after, [local_layer])
