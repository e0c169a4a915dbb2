"""delay_gradients: weight gradients of experts are an op of their own, after the rows' gradients are on their way back.

Where exchanges are in flight, backward then computes the weight gradients while the rows' gradients travel, and those
of all chunks at once: one product per expert, written once (moecompile.ops.collect).

Algorithm, for each layer whose exchanges are in flight:
  1. Find the first wait that its experts depend on. Exchanges have been started before it. Backward is mirrored: there
     it is the last of these exchanges to be started, and the backward of none of the starts has run.
  2. Insert a call of the experts' method that makes a token.
  3. Each call of the experts on rows is given the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from moecompile.errors import PassError
from moecompile.match.regions import Region
from moecompile.passes.base import GRAD_TOKEN, LayerPass, all_before, collecting_calls, op_name
from moecompile.plan import START_OPS, WAIT_OPS, LayerPlan


@dataclass(frozen=True, kw_only=True)
class DelayWeightGradients(LayerPass):
    """The plan says in which layers exchanges are in flight."""

    name: str = "delay_gradients"
    stage: str = "overlapped"
    detail: str = "weight gradients while the rows' gradients travel"

    def calls_of(self, layer: LayerPlan) -> int:
        """One for each chunk."""
        return layer.dispatch.chunks

    def requires(self, region: Region, layers: Sequence[LayerPlan]) -> None:
        """One experts call per chunk, none with a token; where exchanges are planned in flight, they are."""
        paired = self.calls(region, layers)
        if collecting_calls(region.graph) or any(GRAD_TOKEN in call.kwargs for _, calls in paired for call in calls):
            raise PassError(self.name, layers[0].site.fqn, "its weight gradients are collected already")
        for layer, calls in paired:
            if self.wants(layer) and not _waits_before(calls):
                rule = "its experts wait for no exchange in flight: overlap is first"
                raise PassError(self.name, layer.site.fqn, rule)

    def wants(self, layer: LayerPlan) -> bool:
        """Layers whose weight gradients are an op of their own."""
        return layer.dispatch.collects

    def change(self, graph_module: fx.GraphModule, calls: list[fx.Node], layer: LayerPlan) -> None:
        """Steps 1 to 3."""
        _collect(graph_module.graph, calls)

    def ensures(self, before: Region, after: Region, layers: Sequence[LayerPlan]) -> None:
        """The same exchanges in the same order; each planned layer has one token, which all its calls get.

        It is made after an exchange is started and before the first wait that the experts depend on.
        """
        super().ensures(before, after, layers)
        tokens = collecting_calls(after.graph)
        place = {node: i for i, node in enumerate(after.graph.graph.nodes)}
        for layer, calls in self.calls(after, layers):
            token = tokens.pop(0) if tokens and self.wants(layer) else None
            read = {call.kwargs.get(GRAD_TOKEN) for call in calls}
            if read != {token} or (token is None) == self.wants(layer):
                wanted = "one token" if self.wants(layer) else "none"
                rule = f"its experts get {sorted(map(str, read))}, planned is {wanted}"
                raise PassError(self.name, layer.site.fqn, rule)
            if token is not None:
                self._check_place(token, place, calls, layer)
        if tokens:
            raise PassError(self.name, layers[0].site.fqn, f"{tokens} are read by no experts")

    def _check_place(self, token: fx.Node, place: dict[fx.Node, int], calls: list[fx.Node], layer: LayerPlan) -> None:
        waits = _waits_before(calls)
        starts = [node for node in all_before(waits) if op_name(node) in START_OPS]
        if not min(place[start] for start in starts) < place[token] < min(place[wait] for wait in waits):
            rule = f"{token.name} must be after a start and before the first wait, so that gradients travel meanwhile"
            raise PassError(self.name, layer.site.fqn, rule)


def _collect(graph: fx.Graph, calls: list[fx.Node]) -> None:
    waits = set(_waits_before(calls))  # Step 1
    first = next(node for node in graph.nodes if node in waits)
    weights = calls[0].args[2:]  # existing experts get theirs as arguments
    with graph.inserting_before(first):  # Step 2
        experts = graph.get_attr(str(calls[0].target))
        made = graph.create_node("call_method", GRAD_TOKEN, (experts, *weights), name="weight_gradients")
    for call in calls:  # Step 3
        call.kwargs = {**call.kwargs, GRAD_TOKEN: made}


def _waits_before(calls: Sequence[fx.Node]) -> list[fx.Node]:
    return [node for node in all_before(calls) if op_name(node) in WAIT_OPS]
