"""fuse: where the plan says so, one op gathers the experts' rows, runs the experts and sums their outputs.

The copied rows and the hidden units are then never materialized as a whole (moecompile.ops.expert_ffn). The plan fuses
experts whose activation is SwiGLU without biases, if the dispatch copies and sums rows on the rank of the experts. All
other experts stay as they are.

Algorithm, for each experts call with `fused` in the plan:
  1. Find the op that copies its rows and the op that sums its outputs.
  2. Replace both by a sort of the assignments alone; the experts gather their rows through its source indices.
  3. Name the back end that computes the experts, if the plan has one (moecompile.ops.backend).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moecompile.errors import PassError
from moecompile.match.experts import is_swiglu
from moecompile.match.regions import Region
from moecompile.ops.backend import EXPERTS, load
from moecompile.passes.base import LayerPass, items, op_name
from moecompile.plan import LayerPlan

ops = torch.ops.moecompile


@dataclass(frozen=True, kw_only=True)
class Fuse(LayerPass):
    """Makes gather, experts and sum one op, in the layers that the plan fuses."""

    name: str = "fuse"
    stage: str = "fused"
    detail: str = "one op for gather, experts and sum"

    def calls_of(self, layer: LayerPlan) -> int:
        """One for each chunk."""
        return layer.dispatch.chunks

    def requires(self, region: Region, layers: Sequence[LayerPlan]) -> None:
        """One experts call per layer and chunk, in order, none fused yet; those planned as fused are SwiGLU."""
        for layer, calls in self.calls(region, layers):
            for call in calls:
                if layer.fused and not is_swiglu(region.graph.get_submodule(str(call.target))):
                    raise PassError(self.name, layer.site.fqn, "is planned as fused, but its experts are not SwiGLU")
                if _is_fused(call):
                    raise PassError(self.name, layer.site.fqn, "is fused already")

    def wants(self, layer: LayerPlan) -> bool:
        """All layers: this is the last graph, whether any is fused or not."""
        return True

    def change(self, graph_module: fx.GraphModule, calls: list[fx.Node], layer: LayerPlan) -> None:
        """Steps 1 to 3."""
        for call in calls if layer.fused else ():
            _fuse(graph_module.graph, call)
            _name_backend(call, layer)

    def ensures(self, before: Region, after: Region, layers: Sequence[LayerPlan]) -> None:
        """The same exchanges in the same order; exactly the planned calls are fused.

        A fused experts call reads counts, sources and weights of a single sort.
        """
        super().ensures(before, after, layers)
        for layer, calls in self.calls(after, layers):
            for call in calls:
                self._check(call, layer)

    def _check(self, call: fx.Node, layer: LayerPlan) -> None:
        if _is_fused(call) != layer.fused:
            rule = "is planned as fused, but is not" if layer.fused else "is fused, but is not planned so"
            raise PassError(self.name, layer.site.fqn, rule)
        if not layer.fused:
            return
        if call.kwargs.get("backend", "") != layer.experts.backend:
            raise PassError(self.name, layer.site.fqn, f"its experts are not computed by {layer.experts.backend}")
        sources = {call.args[1], call.kwargs["source_R"], call.kwargs["weights_R"]}
        sorts = {op_name(n.args[0]) for n in sources if isinstance(n, fx.Node) and isinstance(n.args[0], fx.Node)}
        if len(sources) != 3 or len(sorts) != 1 or not min(sorts).startswith("sort_"):
            raise PassError(self.name, str(call.target), f"counts, sources and weights come from {sorted(sorts)}")


def _is_fused(call: fx.Node) -> bool:
    return "source_R" in call.kwargs


def _name_backend(call: fx.Node, layer: LayerPlan) -> None:
    """Has a back end compute the experts, if one is planned."""
    if layer.experts.backend:
        load(EXPERTS, layer.experts.backend)
        most = layer.routing.most_per_token(layer.experts.num_routed)
        call.kwargs = {**call.kwargs, "backend": layer.experts.backend, "max_per_token": most}


def _fuse(graph: fx.Graph, call: fx.Node) -> None:
    # Step 1
    rows = call.args[0]
    assert isinstance(rows, fx.Node)
    copied, summed = rows.args[0], list(call.users)
    assert isinstance(copied, fx.Node)
    rule = _RULES.get(op_name(copied))
    if rule is None or [op_name(user) for user in summed] != [rule.sums]:
        users = [op_name(user) for user in summed]
        raise ValueError(
            f"is planned as fused, but its experts are between {op_name(copied)} and {users}; set fused: false"
        )
    # Step 2
    x, sort, arguments = rule.sorting(copied, summed[0])
    with graph.inserting_before(call):
        ordered = graph.call_function(sort, arguments)
        weights, source, _, counts = items(graph, ordered, "weights", "source", "order", "counts")
    call.args = (x, counts, *call.args[2:])
    call.kwargs = {**call.kwargs, "source_R": source, "weights_R": weights}
    summed[0].replace_all_uses_with(call)
    graph.erase_node(summed[0])


# -- which ops copy and sum rows, and the sort that replaces them ----------------------------------------------------


@dataclass(frozen=True)
class _Rule:
    """sums: op that sums the experts' outputs. sorting: (copying node, summing node) -> rows, sort op, arguments."""

    sums: str
    sorting: Callable[[fx.Node, fx.Node], tuple[Any, Any, tuple[Any, ...]]]


def _permute(copied: fx.Node, summed: fx.Node) -> tuple[Any, Any, tuple[Any, ...]]:
    x, ids, *rest = copied.args
    return x, ops.sort_assignments, (ids, summed.args[2], *rest)


def _expand_rows(copied: fx.Node, summed: fx.Node) -> tuple[Any, Any, tuple[Any, ...]]:
    x, *rest = copied.args
    return x, ops.sort_received, tuple(rest)


def _take_local(copied: fx.Node, summed: fx.Node) -> tuple[Any, Any, tuple[Any, ...]]:
    x, *rest = copied.args
    return x, ops.sort_gathered, tuple(rest)


_RULES = {
    "permute": _Rule("unpermute", _permute),
    "expand_rows": _Rule("reduce_rows", _expand_rows),
    "take_local": _Rule("reduce_rows", _take_local),
}
