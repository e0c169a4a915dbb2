"""rewrite: dense FFN -> router, permute, experts, unpermute (+ shared experts, + projections of a latent width).

The result runs on one device.

Algorithm, for each site:
  1. Copy the pointwise operations into an activation module.
  2. Build router, experts and shared experts, fill them from the dense weights (upcycle.py), and freeze weights that
     come from frozen ones (trained.py).
  3. Insert the nodes where the FFN first reads its input, which may be modified in place later, and redirect the users
     of the last linear to the new result.
  4. Erase the FFN's nodes and unused modules.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import torch
from torch import fx, nn

from moecompile.errors import PassError, PlanError
from moecompile.match.experts import ExpertsMatch
from moecompile.match.ffn import FFNMatch, activation_module
from moecompile.match.linears import common_owner
from moecompile.match.regions import Region
from moecompile.nn import Experts, Latent, LatentDown, LatentUp, Router, SharedExperts
from moecompile.nn.identity import IdentityExperts
from moecompile.nn.padding import MaskRows, TokenIds, TokenMask
from moecompile.passes.base import check_calls, copy_graph_module, erase_unused, exchanges_of, is_ours, items, op_name
from moecompile.passes.rewrite_experts import rewrite_experts
from moecompile.passes.trained import keep_frozen
from moecompile.passes.upcycle import DenseWeights, fill
from moecompile.plan import LayerPlan

ops = torch.ops.moecompile


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """seed: random weights (router rows, `random` experts) depend only on it and on the site."""

    seed: int = 0
    name: str = "rewrite"
    stage: str = "rewritten"
    detail: str = "one device"

    def requires(self, region: Region, layers: Sequence[LayerPlan]) -> None:
        """Every layer has a match, the graph has no op of ours yet, and planned slices are possible."""
        if ops_there := [op_name(node) for node in region.graph.graph.nodes if is_ours(node)]:
            raise PassError(self.name, layers[0].site.fqn, f"the graph is rewritten already, it holds {ops_there}")
        for layer in layers:
            match = region.matches.get(layer.site.fqn)
            if match is None:
                raise PassError(self.name, layer.site.fqn, f"the region has matches only for {list(region.matches)}")
            if isinstance(match, FFNMatch):
                _check_slices(match, layer)

    def run(self, region: Region, layers: Sequence[LayerPlan]) -> Region:
        """Returns the region with a new graph, which shares the weights that stay with the old one."""
        new, copies = copy_graph_module(region.graph)
        for layer in layers:
            match = region.matches[layer.site.fqn]
            if isinstance(match, ExpertsMatch):
                rewrite_experts(new, region.module, match, layer)
            else:
                _rewrite_ffn(new, region.graph, match, copies, layer, self.seed)
        erase_unused(new.graph)
        new = fx.GraphModule(new, new.graph, class_name=type(region.graph).__name__)  # keeps only used modules
        return region.with_graph(new)

    def ensures(self, before: Region, after: Region, layers: Sequence[LayerPlan]) -> None:
        """One permute, experts call and unpermute per layer; no exchange."""
        check_calls(self.name, after, layers)
        counts = Counter(op_name(node) for node in after.graph.graph.nodes if is_ours(node))
        for op in ("permute", "unpermute"):
            if counts[op] != len(layers):
                raise PassError(self.name, layers[0].site.fqn, f"{counts[op]} {op} nodes for {len(layers)} layers")
        if exchanges := [op_name(node) for node in exchanges_of(after.graph)]:
            raise PassError(self.name, layers[0].site.fqn, f"the graph is for one device, but holds {exchanges}")


def _check_slices(match: FFNMatch, layer: LayerPlan) -> None:
    if match.whole and layer.experts.granularity > 1:
        raise PlanError(
            "experts.granularity", layer.experts.granularity,
            f"must be 1 for {layer.site.fqn or 'the graph'}: its activation ({match.activation}) needs all hidden units"
            " at once, and slices have only some",
            "Use experts.granularity=1 and experts.init=copy",
        )  # fmt: skip


def _rewrite_ffn(
    new: fx.GraphModule,
    old: fx.GraphModule,
    match: FFNMatch,
    copies: dict[fx.Node, fx.Node],
    layer: LayerPlan,
    seed: int,
) -> None:
    # Steps 1 and 2
    router, experts, shared, latent = build_modules(layer, DenseWeights.of(old, match), activation_module(old, match))
    fill_site(router, experts, shared, old, match, layer, seed, latent=latent)
    keep_frozen(experts, shared, old, match, layer)
    prefix = common_owner([match.down.weight, *(linear.weight for linear in match.ins)])
    parts: dict[str, nn.Module | None] = {"router": router, "experts": experts, "shared_experts": shared}
    if latent is not None:
        parts |= {"latent_down": latent.down, "latent_up": latent.up}
    if layer.experts.num_identity:
        parts["identity_experts"] = IdentityExperts(layer.experts.num_routed)
    if layer.mask_padding:
        parts |= {"token_mask": TokenMask(), "mask_rows": MaskRows() if shared else None}
    if layer.routing.choice == "hash":
        parts["token_ids"] = TokenIds()
    names = {role: _add(new, prefix, role, module) for role, module in parts.items() if module is not None}
    # Step 3
    x, down = copies[match.ins[0].x], copies[match.down.node]
    position = {node: i for i, node in enumerate(new.graph.nodes)}
    consumers = [copies[node] for linear in match.ins for node in (*linear.reads, *linear.nodes)]
    with new.graph.inserting_before(min((n for n in consumers if x in n.all_input_nodes), key=position.__getitem__)):
        result = _insert(new.graph, x, names, layer)
    down.replace_all_uses_with(result)
    copies[match.down.node] = result  # the next FFN may read this one's output
    # Step 4
    others = sorted((copies[node] for node in match.nodes if node is not match.down.node), key=position.__getitem__)
    _erase(new.graph, [*others, down])


def _erase(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Erases nodes (given in graph order), and views, sizes and transposed weights that only they used."""
    stack: dict[fx.Node, None] = {}
    for node in reversed(nodes):
        stack.update(dict.fromkeys(node.all_input_nodes))
        graph.erase_node(node)
    for node in nodes:
        stack.pop(node, None)
    while stack:
        node, _ = stack.popitem()
        if not node.users and node.target in _READS:
            stack.update(dict.fromkeys(node.all_input_nodes))
            graph.erase_node(node)


_READS = frozenset((
    getattr, operator.getitem, operator.add, operator.mul, operator.floordiv, "size", "dim", "numel",
    "view", "reshape", "flatten", "t", "transpose", "permute", torch.t, torch.transpose, torch.reshape, torch.flatten,
))  # fmt: skip


def _insert(graph: fx.Graph, x: fx.Node, names: dict[str, str], layer: LayerPlan) -> fx.Node:
    tokens = graph.call_function(ops.flatten_tokens, (x,))
    real = (graph.call_module(names["token_mask"], (x,)),) if "token_mask" in names else ()
    hashed = (*(real or (None,)), graph.call_module(names["token_ids"], (x,))) if "token_ids" in names else real
    routed = graph.call_module(names["router"], (x, *hashed))  # x, not tokens: per-sequence losses need the shape
    of_shared = ("shared_weights",) * layer.experts.shared_routed
    weights, ids, *weighed = items(graph, routed, "weights", "ids", *of_shared)
    # Before the permute, so that the device has work while the host waits for the counts of an exchange.
    shared = graph.call_module(names["shared_experts"], (x, *weighed)) if "shared_experts" in names else None
    if shared is not None and real:
        shared = graph.call_module(names["mask_rows"], (shared, *real))
    if "identity_experts" in names:
        passed_by = graph.call_module(names["identity_experts"], (tokens, ids, weights))
        ids, same = items(graph, passed_by, "kept_ids", "same")
    if "latent_down" in names:
        tokens = graph.call_module(names["latent_down"], (tokens,))
    dropless = () if layer.routing.dropless and not real and "identity_experts" not in names else (False,)
    permuted = graph.call_function(ops.permute, (tokens, ids, layer.experts.num_routed, *dropless))
    rows, order, counts = items(graph, permuted, "rows", "order", "counts")
    outputs = graph.call_module(names["experts"], (rows, counts))
    combined = graph.call_function(ops.unpermute, (outputs, order, weights))
    if "latent_up" in names:
        combined = graph.call_module(names["latent_up"], (combined,))
    if "identity_experts" in names:
        combined = graph.call_function(torch.ops.aten.add.Tensor, (combined, same))
    result = graph.call_function(ops.unflatten_tokens, (combined, x))
    return result if shared is None else graph.call_function(torch.ops.aten.add.Tensor, (result, shared))


def fill_site(
    router: Router,
    experts: Experts,
    shared: SharedExperts | None,
    old: fx.GraphModule,
    match: FFNMatch,
    layer: LayerPlan,
    seed: int,
    expert_ids: Sequence[int] | None = None,
    latent: Latent | None = None,
) -> None:
    """Fills the modules of one site from the FFN in `old`; random values depend only on the seed and the site.

    Args:
        expert_ids: global ids of the experts in `experts`; None: all.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer.site.index)
    fill(router, experts, shared, DenseWeights.of(old, match), layer, generator, expert_ids, latent)


def build_modules(
    layer: LayerPlan, dense: DenseWeights, activation: nn.Module
) -> tuple[Router, Experts, SharedExperts | None, Latent | None]:
    """Uninitialized modules of the planned sizes, with the device and dtype of the dense weights."""
    site, plan = layer.site, layer.experts
    where: dict[str, Any] = {"device": dense.down_DF.device, "dtype": dense.down_DF.dtype}
    router = Router(
        site.d_model, plan.num_routed + plan.num_identity, layer.routing, layer.balance, layer=site.index,
        num_nodes=layer.placement.nodes, num_identity=plan.num_identity,
        num_shared=plan.num_shared * plan.shared_routed, **where,
    )  # fmt: skip
    if layer.placement.order:
        router.meter.place(layer.placement.positions)
    kinds: dict[str, Any] = {"gated": site.kind == "gated", "bias_up": site.bias_up, "bias_down": site.bias_down}
    experts = Experts(layer.row_site.d_model, plan.d_expert, plan.num_routed, activation=activation, **kinds, **where)
    latent = None
    if plan.latent_size is not None:
        sizes = (site.d_model, plan.latent_size)
        latent = Latent(LatentDown(*sizes, **where), LatentUp(*sizes, norm=plan.latent_norm, **where))
    if not plan.d_shared:
        return router, experts, None, latent
    shared = SharedExperts(
        site.d_model, plan.d_shared, activation=copy.deepcopy(activation), gate=plan.shared_gate, **kinds, **where
    )
    return router, experts, shared, latent


def _add(root: fx.GraphModule, prefix: str, role: str, module: nn.Module) -> str:
    """Adds `module` under a free name and returns its path."""
    path = f"{prefix}.{role}" if prefix else role
    taken = {name for name, _ in root.named_modules()}
    free = next(name for name in chain([path], (f"{path}_{i}" for i in count(1))) if name not in taken)
    root.add_submodule(free, module.train(root.training))
    return free
