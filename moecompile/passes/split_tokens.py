"""split_tokens: cuts the tokens of an MoE layer over the TP group, after routing, and joins the outputs after combine.

Outside of MoE layers the ranks of a TP group share tokens and split weights. Inside, they split tokens: every rank
sends its slice to the experts, so that these compute each token once, wherever they are (`ep` need not know of `tp`).

Algorithm, for each experts call whose layer the plan cuts:
  1. Cut tokens, routing weights and expert ids, which the router chose from all tokens of the micro-batch.
  2. The one-device dispatch reads the slices. So do shared experts that are added to its output, and the projection
     to a latent width.
  3. Join the sum of both, for all tokens, before it gets its leading dims back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from moecompile.errors import PassError
from moecompile.match.regions import Region
from moecompile.mesh import Part, axes_that_split
from moecompile.nn import LatentDown, LatentUp, SharedExperts
from moecompile.passes.base import DispatchNodes, LayerPass, items, on_axes, op_name
from moecompile.plan import SLICE_OPS, LayerPlan

ops = torch.ops.moecompile


@dataclass(frozen=True, kw_only=True)
class SplitTokens(LayerPass):
    """The plan says which layers are cut, and over which axis."""

    name: str = "split_tokens"
    stage: str = "split"
    detail: str = f"tokens cut over {', '.join(axes_that_split(Part.TOKENS))}"

    def requires(self, region: Region, layers: Sequence[LayerPlan]) -> None:
        """One experts call per layer, in the same order; nothing is cut yet."""
        super().requires(region, layers)
        if cut := _slices(region.graph):
            raise PassError(self.name, layers[0].site.fqn, f"tokens are cut already: {[node.name for node in cut]}")

    def wants(self, layer: LayerPlan) -> bool:
        """Layers whose tokens are cut."""
        return bool(layer.cut_over)

    def change(self, graph_module: fx.GraphModule, calls: list[fx.Node], layer: LayerPlan) -> None:
        """Steps 1 to 3, for each axis."""
        for axis in layer.cut_over:
            _split(graph_module, DispatchNodes.around(calls[0]), axis)

    def ensures(self, before: Region, after: Region, layers: Sequence[LayerPlan]) -> None:
        """One cut and one join per planned layer; the dispatch reads slices only, and its output is joined."""
        super().ensures(before, after, layers)
        planned = [(op, axis) for layer in layers for axis in layer.cut_over for op in SLICE_OPS]
        if (found := on_axes(_slices(after.graph))) != planned:
            raise PassError(self.name, layers[0].site.fqn, f"cuts and joins are {found}, planned are {planned}")
        for layer, (call,) in self.calls(after, layers):
            nodes = DispatchNodes.around(call)
            tokens = _ends(after.graph, nodes)[0]
            read = [tokens, nodes.ids, nodes.weights] if layer.cut_over else []
            if whole := [node.name for node in read if not _is_from(node, "cut_tokens")]:
                raise PassError(self.name, layer.site.fqn, f"the dispatch reads {whole}, which are not cut")


def _slices(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.op == "call_function" and op_name(node) in SLICE_OPS]


def _is_from(node: fx.Node, op: str) -> bool:
    source = node.args[0] if node.args else None
    return op_name(node) == "getitem" and isinstance(source, fx.Node) and op_name(source) == op


def _split(graph_module: fx.GraphModule, nodes: DispatchNodes, axis: str) -> None:
    graph = graph_module.graph
    tokens, first, last = _ends(graph_module, nodes)
    shared = _Shared.beside(graph_module, last)
    # Step 1
    with graph.inserting_before(first if shared is None else shared.call):
        cut = graph.call_function(ops.cut_tokens, (tokens, nodes.weights, nodes.ids, axis))
        x, weights, ids = items(graph, cut, "own_tokens", "own_weights", "own_ids")
    # Step 2
    nodes.permute.args = (nodes.tokens, ids, *nodes.permute.args[2:])
    first.replace_input_with(tokens, x)
    nodes.unpermute.args = (*nodes.unpermute.args[:2], weights, *nodes.unpermute.args[3:])
    # Step 3
    readers, summed = list(last.users), last
    with graph.inserting_before(readers[0]):
        if shared is not None:
            shared.call.args = (x,)
            summed = graph.call_function(torch.ops.aten.add.Tensor, (last, shared.call))
        joined = graph.call_function(ops.join_tokens, (summed, tokens, axis))
    for reader in readers:
        reader.replace_input_with(last, joined)
    if shared is not None:
        shared.erase_total(graph)


def _ends(graph_module: fx.GraphModule, nodes: DispatchNodes) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The tokens, what reads them first, and the experts' output for them; outside of projections of a latent width."""
    tokens, first, last = nodes.tokens, nodes.permute, nodes.unpermute
    if _calls(graph_module, tokens, LatentDown):
        first, tokens = tokens, tokens.all_input_nodes[0]
    up = next(iter(last.users), None)
    return tokens, first, up if up is not None and _calls(graph_module, up, LatentUp) else last


def _calls(graph_module: fx.GraphModule, node: fx.Node, kind: type[nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), kind)


@dataclass(frozen=True)
class _Shared:
    """Shared experts: their call on x, the mask of padding in its output if there is one, and the sum with the routed
    experts' output, which `shaped` gives the dims of x.
    """

    call: fx.Node
    mask: fx.Node | None
    shaped: fx.Node
    total: fx.Node

    @classmethod
    def beside(cls, graph_module: fx.GraphModule, combined: fx.Node) -> _Shared | None:
        """Those whose output is added to what `combined` becomes; None: there are none."""
        shaped = next(iter(combined.users))
        total = next(iter(shaped.users), None)
        if op_name(shaped) != "unflatten_tokens" or total is None or op_name(total) != "add":
            return None
        for node in total.all_input_nodes:
            mask = node if node.op == "call_module" and len(node.args) > 1 else None
            call = node if mask is None else mask.args[0]
            if not isinstance(call, fx.Node) or call.op != "call_module" or call.args != (shaped.args[1],):
                continue
            if _calls(graph_module, call, SharedExperts):
                return cls(call, mask, shaped, total)
        return None

    def erase_total(self, graph: fx.Graph) -> None:
        """What was added after the tokens were whole is added before now; padding is masked in the sum."""
        result = self.shaped
        if self.mask is not None:  # routed experts have no rows of padding
            result = self.mask
            self.total.prepend(self.mask)
        self.total.replace_all_uses_with(result)
        if self.mask is not None:
            self.mask.args = (self.shaped, *self.mask.args[1:])
        graph.erase_node(self.total)
