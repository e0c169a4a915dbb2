"""fold in its own notation: where tokens are cut and joined, and the contract of the result."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from moecompile.errors import PassError, PlanError
from moecompile.match.regions import Region
from moecompile.passes.base import experts_calls, op_name
from moecompile.passes.fuse import Fuse
from moecompile.passes.lower import Lower
from moecompile.passes.overlap import Overlap
from moecompile.passes.rewrite import Rewrite
from moecompile.passes.split_tokens import SplitTokens
from moecompile.plan import LayerPlan
from tests.tiny import COPY4, Gated, only_region, passed, plan_for, text

SHARED = [*COPY4, "experts.num_shared=1", "mesh.ranks_per_node=4", "dispatch.kind=dedup"]


def cut(*overrides: str) -> LayerPlan:
    """The plan of a gated FFN, with tokens cut over tp (a module without a tp_plan cannot be planned so)."""
    (layer,) = plan_for(Gated(), [*SHARED, *overrides]).layers
    return dataclasses.replace(layer, cut_over=("tp",))


def folded(*overrides: str) -> tuple[Region, Region, LayerPlan]:
    layer = cut(*overrides)
    rewritten = passed(only_region(Gated()), layer, Rewrite())
    return rewritten, passed(rewritten, layer, SplitTokens()), layer


FOLDED = """\
%0 = placeholder x
%1 = moecompile.flatten_tokens(%0)
%2 = router[Router](%0)
%3 = getitem(%2, 0)
%4 = getitem(%2, 1)
%5 = moecompile.cut_tokens(%1, %3, %4, 'tp')
%6 = getitem(%5, 0)
%7 = getitem(%5, 1)
%8 = getitem(%5, 2)
%9 = shared_experts[SharedExperts](%6)
%10 = moecompile.permute(%6, %8, 4)
%11 = getitem(%10, 0)
%12 = getitem(%10, 1)
%13 = getitem(%10, 2)
%14 = experts[Experts](%11, %13)
%15 = moecompile.unpermute(%14, %12, %7)
%16 = aten.add.Tensor(%15, %9)
%17 = moecompile.join_tokens(%16, %1, 'tp')
%18 = moecompile.unflatten_tokens(%17, %0)
output(%18)
"""


def test_tokens_are_cut_after_the_router_and_joined_after_the_sum() -> None:
    _, after, _ = folded()
    assert text(after.graph) == FOLDED


def test_padding_of_shared_experts_is_masked_in_the_sum() -> None:
    _, after, _ = folded("data.mask_padding=always")
    names = [op_name(node) for node in after.graph.graph.nodes]
    assert names[-5:] == ["add", "join_tokens", "unflatten_tokens", "mask_rows", "output"]


def test_without_the_axis_nothing_changes() -> None:
    layer = dataclasses.replace(cut(), cut_over=())
    rewritten = passed(only_region(Gated()), layer, Rewrite())
    assert passed(rewritten, layer, SplitTokens()) is rewritten


@pytest.mark.parametrize(
    "overrides", [(), ("dispatch.overlap=shared",), ("dispatch.overlap=chunks", "dispatch.chunks=2")]
)
def test_the_passes_after_it_work_on_the_slices(overrides: tuple[str, ...]) -> None:
    _, after, layer = folded(*overrides)
    final = passed(after, layer, Lower(), Overlap(), Fuse())
    names = [op_name(node) for node in final.graph.graph.nodes]
    assert names.count("cut_tokens") == names.count("join_tokens") == 1
    between = names[names.index("cut_tokens") : names.index("join_tokens")]
    assert {"exchange_counts", "experts", "shared_experts"} <= set(between)


def test_a_dispatch_that_reads_whole_tokens_is_refused() -> None:
    before, after, layer = folded()
    (call,) = experts_calls(after.graph)
    permute = call.args[0].args[0]  # type: ignore[union-attr]
    ids = next(node for node in after.graph.graph.nodes if node.name == "ids")
    permute.args = (permute.args[0], ids, *permute.args[2:])
    rule = "pass fold, graph: the dispatch reads ['ids'], which are not cut"
    with pytest.raises(PassError, match=re.escape(rule.split(": ", 1)[1])):
        SplitTokens().ensures(before, after, [layer])


def test_a_missing_join_is_refused() -> None:
    before, after, layer = folded()
    join = next(node for node in after.graph.graph.nodes if op_name(node) == "join_tokens")
    join.replace_all_uses_with(join.args[0])
    after.graph.graph.erase_node(join)
    with pytest.raises(PassError, match=re.escape("cuts and joins are [('cut_tokens', 'tp')], planned are")):
        SplitTokens().ensures(before, after, [layer])


def test_it_runs_once() -> None:
    _, after, layer = folded()
    with pytest.raises(PassError, match="tokens are cut already"):
        SplitTokens().requires(after, [layer])


def test_an_axis_that_is_not_bound_is_an_error() -> None:
    _, after, _ = folded()
    with pytest.raises(Exception, match="mesh axis 'tp' is not bound to a process group"):
        after.graph(torch.randn(2, 3, 8))


def test_another_axis_cannot_be_planned() -> None:
    with pytest.raises(PlanError, match=re.escape("cut_over=[ep]: must be [] or [tp]")):
        dataclasses.replace(cut(), cut_over=("ep",))
