"""Finds dense FFNs by dataflow: x -> linear(s) -> pointwise operations -> linear, never by names.

It works on any fx graph: a recorded forward, a traced region, a graph that the user brought.

Algorithm:
  1. Read every linear of the graph, whatever its spelling.
  2. From the input of each linear walk upwards through pointwise operations until only linears are left.
  3. The linears that are found must share one input, and widths must be those of an FFN.
  4. No value and no weight inside may be used outside, or it would be lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeGuard

from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from moecompile.passes.pointwise import describe, is_activation, is_pointwise


@dataclass(frozen=True)
class Linear:
    """One linear in a graph: y = x W^T + b. weight, bias: attribute paths; weight is (d_out, d_in)."""

    node: fx.Node
    x: fx.Node
    weight: str
    bias: str | None
    d_in: int
    d_out: int


@dataclass(frozen=True)
class FFNMatch:
    """A dense FFN in a graph. ins: the linears before the activation, gate first. pointwise: in graph order."""

    ins: tuple[Linear, ...]
    pointwise: tuple[fx.Node, ...]
    down: Linear

    @property
    def kind(self) -> str:
        """`gated` or `up_down`."""
        return "gated" if len(self.ins) == 2 else "up_down"

    @property
    def activation(self) -> str:
        """The pointwise operations in words: `silu, mul`."""
        return describe(self.pointwise)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Every node that the FFN consists of."""
        return (*(linear.node for linear in self.ins), *self.pointwise, self.down.node)


@dataclass(frozen=True)
class NearMiss:
    """What looks like an FFN and is none. weight: attribute path of its last linear."""

    weight: str
    reason: str


class GraphView:
    """A graph and the module that its attribute paths refer to (the traced module, or the recorded model)."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph, self.root = graph, root

    @cached_property
    def linears(self) -> dict[fx.Node, Linear]:
        """Every linear of the graph, in graph order, whatever its spelling."""
        return {node: linear for node in self.graph.nodes if (linear := self._as_linear(node))}

    @cached_property
    def weight_users(self) -> dict[int, list[fx.Node]]:
        """Id of a weight -> the nodes that use it; tied weights have one id."""
        users: dict[int, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                users.setdefault(id(self.tensor(str(node.target))), []).extend(node.users)
            elif node.op == "call_module":
                for parameter in self.module(str(node.target)).parameters():
                    users.setdefault(id(parameter), []).append(node)
        return users

    @cached_property
    def position(self) -> dict[fx.Node, int]:
        """Node -> place in the graph."""
        return {node: i for i, node in enumerate(self.graph.nodes)}

    def module(self, path: str) -> nn.Module:
        """The submodule at `path`."""
        return self.root.get_submodule(path)

    def tensor(self, path: str) -> object:
        """The attribute at `path`."""
        owner, _, name = path.rpartition(".")
        return getattr(self.module(owner), name)

    def _as_linear(self, node: fx.Node) -> Linear | None:
        if node.op == "call_module":
            owner = self.module(str(node.target))
            if type(owner).forward is not nn.Linear.forward or is_parametrized(owner):
                return None
            bias = f"{node.target}.bias" if owner.bias is not None else None
            return self._linear(node, node.all_input_nodes[0], f"{node.target}.weight", bias)
        if node.op != "call_function" or getattr(node.target, "__name__", "") != "linear":
            return None
        names = ("input", "weight", "bias")
        given: dict[str, object] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        x, weight, linear_bias = (given.get(name) for name in names)
        if not _is_attribute(weight) or not isinstance(x, fx.Node):
            return None
        if linear_bias is None:
            return self._linear(node, x, str(weight.target), None)
        return (
            self._linear(node, x, str(weight.target), str(linear_bias.target)) if _is_attribute(linear_bias) else None
        )

    def _linear(self, node: fx.Node, x: fx.Node, weight: str, bias: str | None) -> Linear | None:
        shape = self.tensor(weight).shape  # type: ignore[attr-defined]
        return Linear(node, x, weight, bias, d_in=shape[1], d_out=shape[0]) if len(shape) == 2 else None


def find_ffns(view: GraphView) -> tuple[list[FFNMatch], list[NearMiss]]:
    """All FFNs of a graph in order, each claimed once, and the near misses with their reasons."""
    matches: list[FFNMatch] = []
    misses: list[NearMiss] = []
    seen: set[str] = set()
    claimed: set[fx.Node] = set()
    for down in view.linears.values():  # Step 1
        found = _match(down, view, claimed)
        if found is None or down.weight in seen:
            continue
        seen.add(down.weight)
        if isinstance(found, FFNMatch):
            matches.append(found)
            claimed.update(found.nodes)
        else:
            misses.append(found)
    return matches, misses


def _match(down: Linear, view: GraphView, claimed: set[fx.Node]) -> FFNMatch | NearMiss | None:
    # Step 2
    ins, pointwise, others = _walk_up(down.x, view)
    if not any(is_activation(node, view.module) for node in pointwise):
        return None
    # Step 3
    if reason := _wrong_shape(ins, others, down):
        return NearMiss(down.weight, reason)
    # Step 4
    inside = {*pointwise, *(linear.node for linear in ins)}
    escaping = [n for n in inside for user in n.users if user not in inside and user is not down.node]
    if escaping:
        return NearMiss(down.weight, f"the value of {escaping[0].name} is also used elsewhere")
    if taken := [linear.weight for linear in ins if linear.node in claimed]:
        return NearMiss(down.weight, f"{taken[0]} is the last linear of another FFN")
    if reason := _weight_used_elsewhere((*ins, down), view):
        return NearMiss(down.weight, reason)
    gate_first = sorted(ins, key=lambda linear: not any(is_activation(user, view.module) for user in linear.node.users))
    return FFNMatch(tuple(gate_first), tuple(sorted(pointwise, key=view.position.__getitem__)), down)


def _weight_used_elsewhere(linears: tuple[Linear, ...], view: GraphView) -> str | None:
    """Experts would replace one use of the weight and not the other. A module that is called again is the same use."""
    inside = {linear.node for linear in linears}
    owners = {linear.node.meta.get("owner", linear.node) for linear in linears}
    for linear in linears:
        for path in filter(None, (linear.weight, linear.bias)):
            for user in view.weight_users[id(view.tensor(path))]:
                if user not in inside and user.meta.get("owner") not in owners:
                    return f"its weight {path} is also used by {user.meta.get('owner') or user.name}"
    return None


def _wrong_shape(ins: list[Linear], others: list[fx.Node], down: Linear) -> str | None:
    if not ins:
        return f"the activation depends on {others[0].name if others else 'constants'}, not on a linear"
    first = ins[0]
    rules = (
        (bool(others), f"the activation also depends on {others[0].name if others else ''}"),
        (len(ins) > 2, f"{len(ins)} linears feed the activation, at most 2 are supported"),
        (any(linear.x is not first.x for linear in ins), "the linears before the activation have different inputs"),
        (any(linear.d_out != down.d_in for linear in ins), "the activation changes the width"),
        (first.d_in != down.d_out, f"width in is {first.d_in} but width out is {down.d_out}"),
        (2 * down.d_in < down.d_out, f"a bottleneck of {down.d_in} in {down.d_out} is an adapter, not an FFN"),
    )
    return next((reason for broken, reason in rules if broken), None)


def _walk_up(start: fx.Node, view: GraphView) -> tuple[list[Linear], set[fx.Node], list[fx.Node]]:
    """(linears, pointwise nodes, other nodes) that `start` depends on, stopping at the first that is not pointwise."""
    ins: dict[fx.Node, Linear] = {}
    pointwise: set[fx.Node] = set()
    others: list[fx.Node] = []
    stack = [start]
    while stack:
        node = stack.pop()
        if node in pointwise or node in ins:
            continue
        if node in view.linears:
            ins[node] = view.linears[node]
        elif is_pointwise(node, view.module):
            pointwise.add(node)
            stack.extend(node.all_input_nodes)
        else:
            others.append(node)
    return sorted(ins.values(), key=lambda linear: view.position[linear.node]), pointwise, others


def _is_attribute(value: object) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node) and value.op == "get_attr"
