"""overlap: exchanges start early and are waited for late, for parts of the tokens one after the other.

While one chunk's rows are on the wire, the experts compute another one's. Routing has happened before, on the whole
micro-batch, so capacity, losses and loads do not change. Backward mirrors the order (moecompile.ops.in_flight).

Algorithm, for each experts call that the plan overlaps, with n chunks:
  1. The dispatch is what depends on the expert ids and leads to the combined output. It is copied for n parts of the
     tokens, and their outputs are concatenated.
  2. The counts of all chunks are sent in one message, and each chunk reads its part of the one table.
  3. Each exchange of rows becomes a start and a wait.
  4. A stage ends where a wait begins. Chunk c does stage s in slot s + c, the latest chunk first. The shared experts
     run after slot 0, before the first wait.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moecompile.errors import PassError
from moecompile.match.regions import Region
from moecompile.nn import SharedExperts
from moecompile.ops.backend import CALLS
from moecompile.passes.base import LayerPass, all_after, all_before, argument, exchanges_of, items, op_name, reached
from moecompile.plan import EXCHANGE_OPS, EXCHANGES, HALVES, START_OPS, WAIT_OPS, LayerPlan

ops = torch.ops.moecompile
_WAIT_OF = dict(HALVES.values())
_Copies = dict[fx.Node, fx.Node]


@dataclass(frozen=True, kw_only=True)
class Overlap(LayerPass):
    """The plan says which layers, and into how many chunks."""

    name: str = "overlap"
    stage: str = "overlapped"
    detail: str = "exchanges in flight while experts compute"

    def requires(self, region: Region, layers: Sequence[LayerPlan]) -> None:
        """One experts call a layer, and no exchange that is started already."""
        super().requires(region, layers)
        if started := [node.name for node in exchanges_of(region.graph) if op_name(node) in START_OPS]:
            raise PassError(self.name, layers[0].site.fqn, f"exchanges are started already: {started}")

    def wants(self, layer: LayerPlan) -> bool:
        """Layers whose exchanges are in flight."""
        return layer.dispatch.in_flight

    def change(self, graph_module: fx.GraphModule, calls: list[fx.Node], layer: LayerPlan) -> None:
        """Steps 1 to 4."""
        _overlap(graph_module, calls[0], layer)

    def ensures(self, before: Region, after: Region, layers: Sequence[LayerPlan]) -> None:
        """The planned exchanges in the planned order; each start has one wait, and no other reader."""
        self.has_exchanges(after, layers, [step for layer in layers for step in layer.scheduled_steps])
        for node in exchanges_of(after.graph):
            if (wait := _WAIT_OF.get(op_name(node))) is not None:
                readers = list(dict.fromkeys(user for item in node.users for user in item.users))
                if len(node.users) != 2 or [op_name(reader) for reader in readers] != [wait]:
                    rule = f"{node.name} is read by {[reader.name for reader in readers]}, one {wait} is meant"
                    raise PassError(self.name, layers[0].site.fqn, rule)


def _overlap(graph_module: fx.GraphModule, call: fx.Node, layer: LayerPlan) -> None:
    graph, num_chunks = graph_module.graph, layer.dispatch.chunks
    dispatch, combined = _dispatch(graph, call, layer)
    end = combined.next
    with graph.inserting_before(end):
        # Step 1
        copies = _copies(graph, dispatch, num_chunks)
        chunk_of = {node: chunk for chunk, made in enumerate(copies) for node in made.values()}
        outputs = [made[combined] for made in copies]
        # Step 2
        if num_chunks > 1:
            _join_counts(graph, dispatch, copies, layer)
        result = outputs[0] if num_chunks == 1 else graph.call_function(torch.ops.aten.cat.default, (outputs,))
    # Step 3
    for node, chunk in list(chunk_of.items()):
        if op_name(node) in HALVES:
            halves = _in_halves(graph, node)
            chunk_of.update(dict.fromkeys(halves, chunk))
            result = halves[-1] if node is result else result  # the sum of a back end is an exchange itself
    combined.replace_all_uses_with(result)
    # Step 4
    made = list(itertools.takewhile(lambda node: node is not end, _following(combined)))
    _schedule(made, chunk_of, _shared_experts(graph_module, result), result, end)
    _after_counts(call, next(node for node in _following(combined) if op_name(node) in START_OPS))
    for node in reversed(dispatch):
        graph.erase_node(node)


def _after_counts(call: fx.Node, first_start: fx.Node) -> None:
    """Borrowed experts are sent after the counts, so that the host waits for the device once."""
    borrowed = [node for node in call.all_input_nodes if _holds_experts(node) and node.op != "get_attr"]
    for node in dict.fromkeys(source for item in borrowed for source in (*item.all_input_nodes, item)):
        first_start.prepend(node)


def _following(node: fx.Node) -> Iterator[fx.Node]:
    while True:
        node = node.next
        yield node


def _sends(node: fx.Node) -> bool:
    """Of two levels, the first sum is sent on."""
    return op_name(node) in EXCHANGE_OPS or op_name(node) == "wire_cast"


def _dispatch(graph: fx.Graph, call: fx.Node, layer: LayerPlan) -> tuple[list[fx.Node], fx.Node]:
    """What depends on the expert ids and leads to the combined output, in graph order, and this output."""
    row = layer.dispatch.row
    ends = (node for node in all_after([call]) if op_name(node) == row.ends)
    combined = next((node for node in ends if not any(_sends(user) for user in node.users)), None)
    if combined is None:
        raise ValueError(f"no {row.ends} follows {call.name}")
    before = set(all_before([combined]))
    begins = [node for node in graph.nodes if node in before and op_name(node) == row.begins][-1]
    ids = argument(begins, "ids_TK")
    assert ids is not None and isinstance(ids[1], fx.Node)
    after = set(all_after([ids[1]])) - {ids[1]}
    dispatch = [node for node in graph.nodes if node in before and node in after]
    inside = set(dispatch)
    for node in dispatch:
        outside = [user.name for user in node.users if user not in inside]
        if outside and node is not combined:
            raise ValueError(f"{node.name} is a part of the dispatch that {outside} read too: it cannot be overlapped")
    return dispatch, combined


def _copies(graph: fx.Graph, dispatch: Sequence[fx.Node], num_chunks: int) -> list[_Copies]:
    """For each chunk: node of the dispatch -> its copy, which reads the chunk's part of the tokens."""
    inside = set(dispatch)
    sources = dict.fromkeys(
        n for node in dispatch for n in node.all_input_nodes if n not in inside and not _holds_experts(n)
    )
    parts: dict[fx.Node, tuple[fx.Node, ...]] = {source: (source,) for source in sources}
    if num_chunks > 1:
        for source in sources:
            split = graph.call_function(ops.split_tokens, (source, num_chunks))
            parts[source] = items(graph, split, *(f"{source.name}_{i}" for i in range(num_chunks)))
    copies = []
    for chunk in range(num_chunks):
        known = {source: part[chunk] for source, part in parts.items()}
        made: _Copies = {}
        for node in dispatch:
            made[node] = graph.node_copy(node, functools.partial(_known, made | known))
        copies.append(made)
    return copies


def _holds_experts(node: fx.Node) -> bool:
    """Whether it is weights, which all chunks read, not something of each token."""
    return node.op == "get_attr" or any(op_name(source) == "lend_experts" for source in node.all_input_nodes)


def _known(known: _Copies, node: fx.Node) -> fx.Node:
    return known.get(node, node)


class _Joined:
    """Counts of all chunks side by side, and which part of them is whose."""

    def __init__(self, graph: fx.Graph, copies: Sequence[_Copies]) -> None:
        self.graph, self.copies = graph, copies
        self.known: dict[tuple[Any, ...], fx.Node] = {}

    def of(self, parts: Sequence[Any], num_ranks: int) -> fx.Node:
        """One chunk's counts each -> the counts of all."""
        key = tuple(parts)
        if key not in self.known:
            self.known[key] = self.graph.call_function(ops.join_counts, (list(parts), num_ranks))
        return self.known[key]

    def share(self, node: fx.Node, whole: fx.Node) -> None:
        """Each copy of `node` becomes its chunk's part of `whole`."""
        parts = []
        for chunk, made in enumerate(self.copies):
            part = self.graph.call_function(ops.counts_of_chunk, (whole, chunk, len(self.copies)))
            made[node].replace_all_uses_with(part)
            parts.append(part)
        self.known[tuple(parts)] = whole


def _join_counts(graph: fx.Graph, dispatch: Sequence[fx.Node], copies: Sequence[_Copies], layer: LayerPlan) -> None:
    """One message and one table for the counts of all chunks. Their own are left without readers."""
    axis, ep, nodes = layer.dispatch.axis, layer.placement.ep, layer.placement.nodes
    num_ranks = {axis: ep, f"{axis}_inter": nodes, f"{axis}_intra": ep // nodes}
    joined = _Joined(graph, copies)
    for node in dispatch:
        arguments = list(zip(*(made[node].args for made in copies), strict=True))
        if node.target in (ops.exchange_counts, ops.send_counts):
            counts = joined.of(arguments[0], num_ranks[str(node.args[-1])])
            whole = graph.call_function(node.target, (counts, node.args[-1]))
        elif node.target is ops.read_tables:
            sizes = (nodes, nodes, ep // nodes, ep // nodes)  # of the first hop and of the second, sent and received
            whole = graph.call_function(node.target, tuple(map(joined.of, arguments, sizes)))
        else:
            continue
        if node.target is ops.send_counts:
            joined.share(node, whole)
        else:
            for item in node.users:
                joined.share(item, graph.call_function(operator.getitem, (whole, item.args[1])))


def _in_halves(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """A start and a wait in the place of an exchange."""
    start, wait = (CALLS.get(name) or getattr(ops, name) for name in HALVES[op_name(node)])
    inputs = EXCHANGES[op_name(node)].inputs
    with graph.inserting_before(node):
        started = graph.call_function(start, node.args, node.kwargs)
        token, ticket = items(graph, started, "token", "ticket")
        landed = graph.call_function(wait, (token, ticket, *node.args[inputs:]), node.kwargs)
    node.replace_all_uses_with(landed)
    graph.erase_node(node)
    return [started, token, ticket, landed]


def _shared_experts(graph_module: fx.GraphModule, result: fx.Node) -> fx.Node | None:
    """The call of the shared experts whose output is added to that of the routed ones."""
    # At most latent_up, the sum with identity experts, unflatten_tokens and the sum that is looked for.
    after = all_after([result])[:5]
    for node in (other for user in after for other in user.all_input_nodes):
        if node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), SharedExperts):
            return node
    return None


def _schedule(
    made: Sequence[fx.Node], chunk_of: Mapping[fx.Node, int], shared: fx.Node | None, result: fx.Node, end: fx.Node
) -> None:
    """Puts the nodes that were made in order, in front of `end`."""
    inside, place = set(made), {node: i for i, node in enumerate(made)}

    def sources(node: fx.Node) -> list[fx.Node]:
        return [source for source in node.all_input_nodes if source in inside]

    @functools.cache
    def depth(node: fx.Node, *, of_waits: bool) -> int:
        """Nodes, or waits, on the longest way to this one."""
        counts = not of_waits or op_name(node) in WAIT_OPS
        return max((depth(source, of_waits=of_waits) for source in sources(node)), default=0) + counts

    joined = [node for node in made if node not in chunk_of and node is not result]
    first = set(reached(joined, sources))

    def key(node: fx.Node) -> tuple[float, int, int]:
        if node in first:
            return -1, depth(node, of_waits=False), place[node]
        if node is result:
            return math.inf, 0, 0
        return depth(node, of_waits=True) + chunk_of[node], -chunk_of[node], place[node]

    order = sorted(made, key=key)
    if shared is not None:
        order.insert(next(i for i, node in enumerate(order) if op_name(node) in WAIT_OPS), shared)
    for node in order:
        end.prepend(node)
