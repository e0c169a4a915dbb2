"""Types refuse what is wrong in a lowered graph, by themselves and without ranks, and nothing that is right."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

import moecompile
from moecompile.errors import ConfigError, PassError
from moecompile.match.regions import Region
from moecompile.mesh import MeshSpec
from moecompile.passes.base import GraphPass, exchanges_of, experts_calls, op_name
from moecompile.passes.delay_gradients import DelayWeightGradients
from moecompile.passes.fuse import Fuse
from moecompile.passes.lend import Lend
from moecompile.passes.lower import Lower
from moecompile.passes.overlap import Overlap
from moecompile.passes.place import Place
from moecompile.passes.rewrite import Rewrite
from moecompile.passes.shard import bind_axes, device_mesh_of
from moecompile.passes.split_tokens import SplitTokens
from moecompile.passes.types import ROWS, SHOWN, Typed, check_types, register_type, sums_outside
from moecompile.plan import LayerPlan, plan, reductions
from tests.distributed import dispatch_job as job
from tests.distributed.dispatch_job import Case
from tests.tiny import COPY4, Gated, config, fake_rank, only_region, passed, plan_for, trace
from tests.verify import test_certify, test_context

ops = torch.ops.moecompile
TWO = [*COPY4, "experts.num_shared=1", "mesh.ranks_per_node=2"]
FOUR = [*COPY4, "experts.num_shared=1", "mesh.num_nodes=2", "mesh.ranks_per_node=2"]
LENDS = ["dispatch.balance=lend", "dispatch.slots=2"]
CHUNKS = ["dispatch.overlap=chunks", "dispatch.chunks=2"]
GRAPHS = {
    "local": COPY4,
    "flat": [*TWO, "dispatch.kind=flat"],
    "dedup": [*TWO, "dispatch.kind=dedup"],
    "hierarchical": [*FOUR, "dispatch.kind=hierarchical"],
    "allgather": [*FOUR, "dispatch.kind=allgather"],
    "bf16": [*TWO, "dispatch.kind=dedup", "dispatch.wire_dtype=bf16"],
    "eight bits": [*TWO, "dispatch.kind=dedup", "dispatch.wire_dtype=fp8"],
    "eight bits in chunks": [*TWO, "dispatch.kind=dedup", "dispatch.wire_dtype=fp8", *CHUNKS],
    "flat in chunks": [*TWO, "dispatch.kind=flat", *CHUNKS],
    "in chunks": [*TWO, "dispatch.kind=dedup", *CHUNKS],
    "two levels in chunks": [*FOUR, "dispatch.kind=hierarchical", *CHUNKS],
    "lends": [*COPY4, "mesh.ranks_per_node=2", "dispatch.kind=dedup", *LENDS],
    "cut": [*COPY4, "experts.num_shared=1", "mesh.ranks_per_node=4", "dispatch.kind=dedup"],
    "placed": [*TWO, "dispatch.kind=dedup"],
}
"""Overrides of small graphs; those whose name is in FUSED too."""
STEPS: tuple[GraphPass, ...] = (Rewrite(), SplitTokens(), Place(), Lower(), Lend(), Overlap(), DelayWeightGradients())


def graph_of(name: str) -> tuple[Region, LayerPlan]:
    """`dedup`, or `dedup, fused`."""
    kind, _, fused = name.partition(", ")
    (layer,) = plan_for(Gated(), GRAPHS[kind]).layers
    if kind == "cut":
        layer = dataclasses.replace(layer, cut_over=("tp",))
    if kind == "placed":
        layer = dataclasses.replace(layer, placement=dataclasses.replace(layer.placement, order=(2, 0, 3, 1)))
    layer = dataclasses.replace(layer, fused=bool(fused))
    return passed(only_region(Gated()), layer, *STEPS, *((Fuse(),) if fused else ())), layer


def named(graph: fx.Graph, op: str, which: int = 0) -> fx.Node:
    return [node for node in graph.nodes if op_name(node) == op][which]


def item(node: fx.Node, index: int) -> fx.Node:
    return next(user for user in node.users if user.target is operator.getitem and user.args[1] == index)


def drop(op: str, which: int = 0, argument: int = 0) -> Callable[[fx.Graph], None]:
    def change(graph: fx.Graph) -> None:
        node = named(graph, op, which)
        node.replace_all_uses_with(node.args[argument])

    return change


def set_keywords(op: str, which: int = 0, **keywords: str) -> Callable[[fx.Graph], None]:
    def change(graph: fx.Graph) -> None:
        named(graph, op, which).kwargs = keywords

    return change


def set_argument(op: str, index: int, value: object, which: int = 0) -> Callable[[fx.Graph], None]:
    def change(graph: fx.Graph) -> None:
        node = named(graph, op, which)
        given = value(graph) if callable(value) else value
        node.update_arg(index % len(node.args), given)

    return change


def before(
    op: str, index: int, make: Callable[[fx.Graph, fx.Node], fx.Node], which: int = 0
) -> Callable[[fx.Graph], None]:
    """Changes what an op is given."""

    def change(graph: fx.Graph) -> None:
        node = named(graph, op, which)
        with graph.inserting_before(node):
            made = make(graph, node.args[index])  # type: ignore[arg-type]
        node.update_arg(index, made)

    return change


def call(target: Callable[..., object], *more: object) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    return lambda graph, node: graph.call_function(target, (node, *more))


def of(op: str, index: int, which: int = 0) -> Callable[[fx.Graph], fx.Node]:
    return lambda graph: item(named(graph, op, which), index)


def argument(op: str, index: int, which: int = 0) -> Callable[[fx.Graph], fx.Node]:
    return lambda graph: named(graph, op, which).args[index]  # type: ignore[return-value]


def permuted_rows_to_experts(graph: fx.Graph) -> None:
    named(graph, "experts").update_arg(0, item(named(graph, "permute"), 0))


def counts_are_rows(graph: fx.Graph) -> None:
    named(graph, "experts").update_arg(1, named(graph, "experts").args[0])


def swap_directions(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if op_name(node) == "all_to_all":
            node.update_arg(3, not node.args[3])


def on_another_axis(graph: fx.Graph) -> None:
    for node in exchanges_of(graph.owning_module):
        node.args = (*node.args[:-1], "dp_shard")


def levels_swapped(graph: fx.Graph) -> None:
    other = {"ep_inter": "ep_intra", "ep_intra": "ep_inter"}
    for node in graph.nodes:
        if node.args and node.args[-1] in other:
            node.args = (*node.args[:-1], other[node.args[-1]])


def start_lost(graph: fx.Graph) -> None:
    start = named(graph, "all_to_all_start", 1)
    for user in list(start.users):
        user.replace_all_uses_with(start.args[0])
        graph.erase_node(user)
    graph.erase_node(start)


def wait_left_out(graph: fx.Graph) -> None:
    wait = named(graph, "all_to_all_wait")
    wait.replace_all_uses_with(wait.args[0].args[0].args[0])  # type: ignore[union-attr]
    graph.erase_node(wait)


def token_read(graph: fx.Graph) -> None:
    wait = named(graph, "all_to_all_wait")
    with graph.inserting_before(wait):
        graph.call_function(torch.neg, (wait.args[0],))


def counts_lost(graph: fx.Graph) -> None:
    exchange = exchanges_of(graph.owning_module)[0]
    for user in list(exchange.users):
        user.replace_all_uses_with(exchange.args[0])
        graph.erase_node(user)
    graph.erase_node(exchange)


def summed_twice(graph: fx.Graph) -> None:
    combine = named(graph, "combine_rows")
    with graph.inserting_after(combine):
        again = graph.call_function(ops.combine_rows, (combine, *combine.args[1:]))
    combine.replace_all_uses_with(again, lambda user: user is not again)


def scattered_twice(graph: fx.Graph) -> None:
    scatter = named(graph, "reduce_scatter")
    with graph.inserting_after(scatter):
        again = graph.call_function(ops.reduce_scatter, (scatter, scatter.args[-1]))
    scatter.replace_all_uses_with(again, lambda user: user is not again)


def weighted_twice(graph: fx.Graph) -> None:
    """The routing weights are applied to each row, and again in the sum."""
    reduce = named(graph, "reduce_rows")
    with graph.inserting_before(reduce):
        rows = graph.call_function(torch.mul, (reduce.args[0], reduce.args[1]))
    reduce.update_arg(0, rows)


def not_weighted(graph: fx.Graph) -> None:
    """The outputs are summed as they are."""
    reduce = named(graph, "reduce_rows")
    with graph.inserting_before(reduce):
        summed = graph.call_function(ops.sum_rows, (reduce.args[0], reduce.args[2], 4))
    reduce.replace_all_uses_with(summed)


def experts_left_out(graph: fx.Graph) -> None:
    experts = named(graph, "experts")
    experts.replace_all_uses_with(experts.args[0])


def borrowed_left_out(graph: fx.Graph) -> None:
    named(graph, "experts").kwargs = {}


def borrowed_swapped(graph: fx.Graph) -> None:
    experts = named(graph, "experts")
    experts.kwargs = {**experts.kwargs, "borrowed": list(reversed(experts.kwargs["borrowed"]))}  # type: ignore[arg-type]


def weights_for_loans(graph: fx.Graph) -> None:
    """Own experts are taken for borrowed ones."""
    own = [node for node in graph.nodes if op_name(node) == "local_experts"]
    named(graph, "experts").kwargs = {"borrowed": own}


def residual_in_parts(graph: fx.Graph) -> None:
    """What every rank adds to its part is added once for each rank."""
    before("all_to_all", 0, lambda g, node: g.call_function(torch.add, (node, named(g, "all_to_all"))), 1)(graph)


def chunks_swapped(op: str, index: int) -> Callable[[fx.Graph], None]:
    def change(graph: fx.Graph) -> None:
        one, other = named(graph, op, 0), named(graph, op, 1)
        first, second = one.args[index], other.args[index]
        one.update_arg(index, second)
        other.update_arg(index, first)

    return change


def cat_reversed(graph: fx.Graph) -> None:
    cat = named(graph, "cat")
    cat.args = (list(reversed(cat.args[0])),)  # type: ignore[arg-type]


def one_chunk_lost(graph: fx.Graph) -> None:
    cat = named(graph, "cat")
    cat.replace_all_uses_with(cat.args[0][0])  # type: ignore[index]


def item_that_is_not_there(graph: fx.Graph) -> None:
    item(named(graph, "router"), 1).update_arg(1, 3)


def shared_experts_on_all_tokens(graph: fx.Graph) -> None:
    """Their output is added after the join; each rank of the TP group would sum the same gradient."""
    shared = named(graph, "shared_experts")
    shared.args = (named(graph, "flatten_tokens"),)


MUTATIONS: dict[str, tuple[str, Callable[[fx.Graph], None]]] = {
    # from tests/passes
    "lower: no dispatch (flat)": ("flat", drop("all_to_all")),
    "lower: no combine (flat)": ("flat", drop("all_to_all", 1)),
    "lower: no dispatch (dedup)": ("dedup", drop("all_to_all")),
    "lower: no combine (dedup)": ("dedup", drop("all_to_all", 1)),
    "lower: an exchange on another axis": ("flat", set_argument("all_to_all", -1, "dp_shard")),
    "lower: rows of this rank's permute": ("flat", permuted_rows_to_experts),
    "fuse: counts of a foreign order": ("dedup, fused", counts_are_rows),
    "fuse: no combine": ("dedup, fused", drop("all_to_all", 1)),
    "overlap: no start": ("in chunks", start_lost),
    "overlap: no wait": ("in chunks", wait_left_out),
    "overlap: a token is read": ("in chunks", token_read),
    "delay: no exchange of counts": ("in chunks", counts_lost),
    "split: whole ids": ("cut", set_argument("count_rows", 0, of("router", 1))),
    "split: no join": ("cut", drop("join_tokens")),
    "lend: no borrowed experts": ("lends", borrowed_left_out),
    # more
    "dispatch and combine swapped": ("dedup", swap_directions),
    "all exchanges on an axis that owns no experts": ("dedup", on_another_axis),
    "levels swapped": ("hierarchical", levels_swapped),
    "one level left out": ("hierarchical", drop("all_to_all", 1)),
    "second combine left out": ("hierarchical", drop("combine_rows", 0)),
    "partial sums are not summed": ("dedup", drop("combine_rows")),
    "partial sums are summed twice": ("dedup", summed_twice),
    "sums are scattered twice": ("allgather", scattered_twice),
    "sums are not scattered": ("allgather", drop("reduce_scatter")),
    "a level is not gathered": ("allgather", drop("all_gather")),
    "assignments stay": ("allgather", set_argument("take_local", 1, of("pad_tokens", 1))),
    "routing weights twice": ("dedup", weighted_twice),
    "no routing weights": ("dedup", not_weighted),
    "an item that is not there": ("dedup", item_that_is_not_there),
    "routing weights of the sender": ("dedup", set_argument("reduce_rows", 1, of("pack_rows", 2))),
    "experts left out": ("dedup", experts_left_out),
    "order for source": ("dedup", set_argument("reduce_rows", 2, lambda graph: _made(graph, "expand_rows", 3))),
    "source of the receiver": ("dedup", set_argument("combine_rows", 1, of("expand_rows", 2))),
    "rows of assignments": ("dedup", set_argument("all_to_all", 2, 1)),
    "experts of one rank": ("dedup", set_argument("expand_rows", 3, 4)),
    "ranks of one node": ("dedup", set_argument("pack_rows", 4, 1)),
    "table of the first level": ("hierarchical", set_argument("pack_rows", 5, of("read_tables", 0), 1)),
    "a nonlinear function of partial sums": ("dedup", before("all_to_all", 0, call(torch.relu), 1)),
    "values added to partial sums": ("dedup", residual_in_parts),
    "partial sums returned": ("dedup", set_argument("unflatten_tokens", 0, argument("combine_rows", 0))),
    "no regroup": ("flat", set_argument("experts", 0, argument("regroup", 0))),
    "no ungroup": ("flat", drop("ungroup")),
    "counts of this rank": ("flat", set_argument("regroup", 1, argument("exchange_counts", 0))),
    "order of the receiver": ("flat", set_argument("unpermute", 1, of("regroup", 1))),
    "rows in more digits": ("eight bits", set_keywords("all_to_all")),
    "sums in eight bits": ("eight bits", set_keywords("all_to_all", 1, narrow="fp8", narrow_gradient="fp8")),
    "another format": ("eight bits", set_keywords("all_to_all", narrow="fp8_128")),
    "a format that is not planned": ("dedup", set_keywords("all_to_all", narrow="fp8")),
    "a wait in another format": ("eight bits in chunks", set_keywords("all_to_all_wait")),
    "rows not cast back": ("bf16", drop("wire_uncast")),
    "rows not cast": ("bf16", drop("wire_cast")),
    "rows cast back to what they are": ("bf16", set_argument("wire_uncast", 1, argument("wire_uncast", 0))),
    "tables of chunks swapped": ("in chunks", chunks_swapped("all_to_all_start", 1)),
    "orders of chunks swapped": ("flat in chunks", chunks_swapped("unpermute", 1)),
    "routing weights of chunks swapped": ("flat in chunks", chunks_swapped("unpermute", 2)),
    "counts of chunks swapped": ("two levels in chunks", chunks_swapped("onward_counts", 0)),
    "tickets swapped": ("in chunks", chunks_swapped("all_to_all_wait", 1)),
    "a token for its ticket": ("in chunks", set_argument("all_to_all_wait", 1, of("all_to_all_start", 0))),
    "a ticket for tokens": ("in chunks", set_argument("shared_experts", 0, of("exchange_assignments_start", 1))),
    "chunks in another order": ("in chunks", cat_reversed),
    "a chunk lost": ("in chunks", one_chunk_lost),
    "own experts for borrowed ones": ("lends", weights_for_loans),
    "borrowed weights swapped": ("lends", borrowed_swapped),
    "the first one of this rank's experts": ("lends", before("local_experts", 0, call(ops.local_experts, 2))),
    "ids for slots": ("lends", set_argument("count_rows", 0, argument("to_slots", 0))),
    "ids for positions": ("placed", drop("place_ids")),
    "placed twice": ("placed", before("count_rows", 0, call(ops.place_ids, [2, 0, 3, 1]))),
    "tokens not cut": ("cut", set_argument("pack_rows", 0, lambda graph: named(graph, "flatten_tokens"))),
    "shared experts on all tokens": ("cut", shared_experts_on_all_tokens),
    "an average over ranks": ("dedup", before("unflatten_tokens", 0, call(ops.sum_ranks, "ep"))),
    "a router without gradient": ("dedup", before("pack_rows", 1, call(torch.ops.aten.detach.default))),
    "experts without gradient": ("dedup", before("unflatten_tokens", 0, call(torch.ops.aten.detach.default))),
}  # fmt: skip


def _made(graph: fx.Graph, op: str, index: int) -> fx.Node:
    """An output that nothing reads yet."""
    node = named(graph, op)
    with graph.inserting_after(node):
        return graph.call_function(operator.getitem, (node, index))


def _scaled(graph: fx.Graph) -> None:
    before("unpermute", 0, call(torch.mul, 2.0))(graph)


def _another_order(graph: fx.Graph) -> None:
    """What a start gives is the same; ranks agree, for the graph is the same everywhere."""
    one, other = named(graph, "all_to_all_start", 0), named(graph, "all_to_all_start", 1)
    table = named(graph, "all_to_all_wait")
    table.prepend(one)
    for user in list(one.users):
        table.prepend(user)
    assert other is not one


def _token_forgotten(graph: fx.Graph) -> None:
    experts = experts_calls(graph.owning_module)[1]
    experts.kwargs = {key: value for key, value in experts.kwargs.items() if key != "grad_token"}


def _two_tokens(graph: fx.Graph) -> None:
    token = named(graph, "grad_token")
    with graph.inserting_after(token):
        graph.node_copy(token)


def _token_early(graph: fx.Graph) -> None:
    token, source = named(graph, "grad_token"), named(graph, "flatten_tokens")
    for node in (token, *token.all_input_nodes):
        source.append(node)


def _another_placement(graph: fx.Graph) -> None:
    set_argument("place_ids", 1, [0, 1, 3, 2])(graph)


UNSEEN: dict[str, tuple[str, Callable[[fx.Graph], None], str]] = {
    "lower: outputs doubled": ("flat", _scaled, "a number: what is scaled holds the same, at the same place"),
    "overlap: another order": ("in chunks", _another_order, "an order of nodes in which every value is the same"),
    "delay: a chunk without the token": ("in chunks", _token_forgotten, "its gradients are right, and later"),
    "delay: two tokens": ("in chunks", _two_tokens, "nothing reads the second one"),
    "delay: too early": ("in chunks", _token_early, "an order of nodes"),
    "place: another placement": ("placed", _another_placement, "numbers: any list of positions is a placement"),
}
"""Mutations that types do not refuse, and why. `requires` and `ensures` of the passes refuse those of tests/passes."""


OF_VERIFY = {
    **dict.fromkeys(
        ("expert_gradients_times_ep", "divided_by_own_tokens", "norm_of_one_rank", "loads_counted_twice", "loads_of_one_rank",
         "idle_experts_without_gradient", "aux_loss_not_flowing", "aux_loss_times_ep", "cp_gradients_divided_twice",
         "auxiliary_losses_by_own_tokens", "bias_not_moved"), "the strategy, after backward"),
    **dict.fromkeys(("muon_of_a_shard", "groups_forgotten"), "the optimizer"),
    **dict.fromkeys(("experts_swapped", "experts_of_rank_0_everywhere"), "what a rank stores"),
    **dict.fromkeys(
        ("experts_lost_in_checkpoint", "experts_of_rank_0_in_checkpoint", "moments_lost_in_checkpoint",
         "moments_of_experts_not_loaded"), "what a checkpoint stores"),
    **dict.fromkeys(("same_batch_on_peers", "targets_shifted_within_a_rank"), "what a rank reads"),
    "loads_counted_again_in_recomputation": "when a meter counts",
    "router_not_summed": "the strategy; that the plan sums it follows from types",
}  # fmt: skip
"""The mutations of `task=verify`'s tests, and what each changes: none changes a graph."""


def test_no_mutation_of_verify_changes_a_graph() -> None:
    """A new one that does belongs to MUTATIONS or UNSEEN."""
    assert {mutation.__name__ for mutation in (*test_certify.MUTATIONS, *test_context.MUTATIONS)} == set(OF_VERIFY)


def test_the_page_has_the_numbers() -> None:
    page = (Path(__file__).parents[2] / "docs" / "understand" / "types.md").read_text(encoding="utf-8")
    assert f"in {len(MUTATIONS)} ways" in page
    assert f"None of the {len(OF_VERIFY)} mutations" in page
    assert "Six others" in page
    assert "six wrong tables" in page
    assert len(UNSEEN) == len(WRONG) == 6


@pytest.fixture(scope="module")
def graphs() -> Iterator[Callable[[str], tuple[Region, LayerPlan]]]:
    """Each small graph is made once, and copied."""
    made: dict[str, tuple[Region, LayerPlan]] = {}

    def copied(name: str) -> tuple[Region, LayerPlan]:
        if name not in made:
            made[name] = graph_of(name)
        region, layer = made[name]
        graph = fx.Graph()
        graph.output(graph.graph_copy(region.graph.graph, {}))
        return region.with_graph(fx.GraphModule(region.graph, graph)), layer

    yield copied


Graphs = Callable[[str], tuple[Region, LayerPlan]]
FUSED = ("local", "dedup", "hierarchical", "allgather", "in chunks", "lends", "cut", "placed")


@pytest.mark.parametrize("name", [*GRAPHS, *(f"{name}, fused" for name in FUSED)])
def test_what_is_right_has_types(graphs: Graphs, name: str) -> None:
    region, layer = graphs(name)
    check_types("test", region, [layer])
    shown = {op_name(node): node.meta[SHOWN] for node in region.graph.graph.nodes}
    assert shown["x"] == f"values at its token{', the same over tp' * (name.startswith('cut'))}"


@pytest.mark.parametrize("name", MUTATIONS)
def test_types_alone_refuse(graphs: Graphs, name: str) -> None:
    kind, change = MUTATIONS[name]
    region, layer = graphs(kind)
    check_types("test", region, [layer])
    change(region.graph.graph)
    with pytest.raises(PassError, match="types do not fit: "):
        check_types("test", region, [layer])


@pytest.mark.parametrize("name", UNSEEN)
def test_what_types_do_not_see(graphs: Graphs, name: str) -> None:
    kind, change, _ = UNSEEN[name]
    region, layer = graphs(kind)
    shown = str(region.graph.graph)
    change(region.graph.graph)
    assert str(region.graph.graph) != shown
    check_types("test", region, [layer])  # if this refuses it, the mutation belongs to MUTATIONS


# -- every kind of dispatch, and back ends ---------------------------------------------------------------------------

MESHES = (MeshSpec(num_nodes=2, ranks_per_node=2, ep=4), MeshSpec(ranks_per_node=2, ep=2))
VARIANTS: dict[str, dict[str, object]] = {
    "as it is": {},
    "drops": {"routing": "drops"},
    "in chunks": {"chunks": 3},
    "in flight": {"chunks": 1, "wire_dtype": "bf16"},
    "in eight bits": {"wire_dtype": "fp8"},
    "in eight bits, in flight": {"chunks": 2, "wire_dtype": "fp8_128"},
    "placed": {"placed": True, "chunks": 2},
    "lends": {"slots": 2, "loan_rows": (1, 1), "placed": True},
    "lends in chunks": {"slots": 1, "chunks": 2, "routing": "drops"},
    "back end": {"backend": "tests.backends:in_flight", "wire_dtype": "bf16", "routing": "drops"},
    "back end in chunks": {"backend": "tests.backends:in_flight", "chunks": 2, "slots": 1},
    "experts elsewhere": {"experts_backend": "tests.backends:one_by_one"},
}
CANNOT = {("flat", "experts elsewhere"), *(("flat", name) for name in VARIANTS if name.startswith("back"))}
CANNOT |= {("allgather", name) for name in VARIANTS if name not in ("as it is", "drops", "experts elsewhere")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_dispatch_has_types(variant: str) -> None:
    options = dict(VARIANTS[variant])
    is_placed = options.pop("placed", False)
    for mesh in MESHES:
        for kind in job.kinds_on(mesh):
            if (kind, variant) in CANNOT:
                continue
            order = tuple(reversed(range(2 * mesh.ep))) if is_placed else ()
            case = Case(kind=kind, mesh=mesh, experts_per_rank=2, top_k=2, tokens=(3,) * 4, order=order, **options)  # type: ignore[arg-type]
            graph = job.lowered(case, 0)
            check_types("test", Region(path="", graph=graph, module=graph, matches={}), [case.layer()])


# -- two layers in one graph -----------------------------------------------------------------------------------------


def _other_table(graph: fx.Graph) -> None:
    named(graph, "all_to_all", 2).update_arg(1, named(graph, "all_to_all", 0).args[1])


def _other_counts(graph: fx.Graph) -> None:
    named(graph, "regroup", 1).update_arg(1, named(graph, "regroup", 0).args[1])


def _other_order(graph: fx.Graph) -> None:
    named(graph, "unpermute", 1).update_arg(1, named(graph, "unpermute", 0).args[1])


def _other_weights(graph: fx.Graph) -> None:
    named(graph, "unpermute", 1).update_arg(2, named(graph, "unpermute", 0).args[2])


def _other_ids(graph: fx.Graph) -> None:
    named(graph, "permute", 1).update_arg(1, named(graph, "permute", 0).args[1])


@pytest.mark.parametrize("change", [_other_table, _other_counts, _other_order, _other_weights, _other_ids])
def test_what_is_of_another_layer_does_not_fit(change: Callable[[fx.Graph], None]) -> None:
    """All of these have the right shapes, where the layers choose alike."""
    overrides = config(*COPY4, "mesh.ranks_per_node=2", "dispatch.kind=flat")
    graph = moecompile.transform(trace(nn.Sequential(Gated(), Gated())), overrides)
    region, layers = Region(path="", graph=graph, module=graph, matches={}), moecompile.plan_of(graph).layers
    check_types("test", region, layers)
    change(graph.graph)
    with pytest.raises(PassError, match=r"of _(0|1)_router.* of _(?!\1)[01]_router"):
        check_types("test", region, layers)


def test_layers_of_one_graph_have_settings_of_their_own() -> None:
    """Their numbers of experts may differ, and what `fp8_if_faster` and `auto` choose for each."""
    late = '+per_layer.late={match: "1", experts: {num_routed: 8}}'
    overrides = [*COPY4, "mesh.ranks_per_node=2", "dispatch.kind=dedup", "dispatch.wire_dtype=fp8", *LENDS, late]
    graph = moecompile.transform(trace(nn.Sequential(Gated(), Gated())), overrides)
    first, last = moecompile.plan_of(graph).layers
    assert (first.placement.experts_per_rank, last.placement.experts_per_rank) == (2, 4)
    region = Region(path="", graph=graph, module=graph, matches={})
    wide = dataclasses.replace(first, dispatch=dataclasses.replace(first.dispatch, wire_dtype="auto"))
    with pytest.raises(PassError, match="for rows on the wire, where none is planned"):
        check_types("test", region, [wide, last])
    for which in range(2):
        set_keywords("all_to_all", which)(graph.graph)
    check_types("test", region, [wide, last])
    with pytest.raises(PassError, match="has no format for rows on the wire"):
        check_types("test", region, [first, last])


# -- backward --------------------------------------------------------------------------------------------------------


def _with_gradients(side: str) -> list[str]:
    """The patterns of what has gradients, in terms of any packing."""
    found = [word.strip().removesuffix("?") for word in side.split(",")]
    kinds = ("values", "outputs", "partial sums", "rows")
    return [word.replace("/p", "/q").replace("/o", "/q").replace("Y", "X") for word in found if word.startswith(kinds)]


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.runs in ROWS])
def test_the_dual_of_a_row_is_the_row_that_autograd_runs(name: str) -> None:
    """`combine` for a dispatch: what is typed as its backward is what the op that autograd runs takes and gives."""
    row = ROWS[name]
    for mine, its in zip(row.backward.split("->"), ROWS[row.runs].forward.split("->"), strict=True):
        theirs, wanted = (
            _with_gradients(its),
            _with_gradients(mine.replace("X/q/s", "X") if name == "regroup" else mine),
        )
        if not wanted:  # routing weights alone, which travel as one column
            continue
        holds = theirs[0].split()[0]
        assert len(theirs) == len(wanted) == 1
        assert theirs[0].split()[-1] == wanted[0].split()[-1]
        assert holds == "rows" or theirs[0].rsplit(" ", 1)[0] == wanted[0].rsplit(" ", 1)[0]


class _Ops(TorchDispatchMode):
    """Names of our ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(op).startswith("moecompile"):
            is_back = str(op).startswith("moecompile.all_to_all.") and args[3]
            self.seen.append(op.name().split("::")[1] + ", reversed" * is_back)
        return op(*args, **(kwargs or {}))


def _cut_and_joined(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, axis: str) -> torch.Tensor:
    own, own_weights, _ = ops.cut_tokens(x, weights, ids, axis)
    out: torch.Tensor = ops.join_tokens(own * own_weights.sum(1, keepdim=True), x, axis)
    return ops.join_columns(ops.cut_columns(out[:, :4], axis), axis)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [*job.KINDS, "slices"])
def test_autograd_runs_what_the_table_says(kind: str) -> None:
    """On a rank of others that do not exist, without values."""
    case = Case(
        kind="dedup" if kind == "slices" else kind, mesh=MESHES[0], experts_per_rank=2, top_k=2, tokens=(8,) * 4
    )
    graph = job.lowered(case, 0)
    with fake_rank(0, 4):
        device_mesh = device_mesh_of(case.mesh, "cpu")
        bind_axes(graph, device_mesh)
        run = functools.partial(_cut_and_joined, axis=device_mesh.get_group("ep").group_name)
        with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode:
            x, weights = (mode.from_tensor(tensor.requires_grad_()) for tensor in case.inputs(0)[:2])
            with _Ops() as log:
                out = (run if kind == "slices" else graph)(x, mode.from_tensor(case.ids(0)), weights)
                forward, log.seen = log.seen, []
                out.sum().backward()
    expected = Counter(row.runs for name in forward if (row := ROWS.get(name)) and row.runs and row.runs != "combine")
    assert expected
    assert expected <= Counter(log.seen)


# -- sums of gradients -----------------------------------------------------------------------------------------------

GIVEN = (
    MeshSpec(),
    MeshSpec(ranks_per_node=4),
    MeshSpec(ranks_per_node=4, ep=4),
    MeshSpec(ranks_per_node=4, ep=2),
    MeshSpec(num_nodes=2, ranks_per_node=4, ep=2, dp_replicate=2),
    MeshSpec(num_nodes=2, ranks_per_node=4, ep=8),
    MeshSpec(ranks_per_node=4, tp=2, ep=4),
    MeshSpec(ranks_per_node=4, tp=2, ep=2),
    MeshSpec(ranks_per_node=4, tp=2),
    MeshSpec(num_nodes=2, ranks_per_node=4, tp=2, ep=2, dp_replicate=2),
    MeshSpec(ranks_per_node=4, cp=2, ep=4),
    MeshSpec(num_nodes=2, ranks_per_node=4, cp=4, ep=2),
    MeshSpec(num_nodes=256, ranks_per_node=8, ep=64),
    MeshSpec(num_nodes=256, ranks_per_node=8, ep=64, tp=4, dp_replicate=4),
)


def differing(mesh: MeshSpec, typed: Typed, cut_over: tuple[str, ...]) -> list[str]:
    """Classes of weights whose gradients the plan does not sum over the axes that types say."""
    wanted = dict(typed.sums().values()) | sums_outside(cut_over)
    planned = {each.parameters: each.sum_over for each in reductions(mesh)}
    assert set(wanted) == set(planned)
    return [kind for kind, axes in wanted.items() if planned[kind] != mesh.axes(*axes)]


@pytest.mark.parametrize("mesh", GIVEN, ids=lambda mesh: mesh.setting("dp_replicate", "dp_shard", "cp", "tp", "ep"))
def test_the_planned_reductions_follow_from_types(graphs: Graphs, mesh: MeshSpec) -> None:
    """At any number of ranks: a type knows axes, not sizes."""
    kind = "cut" if mesh.tp > 1 else "dedup"
    region, layer = graphs(kind)
    assert differing(mesh, Typed(region.graph, [layer]), layer.cut_over) == []


WRONG = {
    "routers are not summed": ("router", {"split": ()}),
    "routers are summed over tp": ("router", {"split": (*plan._TOKENS, plan.Part.TOKENS)}),
    "shared experts are not summed over tp": ("inside MoE layers", {"split": plan._TOKENS}),
    "norms of heads are not summed over tp": ("norms of heads", {"split": plan._TOKENS}),
    "experts are summed over ep": ("experts", {"split": (*plan._TOKENS, plan.Part.EXPERTS), "owned": ()}),
    "experts are not summed over edp": ("experts", {"split": plan._TOKENS}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_reductions_are_seen(graphs: Graphs, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind, change = WRONG[name]
    classes = tuple(dataclasses.replace(each, **change) if each.name == kind else each for each in plan._CLASSES)
    monkeypatch.setattr(plan, "_CLASSES", classes)
    region, layer = graphs("cut")
    mesh = MeshSpec(num_nodes=2, ranks_per_node=4, tp=2, ep=2)
    found = differing(mesh, Typed(region.graph, [layer]), layer.cut_over)
    assert found == [kind]


# -- a user's op -----------------------------------------------------------------------------------------------------


def smoothed(rows: torch.Tensor) -> torch.Tensor:
    """Mixes rows, so it is not pointwise."""
    return rows.softmax(0)


def _with_smoothed(region: Region) -> Region:
    before("pack_rows", 0, call(smoothed))(region.graph.graph)
    before("combine_rows", 0, call(smoothed))(region.graph.graph)
    return region


def test_an_op_without_a_rule_may_read_tokens_alone(graphs: Graphs) -> None:
    region, layer = graphs("dedup")
    with pytest.raises(PassError, match=r"smoothed_1 \(smoothed\) has no rule \(moecompile.register_type\)"):
        check_types("mine", _with_smoothed(region), [layer])


def test_a_rule_can_be_given(graphs: Graphs) -> None:
    region, layer = graphs("dedup")
    region = _with_smoothed(region)
    with register_type(smoothed, "rows X -> rows X", "rows X -> rows X"):
        check_types("mine", region, [layer])
        with pytest.raises(ConfigError, match="op=smoothed: has a rule already"):
            register_type(smoothed, "rows X -> rows X")
    with (
        register_type(smoothed, "values X -> values X"),
        pytest.raises(PassError, match="takes as input values at its token, and is given partial sums"),
    ):
        check_types("mine", region, [layer])
    for rule in ("values X", "apples X -> values X", "values x -> values X"):
        with pytest.raises(ConfigError, match="must be like"):
            register_type(smoothed, rule)
