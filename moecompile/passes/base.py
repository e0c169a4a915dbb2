"""What all passes share: their two kinds, the base of the built-in ones, the registry of user passes, graph queries."""

from __future__ import annotations

import inspect
import itertools
import operator
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.utils.hooks import RemovableHandle

from moecompile.errors import ConfigError, PassError
from moecompile.match.regions import Region
from moecompile.nn.experts import RowExperts
from moecompile.plan import EXCHANGE_OPS, LOOKUP_OPS, SLICE_OPS, WAIT_OPS, LayerPlan, Plan


class GraphPass(Protocol):
    """A pass over one region of a model, ours or a user's.

    layers: those of this region, in graph order. Two attributes are optional: `detail`, a line for the record, and
    `stage`, the name of the graph after this pass (`rewritten`, `lowered`).
    """

    @property
    def name(self) -> str:
        """What records and errors call it."""

    def requires(self, region: Region, layers: Sequence[LayerPlan]) -> None:
        """Raises PassError unless the region meets the preconditions of `run`."""

    def run(self, region: Region, layers: Sequence[LayerPlan]) -> Region:
        """Returns the region with a new graph (`region.with_graph`); the graph of the input is not changed."""

    def ensures(self, before: Region, after: Region, layers: Sequence[LayerPlan]) -> None:
        """Raises PassError unless the result meets the postconditions."""


class ModelPass(Protocol):
    """A pass over a whole compiled model, which it changes in place. A built-in one defines what it needs of this."""

    @property
    def name(self) -> str:
        """What records and errors call it."""

    def wants(self, plan: Plan) -> bool:
        """Whether the plan asks for it."""
        return True

    def requires(self, model: nn.Module, plan: Plan) -> None:
        """Raises PassError or PlanError unless the model meets the preconditions of `run`."""
        return

    def run(self, model: nn.Module, plan: Plan) -> None:
        """Changes the model in place."""

    def ensures(self, model: nn.Module, plan: Plan) -> None:
        """Raises PassError unless the model meets the postconditions."""
        return


def run_on_model(steps: Sequence[ModelPass], model: nn.Module, plan: Plan) -> None:
    """Runs passes over a whole model in turn and checks the contract of each before and after it runs."""
    for step in steps:
        if step.wants(plan):
            step.requires(model, plan)
            step.run(model, plan)
            step.ensures(model, plan)


@dataclass(frozen=True, kw_only=True)
class LayerPass:
    """A built-in pass that changes the graph around the experts calls of each layer that is planned so.

    A subclass says which layers (`wants`), what to change in a copy of the graph (`change`), and what holds before and
    after (`requires`, `ensures`). Where it wants no layer, the region stays as it is.
    """

    name: str
    stage: str
    detail: str

    def wants(self, layer: LayerPlan) -> bool:
        """Whether the plan asks for it in this layer."""
        raise NotImplementedError

    def change(self, graph_module: GraphModule, calls: list[Node], layer: LayerPlan) -> None:
        """Changes the graph in place.

        Args:
            calls: the experts calls of the layer: one, or after `overlap` one for each chunk.

        Raises:
            ValueError: the graph around a call is not what the pass knows.
        """
        raise NotImplementedError

    def requires(self, region: Region, layers: Sequence[LayerPlan]) -> None:
        """The planned experts calls, in the order of the layers."""
        self.calls(region, layers)

    def run(self, region: Region, layers: Sequence[LayerPlan]) -> Region:
        """A new graph over the same modules."""
        if not any(self.wants(layer) for layer in layers):
            return region
        new, _ = copy_graph_module(region.graph)
        for layer, calls in paired(new, layers, self.calls_of):
            if self.wants(layer):
                try:
                    self.change(new, calls, layer)
                except ValueError as error:
                    raise PassError(self.name, layer.site.fqn, str(error)) from error
        erase_unused(new.graph)
        new.recompile()
        return region.with_graph(new)

    def calls(self, region: Region, layers: Sequence[LayerPlan]) -> list[tuple[LayerPlan, list[Node]]]:
        """Each layer with its experts calls.

        Raises:
            PassError: there are more or fewer calls than planned.
        """
        return check_calls(self.name, region, layers, self.calls_of)

    def calls_of(self, layer: LayerPlan) -> int:
        """How many experts calls a layer has where the pass runs."""
        return 1

    def ensures(self, before: Region, after: Region, layers: Sequence[LayerPlan]) -> None:
        """The same exchanges in the same order."""
        old, new = (on_axes(exchanges_of(region.graph)) for region in (before, after))
        if old != new:
            raise PassError(self.name, layers[0].site.fqn, f"exchanges were {old}, are {new}")

    def has_exchanges(self, after: Region, layers: Sequence[LayerPlan], planned: Sequence[tuple[str, str]]) -> None:
        """Raises PassError unless the graph has exactly these exchanges (op, axis), in this order."""
        there = on_axes(exchanges_of(after.graph))
        if there != list(planned):
            raise PassError(self.name, layers[0].site.fqn, f"exchanges are {there}, planned are {list(planned)}")


GRAD_TOKEN = "grad_token"  # method of experts and keyword of their calls: the token of their weight gradients
_PLACES = ("rewrite", "lower")
_registered: OrderedDict[int, tuple[str, GraphPass]] = OrderedDict()


def register_pass(graph_pass: GraphPass, *, after: str) -> RemovableHandle:
    """Runs a pass over every region that is compiled from now on, and checks its contract before and after.

    Args:
        after: `rewrite` (the graph runs on one device) or `lower` (it has the exchanges).

    Returns:
        A handle, as from `register_pattern`.

    Raises:
        ConfigError: another value of `after`, or a pass of the same name runs there.
    """
    if after not in _PLACES:
        raise ConfigError("after", after, "must be rewrite or lower", "Use one of these")
    if (after, graph_pass.name) in [(place, each.name) for place, each in _registered.values()]:
        rule = f"there is a pass of this name after {after} already"
        raise ConfigError("graph_pass", graph_pass.name, rule, "Give it another name, or remove the other one")
    handle = RemovableHandle(_registered)
    _registered[handle.id] = (after, graph_pass)
    return handle


def registered(after: str) -> tuple[GraphPass, ...]:
    """The user passes that run after a built-in one, in order of registration."""
    return tuple(graph_pass for place, graph_pass in _registered.values() if place == after)


def copy_graph_module(graph_module: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A new GraphModule that shares the modules, and a map from each node to its copy."""
    graph, copies = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(graph_module.graph, copies))
    return GraphModule(graph_module, graph, class_name=type(graph_module).__name__), copies


def experts_calls(graph_module: GraphModule) -> list[Node]:
    """Calls of experts modules on rows, in graph order."""
    calls = (node for node in graph_module.graph.nodes if node.op == "call_module")
    return [node for node in calls if isinstance(graph_module.get_submodule(str(node.target)), RowExperts)]


def collecting_calls(graph_module: GraphModule) -> list[Node]:
    """Calls of experts' method that makes the token of their weight gradients (moecompile.ops.collect)."""
    return [node for node in graph_module.graph.nodes if node.op == "call_method" and node.target == GRAD_TOKEN]


def exchanges_of(graph_module: GraphModule) -> list[Node]:
    """Exchange nodes, in graph order."""
    return [n for n in graph_module.graph.nodes if n.op == "call_function" and op_name(n) in EXCHANGE_OPS]


def on_an_axis(graph_module: GraphModule) -> list[Node]:
    """Exchange nodes, those that wait for one, cuts, joins and lookups: their last argument is a mesh axis."""
    names = EXCHANGE_OPS | WAIT_OPS | {*SLICE_OPS, *LOOKUP_OPS}
    return [n for n in graph_module.graph.nodes if n.op == "call_function" and op_name(n) in names]


def paired(
    graph_module: GraphModule, layers: Sequence[LayerPlan], number: Callable[[LayerPlan], int]
) -> list[tuple[LayerPlan, list[Node]]]:
    """Each layer with its experts calls, of which it has that `number`."""
    calls = iter(experts_calls(graph_module))
    return [(layer, list(itertools.islice(calls, number(layer)))) for layer in layers]


def check_calls(
    name: str, region: Region, layers: Sequence[LayerPlan], number: Callable[[LayerPlan], int] = lambda _: 1
) -> list[tuple[LayerPlan, list[Node]]]:
    """Each layer with its experts calls.

    Args:
        name: of the pass that an error is attributed to. number: of the calls of a layer.

    Raises:
        PassError: there are more or fewer calls than planned.
    """
    found, planned = len(experts_calls(region.graph)), sum(map(number, layers))
    if found != planned:
        raise PassError(name, layers[0].site.fqn, f"{found} experts calls, planned are {planned}")
    return paired(region.graph, layers, number)


def on_axes(nodes: Iterable[Node]) -> list[tuple[str, str]]:
    """(op, axis) of each exchange."""
    return [(op_name(node), str(node.args[-1])) for node in nodes]


def reached(nodes: Iterable[Node], following: Callable[[Node], Iterable[Node]]) -> list[Node]:
    """Nodes with all that follow, nearest first."""
    seen = dict.fromkeys(nodes)
    queue = list(seen)
    for node in queue:
        new = [other for other in dict.fromkeys(following(node)) if other not in seen]
        seen |= dict.fromkeys(new)
        queue += new
    return queue


def all_before(nodes: Iterable[Node]) -> list[Node]:
    """Nodes with all that they depend on, nearest first."""
    return reached(nodes, lambda node: node.all_input_nodes)


def all_after(nodes: Iterable[Node]) -> list[Node]:
    """Nodes with all that depends on them, nearest first."""
    return reached(nodes, lambda node: node.users)


def op_name(node: Node) -> str:
    """A short name of the node's op: `all_to_all`, `experts`, `silu`."""
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target)).split(".")[0]
    return str(node.target).rsplit(".", 1)[-1]


def erase_unused(graph: Graph) -> None:
    """Erases unused attributes, unused ops of ours and unused getitems of their outputs.

    Not `eliminate_dead_code`: it would also erase the user's in-place methods (`h.add_(1)`), whose results are unused.
    """
    for node in reversed(list(graph.nodes)):
        if not node.users and _reads_only(node):
            graph.erase_node(node)


def _reads_only(node: Node) -> bool:
    if op_name(node) == "getitem" and node.op == "call_function":
        return isinstance(node.args[0], Node) and (is_ours(node.args[0]) or node.args[0].op == "call_module")
    return node.op == "get_attr" or is_ours(node)


def argument(node: Node, name: str) -> tuple[int, Any] | None:
    """Place and value of an argument of an op of ours, by its name in the op's signature; None: it has no such one."""
    schema = getattr(getattr(node.target, "default", None), "_schema", None)
    names = [each.name for each in schema.arguments] if schema else list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    place = names.index(name) if name in names else len(node.args)
    return (place, node.args[place]) if place < len(node.args) else None


def is_ours(node: Node) -> bool:
    """Whether the node is one of our registered ops; a user's `x.permute(0, 2, 1)` is not."""
    return node.op == "call_function" and str(node.target).startswith("moecompile.")


def count_ops(graph_module: GraphModule) -> Counter[str]:
    """How often each op occurs, not counting placeholders, attributes and outputs."""
    return Counter(
        op_name(n) for n in graph_module.graph.nodes if n.op in ("call_function", "call_module", "call_method")
    )


def items(graph: Graph, node: Node, *names: str) -> tuple[Node, ...]:
    """The outputs of a node that returns several tensors, named so that the graph is readable."""
    return tuple(
        graph.create_node("call_function", operator.getitem, (node, i), name=name) for i, name in enumerate(names)
    )


@dataclass(frozen=True)
class DispatchNodes:
    """permute (tokens, ids) -> rows, order, counts; experts (rows, counts) -> outputs; unpermute (outputs, weights).

    outputs: the experts call, or the last row-wise module after it (a norm after the experts).
    """

    permute: Node
    rows: Node
    counts: Node
    experts: Node
    outputs: Node
    unpermute: Node

    @classmethod
    def around(cls, experts: Node) -> DispatchNodes:
        """Reads the nodes around an experts call.

        Raises:
            ValueError: the call is not between one permute and one unpermute.
        """
        rows, counts = experts.args[:2]
        assert isinstance(rows, Node) and isinstance(counts, Node)
        permute, outputs, users = rows.args[0], experts, list(experts.users)
        assert isinstance(permute, Node)
        while len(users) == 1 and users[0].op == "call_module":
            outputs, users = users[0], list(users[0].users)
        if op_name(permute) != "permute" or len(users) != 1 or op_name(users[0]) != "unpermute":
            raise ValueError(f"{experts.name} is not between one permute and one unpermute")
        return cls(permute, rows, counts, experts, outputs, users[0])

    def feed(self, rows: Node, counts: Node) -> None:
        """Makes the experts read these rows; any further arguments (weights of existing experts) stay."""
        self.experts.args = (rows, counts, *self.experts.args[2:])

    @property
    def tokens(self) -> Node:
        """x_TD."""
        return _node(self.permute.args[0])

    @property
    def ids(self) -> Node:
        """ids_TK."""
        return _node(self.permute.args[1])

    @property
    def after_choice(self) -> Node:
        """The first node after the ids: counts are sent from here, before work that does not need them."""
        node = self.ids.next
        while node.op == "placeholder" or node.target is operator.getitem:
            node = node.next
        return node

    @property
    def dropless(self) -> bool:
        """Whether no assignment is dropped."""
        return bool(self.permute.args[3]) if len(self.permute.args) > 3 else True

    @property
    def weights(self) -> Node:
        """weights_TK."""
        return _node(self.unpermute.args[2])


def _node(value: object) -> Node:
    assert isinstance(value, Node)
    return value
