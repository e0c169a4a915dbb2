"""What all passes share: the protocol, the registry of user passes, and helpers that query a graph."""

from __future__ import annotations

import itertools
import operator
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Protocol

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.utils.hooks import RemovableHandle

from moecompile.errors import ConfigError, PassError
from moecompile.match.regions import Region
from moecompile.nn.experts import RowExperts
from moecompile.plan import EXCHANGE_OPS, SLICE_OPS, WAIT_OPS, LayerPlan, Plan


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
    """A pass over a whole compiled model, which it changes in place."""

    @property
    def name(self) -> str:
        """What records and errors call it."""

    def requires(self, model: nn.Module, plan: Plan) -> None:
        """Raises PassError or PlanError unless the model meets the preconditions of `run`."""

    def run(self, model: nn.Module, plan: Plan) -> None:
        """Changes the model in place."""

    def ensures(self, model: nn.Module, plan: Plan) -> None:
        """Raises PassError unless the model meets the postconditions."""


def run_on_model(step: ModelPass, model: nn.Module, plan: Plan) -> None:
    """Runs a pass over a whole model and checks its contract before and after."""
    step.requires(model, plan)
    step.run(model, plan)
    step.ensures(model, plan)


GRAD_TOKEN = "grad_token"  # method of experts and keyword of their calls: the token of their weight gradients
_PLACES = ("rewrite", "lower")
_registered: OrderedDict[int, tuple[str, GraphPass]] = OrderedDict()


def register_pass(graph_pass: GraphPass, *, after: str) -> RemovableHandle:
    """Runs a pass over every region that is compiled from now on, and checks its contract before and after.

    Args:
        after: `rewrite` (the graph runs on one device) or `lower` (it has the exchanges).

    Returns:
        A handle, as from `register_pattern`.
    """
    if after not in _PLACES:
        raise ConfigError("after", after, "must be rewrite or lower", "Use one of these")
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
    """Exchange nodes, those that wait for one, cuts and joins: their last argument is a mesh axis."""
    names = EXCHANGE_OPS | WAIT_OPS | set(SLICE_OPS)
    return [n for n in graph_module.graph.nodes if n.op == "call_function" and op_name(n) in names]


def check_calls(name: str, region: Region, layers: Sequence[LayerPlan]) -> list[Node]:
    """The experts calls of a region, one for each planned layer.

    Args:
        name: of the pass that an error is attributed to.

    Raises:
        PassError: there are more or fewer calls than layers.
    """
    calls = experts_calls(region.graph)
    if len(calls) != len(layers):
        raise PassError(name, layers[0].site.fqn, f"{len(calls)} experts calls for {len(layers)} planned layers")
    return calls


def calls_by_layer(graph_module: GraphModule, layers: Sequence[LayerPlan]) -> list[list[Node]]:
    """The experts calls of each layer, one per chunk."""
    calls = iter(experts_calls(graph_module))
    return [list(itertools.islice(calls, layer.dispatch.chunks)) for layer in layers]


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
