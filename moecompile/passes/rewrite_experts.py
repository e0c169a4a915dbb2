"""rewrite of existing experts: the call of a model's own experts -> load meter, permute, experts, unpermute.

The region is the experts module alone, so the router, shared experts and the names of stacked weights stay. The
GraphModule owns the model's own parameters, and adapters of them if planned, and passes them to the experts call.

Algorithm:
  1. Read hidden states, expert ids and routing weights; cast the weights to at least fp32, in case the model rounded
     them.
  2. Padding gets no expert. Identity experts are computed on the token's own rank. Read the logits of the model's own
     router, drop what is beyond a planned capacity, and count the load; an id equal to the number of experts is a
     dropped assignment. Weights that scale what experts read do so before any exchange.
  3. permute, experts on the rows (with the norm that follows them, if any), unpermute with the routing weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from moecompile.errors import PlanError
from moecompile.match.experts import OWN, ExpertsMatch, RouterMatch, existing_experts
from moecompile.match.ffn import FFNMatch, activation_module
from moecompile.nn import Experts
from moecompile.nn.adapters import expert_adapters
from moecompile.nn.existing import ExistingExperts, ExistingMeter, OneHotIds, SkippedIds, WideWeights
from moecompile.nn.identity import IdentityExperts
from moecompile.nn.own_router import OwnCapacity, OwnRouter
from moecompile.nn.padding import MaskRouting, TokenMask
from moecompile.nn.scaled_input import ScaleInput
from moecompile.passes.base import items
from moecompile.passes.trained import freeze_stack
from moecompile.passes.upcycle import DenseWeights
from moecompile.plan import LayerPlan

ops = torch.ops.moecompile


def rewrite_experts(graph_module: fx.GraphModule, module: nn.Module, match: ExpertsMatch, layer: LayerPlan) -> None:
    """Replaces the call of the model's own experts in a graph, in place.

    Stacked weights stay the model's own parameters; separate experts are copied into stacks.

    Args:
        module: the model's experts. layer: number of experts, and the meter's nodes and balance rule.
    """
    graph = graph_module.graph
    (own,) = (node for node in graph.nodes if node.op == "call_module" and node.target == OWN)

    def add(name: str, part: nn.Module) -> str:
        graph_module.add_submodule(name, part.train(module.training))
        return name

    with graph.inserting_before(own):
        # Step 1
        hidden, ids, weights = own.args
        weights = graph.call_module(add("wide_weights", WideWeights()), (weights, hidden))
        # Step 2
        if match.call.one_hot:
            ids = graph.call_module(add("one_hot_ids", OneHotIds()), (ids,))
        if match.skips:
            ids = graph.call_module(add("skipped_ids", SkippedIds(match.num_experts)), (ids, weights))
        ids, weights = _routed(graph, add, (hidden, ids, weights), module, match, layer)
        if match.scales_input:
            scaled = graph.call_module(add("scale_input", ScaleInput()), (hidden, weights))
            hidden, weights = items(graph, scaled, "scaled", "ones")
        if match.num_identity:
            identity = add("identity_experts", IdentityExperts(match.num_experts))
            ids, passed = items(graph, graph.call_module(identity, (hidden, ids, weights)), "kept_ids", "same")
        # Step 3
        tokens = hidden if match.call.is_flat else graph.call_function(ops.flatten_tokens, (hidden,))
        permuted = graph.call_function(ops.permute, (tokens, ids, layer.experts.num_routed, False))
        rows, order, counts = items(graph, permuted, "rows", "order", "counts")
        experts, parameters = _experts(match, module, layer)
        add("experts", experts)
        for name, parameter in parameters.items():
            _add_parameter(graph_module, name, parameter)
        stacks = [graph.get_attr(name) for name in parameters]
        result = graph.call_module("experts", (rows, counts, *stacks))
        if match.norm:
            result = graph.call_module(add(match.norm, module.get_submodule(match.norm)), (result,))
        result = graph.call_function(ops.unpermute, (result, order, weights))
        if match.num_identity:
            result = graph.call_function(torch.ops.aten.add.Tensor, (result, passed))
        if not match.call.is_flat:
            result = graph.call_function(ops.unflatten_tokens, (result, hidden))
    own.replace_all_uses_with(result)
    graph.erase_node(own)


def _routed(
    graph: fx.Graph,
    add: Callable[[str, nn.Module], str],
    call: tuple[fx.Node, fx.Node, fx.Node],
    module: nn.Module,
    match: ExpertsMatch,
    layer: LayerPlan,
) -> tuple[fx.Node, fx.Node]:
    """Step 2: ids and weights of a call (hidden states, ids, weights) after padding and capacity, with their meters."""
    hidden, ids, weights = call
    mask: tuple[fx.Node, ...] = ()
    choices = match.num_experts + match.num_identity
    if layer.mask_padding:
        mask = (graph.call_module(add("token_mask", TokenMask()), (hidden,)),)
        masked = graph.call_module(add("mask_routing", MaskRouting(choices)), (ids, weights, *mask))
        ids, weights = items(graph, masked, "real_ids", "real_weights")
    probs = None
    if match.router is not None:
        reader = add("own_router", _reader(module, match.router, layer, match.call.top_k))
        probs = graph.call_module(reader, (ids, weights, *mask))
    chosen = ids
    if (factor := layer.routing.capacity_factor) is not None:
        capacity = add("capacity", OwnCapacity(layer.experts.num_routed, factor, layer.routing.drop))
        ids, weights = items(graph, graph.call_module(capacity, (ids, weights, *mask)), "fit_ids", "fit_weights")
    graph.call_module(add("meter", _meter(module, layer, match)), (chosen, ids, probs, *mask))
    return ids, weights


def _experts(
    match: ExpertsMatch, module: nn.Module, layer: LayerPlan
) -> tuple[Experts | ExistingExperts, dict[str, nn.Parameter]]:
    """The experts on rows, and the parameters that they are called with: the model's own and adapters."""
    if match.ffn is not None:
        return _stacked(match, module, *match.ffn, layer.site.fqn), {}
    experts = existing_experts(match, module)
    own = {name: _weight(module, name, match) for name in match.weights}
    if layer.adapters is None:
        return experts, own
    if match.no_adapters:  # of a plan that was written by hand
        raise PlanError(
            f"plan.layers[{layer.site.fqn}].adapters", list(layer.adapters.weights),
            f"its experts {match.no_adapters}", "Use adapters: null, or plan again",
        )  # fmt: skip
    new = expert_adapters(module, layer.adapters.weights, layer.adapters.rank, transposed=match.transposed)
    experts.adapt(list(new), layer.adapters.scale)
    return experts, own | new


def _meter(module: nn.Module, layer: LayerPlan, match: ExpertsMatch) -> ExistingMeter:
    device = next(module.parameters()).device
    has_entropy = match.router is not None and match.router.score != "other"
    experts, nodes = layer.experts, layer.placement.nodes
    meter = ExistingMeter(
        experts.num_routed + experts.num_identity, nodes, device, has_entropy=has_entropy,
        num_identity=experts.num_identity,
    )  # fmt: skip
    if layer.placement.order:
        meter.place(layer.placement.positions)
    meter.balance, meter.top_k = layer.balance, match.call.top_k
    return meter


def _reader(module: nn.Module, router: RouterMatch, layer: LayerPlan, top_k: int) -> OwnRouter:
    block = layer.site.fqn.rpartition(".")[0]
    source, first = (router.path.removeprefix(f"{block}."), router.index), next(module.parameters())
    return OwnRouter(
        router.num_choices, top_k, router.score, source, layer.balance, has_sequences=router.sequences,
        device=first.device, dtype=first.dtype,
    )  # fmt: skip


def _weight(module: nn.Module, name: str, match: ExpertsMatch) -> nn.Parameter:
    """The model's own parameter, without the unused rows of identity experts."""
    parameter = module.get_parameter(name)
    if not match.num_identity or parameter.shape[0] == match.num_experts:
        return parameter
    rows = parameter.detach()[: match.num_experts].clone()
    return nn.Parameter(rows, requires_grad=parameter.requires_grad)


def _add_parameter(root: nn.Module, path: str, parameter: nn.Parameter) -> None:
    *owners, name = path.split(".")
    for owner in owners:
        if not hasattr(root, owner):
            root.add_module(owner, nn.Module())
        root = root.get_submodule(owner)
    root.register_parameter(name, parameter)


@torch.no_grad()
def _stacked(match: ExpertsMatch, module: nn.Module, traced: fx.GraphModule, ffn: FFNMatch, fqn: str) -> Experts:
    """Copies separate experts into one stack; their parameters' names change."""
    dense = DenseWeights.of(traced, ffn)
    like: Tensor = dense.down_DF
    bias_up, bias_down = any(linear.bias for linear in ffn.ins), ffn.down.bias is not None
    stack = Experts(
        ffn.down.d_out, ffn.down.d_in, match.num_experts, gated=len(ffn.ins) == 2, bias_up=bias_up,
        bias_down=bias_down, activation=activation_module(traced, ffn), device=like.device, dtype=like.dtype,
    )  # fmt: skip
    for i, path in enumerate(match.modules):
        for name, row in stacked_rows(stack, module.get_submodule(path), ffn).items():
            stack.get_parameter(name)[i].copy_(row)
    freeze_stack(stack, [module.get_submodule(path) for path in match.modules], ffn, fqn)
    return stack


def stacked_rows(stack: Experts, expert: nn.Module, ffn: FFNMatch) -> dict[str, Tensor]:
    """What each parameter of a stack holds of one separate expert."""
    down = ffn.down.weight_of(expert)
    rows = {stack.in_name: torch.cat([x.weight_of(expert) for x in ffn.ins]), "down_proj": down}
    if getattr(stack, f"{stack.in_name}_bias") is not None:
        own = [x.bias_of(expert) for x in ffn.ins]
        biases = [down.new_zeros(x.d_out) if b is None else b for b, x in zip(own, ffn.ins, strict=True)]
        rows[f"{stack.in_name}_bias"] = torch.cat(biases)
    if stack.down_proj_bias is not None and (bias := ffn.down.bias_of(expert)) is not None:
        rows["down_proj_bias"] = bias
    return rows
