"""Finds dense FFNs by dataflow: x -> linear(s) -> pointwise operations -> linear, never by names.

It works on any fx graph: a recorded forward, a traced region, a graph from the user. Users register patterns for FFNs
that the compiler does not know.

Algorithm:
  1. Read every linear of the graph, however it is written.
  2. From the input of each linear, walk up through pointwise operations and norms until only linears are left.
  3. These linears must share one input, and the widths must be those of an FFN.
  4. Values and weights inside must not be used outside, because the rewrite removes them.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import fx
from torch.utils.hooks import RemovableHandle

from moecompile.errors import ConfigError
from moecompile.match.linears import GraphView, Linear, is_attribute
from moecompile.match.pointwise import (
    describe,
    is_activation,
    is_activation_beside_norms,
    is_norm,
    is_pointwise,
    torch_name,
)

# -- a match, and patterns of users ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FFNMatch:
    """A dense FFN in a graph.

    Attributes:
        ins: the linears before the activation, gate first.
        pointwise: the nodes between them and the last linear, in graph order.
        down: the last linear.
        asks: nodes that query sizes and dtypes inside and whose results are used only inside.
        whole: whether the pointwise nodes need all hidden units of a token at once (a norm), so that experts cannot be
            slices of the FFN.
    """

    ins: tuple[Linear, ...]
    pointwise: tuple[fx.Node, ...]
    down: Linear
    asks: tuple[fx.Node, ...] = ()
    whole: bool = False

    @property
    def kind(self) -> str:
        """`gated` or `up_down`."""
        return "gated" if len(self.ins) == 2 else "up_down"

    @property
    def activation(self) -> str:
        """Names of the pointwise operations: `silu, mul`."""
        return describe(self.pointwise)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes of the FFN."""
        ins = dict.fromkeys(node for linear in self.ins for node in linear.nodes)  # rows of one linear share its nodes
        return (*ins, *self.pointwise, *self.down.reads, *self.down.nodes, *self.asks)


@dataclass(frozen=True)
class NearMiss:
    """Something that looks like an FFN but cannot be rewritten. weight: attribute path of its last linear."""

    weight: str
    reason: str


def activation_module(root: fx.GraphModule, match: FFNMatch) -> fx.GraphModule:
    """The pointwise operations of a match as a separate module with one argument per linear, gate first."""
    graph = fx.Graph()
    names = ("gate", "up") if match.kind == "gated" else ("up",)
    env = {linear.node: graph.placeholder(name) for linear, name in zip(match.ins, names, strict=True)}

    def copied(node: fx.Node) -> fx.Node:
        if node not in env and node.op == "get_attr":  # a parameter of the activation: the experts share it
            env[node] = graph.get_attr(str(node.target))
        return env[node]

    for node in match.pointwise:
        env[node] = graph.node_copy(node, copied)
    graph.output(env[match.down.x])
    activation = fx.GraphModule(root, graph, class_name="Activation")
    return copy.deepcopy(activation)


Pattern = Callable[[Linear, GraphView], FFNMatch | None]
_patterns: OrderedDict[int, Pattern] = OrderedDict()


def register_pattern(pattern: Pattern) -> RemovableHandle:
    """Makes the compiler look for one more form of FFN.

    Args:
        pattern: called with every linear of a graph and the graph's `GraphView`. Returns the FFN that ends there, or
            None. The nodes between the linears may be anything that maps each token independently of the others.

    Returns:
        A handle; `handle.remove()`, or the end of a `with handle:`, unregisters the pattern.

    Raises:
        ConfigError: the pattern is registered already.
    """
    if pattern in _patterns.values():
        raise ConfigError("pattern", getattr(pattern, "__name__", pattern), "is registered already", "Remove one")
    handle = RemovableHandle(_patterns)
    _patterns[handle.id] = pattern
    return handle


# -- the search --------------------------------------------------------------------------------------------------------


def find_ffns(view: GraphView) -> tuple[list[FFNMatch], list[NearMiss]]:
    """All FFNs of a graph in order, each with nodes of its own, and the near misses with their reasons."""
    matches: list[FFNMatch] = []
    misses: list[NearMiss] = []
    seen: set[str] = set()
    claimed: set[fx.Node] = set()
    for down in view.linears.values():  # Step 1
        if down.rows is not None or down.weight in seen:
            continue
        match = _by_registered_patterns(down, view) or _by_walking_up(down, view)
        if isinstance(match, FFNMatch):
            match = _checked(match, view, claimed)
        if match is None:
            continue
        seen.add(down.weight)
        if isinstance(match, FFNMatch):
            matches.append(match)
            claimed.update(match.nodes)
        else:
            misses.append(match)
    return matches, misses


def _by_registered_patterns(down: Linear, view: GraphView) -> FFNMatch | None:
    return next((match for pattern in tuple(_patterns.values()) if (match := pattern(down, view))), None)


def _by_walking_up(down: Linear, view: GraphView) -> FFNMatch | NearMiss | None:
    # Step 2
    ins, pointwise, others = _walk_up(down.x, down.d_in, view)
    normed = any(is_norm(node, view.module) for node in pointwise)
    is_one = is_activation_beside_norms if normed else is_activation
    if not any(is_one(node, view.module) for node in pointwise):
        return None
    # Step 3
    if reason := _wrong_inputs(ins, others):
        return NearMiss(down.weight, reason)
    gate_first = sorted(ins, key=lambda linear: not any(is_activation(user, view.module) for user in linear.node.users))
    return FFNMatch(tuple(gate_first), tuple(pointwise), down)


def _checked(match: FFNMatch, view: GraphView, claimed: set[fx.Node]) -> FFNMatch | NearMiss:
    """The match, however it was found, if its widths fit and nothing inside is used outside; else a near miss."""
    ins, down = match.ins, match.down
    if reason := _wrong_shape(ins, down) or _unread_rows(ins, view):  # Step 3
        return NearMiss(down.weight, reason)
    # Step 4
    inside = {*match.pointwise, *down.reads, *(node for linear in (*ins, down) for node in linear.nodes)}
    asks = _size_queries(inside, view)
    escaping = {n for n in inside - {down.node} for user in n.users if user not in inside and user not in asks}
    if escaping:
        first = min(escaping, key=view.position.__getitem__)
        return NearMiss(down.weight, f"the value of {first.name} is also used elsewhere")
    if taken := [linear.weight for linear in ins if claimed.intersection(linear.nodes)]:
        return NearMiss(down.weight, f"{taken[0]} is the last linear of another FFN")
    if reason := _weight_used_elsewhere(match, view):
        return NearMiss(down.weight, reason)
    in_order = tuple(sorted(match.pointwise, key=view.position.__getitem__))
    learned = {node for between in in_order for node in between.all_input_nodes if is_attribute(node)}
    whole = not all(is_pointwise(node, view.module) for node in in_order)
    whole = whole or any(_shape(node, view) not in ((), (1,)) for node in learned)
    return replace(match, pointwise=in_order, asks=tuple(sorted(asks, key=view.position.__getitem__)), whole=whole)


def _weight_used_elsewhere(match: FFNMatch, view: GraphView) -> str | None:
    """Experts would replace only one of two uses of a weight. Repeated calls of a module count as one use."""
    linears = (*match.ins, match.down)
    inside = {*match.pointwise, *(node for linear in linears for node in linear.nodes)}
    owners = {node.meta.get("owner", node) for node in inside}
    learned = [str(n.target) for node in match.pointwise for n in node.all_input_nodes if is_attribute(n)]
    for path in filter(None, [*(path for linear in linears for path in (linear.weight, linear.bias)), *learned]):
        for user in view.weight_users[id(view.tensor(path))]:
            if user not in inside and view.name(user) not in _QUERIES and user.meta.get("owner") not in owners:
                return f"its weight {path} is also used by {user.meta.get('owner') or user.name}"
    return None


def _shape(node: fx.Node, view: GraphView) -> tuple[int, ...] | None:
    shape = getattr(view.tensor(str(node.target)), "shape", None)
    return None if shape is None else tuple(shape)


def _wrong_inputs(ins: list[Linear], others: list[fx.Node]) -> str | None:
    if not ins:
        return f"the activation depends on {others[0].name if others else 'constants'}, not on a linear"
    if others:
        return f"the activation also depends on {others[0].name}"
    return f"{len(ins)} linears feed the activation, at most 2 are supported" if len(ins) > 2 else None


def _wrong_shape(ins: Sequence[Linear], down: Linear) -> str | None:
    first = ins[0]
    rules = (
        (any(linear.x is not first.x for linear in ins), "the linears before the activation have different inputs"),
        (any(linear.d_out != down.d_in for linear in ins), "the activation changes the width"),
        (first.d_in != down.d_out, f"width in is {first.d_in} but width out is {down.d_out}"),
        (2 * down.d_in < down.d_out, f"a bottleneck of {down.d_in} in {down.d_out} is an adapter, not an FFN"),
    )
    return next((reason for broken, reason in rules if broken), None)


def _unread_rows(ins: Sequence[Linear], view: GraphView) -> str | None:
    """Unused rows of a linear would be lost; rows that are read twice would become separate copies."""
    for weight in {linear.weight for linear in ins if linear.rows is not None}:
        rows = [linear.rows.indices(2**40) for linear in ins if linear.weight == weight and linear.rows is not None]
        read = sorted(i for limits in rows for i in range(*limits))
        stored = next(linear for linear in ins if linear.weight == weight)
        whole = view.tensor(weight).shape[int(stored.transposed)]  # type: ignore[attr-defined]
        if read != list(range(whole)):
            return f"the activation does not read every row of {weight} exactly once"
    return None


def _size_queries(inside: set[fx.Node], view: GraphView) -> set[fx.Node]:
    """Nodes that query sizes or dtypes inside, and all nodes computed from the results, if these stay inside."""
    queries: set[fx.Node] = set()
    for node in inside:
        for user in node.users:
            if user not in inside and torch_name(user, view.module) in _QUERIES:
                queries |= _dependents(user, inside) or set()
    return queries


_QUERIES = frozenset(("size", "shape", "dim", "ndim", "numel", "dtype", "device"))


def _dependents(query: fx.Node, inside: set[fx.Node]) -> set[fx.Node] | None:
    """`query` and every node that depends on it up to nodes inside; None if one of them is the graph's output."""
    dependents, stack = set[fx.Node](), [query]
    while stack:
        node = stack.pop()
        if node.op == "output":
            return None
        if node not in dependents and node not in inside:
            dependents.add(node)
            stack.extend(node.users)
    return dependents


def _walk_up(start: fx.Node, start_width: int, view: GraphView) -> tuple[list[Linear], set[fx.Node], list[fx.Node]]:
    """(linears, pointwise nodes, other nodes) that `start` depends on; the walk stops at the linears and the others."""
    ins: dict[fx.Node, Linear] = {}
    pointwise: set[fx.Node] = set()
    others: list[fx.Node] = []
    stack = [start]
    while stack:
        node = stack.pop()
        if node in pointwise or node in ins:
            continue
        if is_attribute(node) and _shape(node, view) in ((), (1,), (start_width,)):
            continue  # a parameter of the activation: a scalar, or one value per hidden unit
        if node in view.linears:
            ins[node] = view.linears[node]
        elif is_pointwise(node, view.module) or is_norm(node, view.module):
            pointwise.add(node)
            stack.extend(node.all_input_nodes)
        else:
            others.append(node)
    return sorted(ins.values(), key=lambda linear: view.position[linear.node]), pointwise, others
