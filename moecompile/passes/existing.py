"""rewrite of experts that a model has already: their call -> load meter, permute, experts, unpermute.

The router around it, shared experts and the names of stacked weights stay: the region is the experts module alone, and
its GraphModule owns the model's own parameters, which the experts call gets as arguments.

Algorithm:
  1. Placeholders with the forward's own argument names. The model may have rounded the routing weights; from here on
     they are at least fp32.
  2. Count the load; ids that equal the number of experts are dropped assignments. Experts that are the identity are
     computed where the token is.
  3. permute, experts on the rows (with the norm that follows them, if any), unpermute with the routing weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from moecompile.comm.dispatch import items
from moecompile.errors import PassError
from moecompile.nn import Experts
from moecompile.nn.existing import (
    ExistingExperts,
    ExistingMeter,
    IdentityExperts,
    MatrixExperts,
    OneHotIds,
    WideWeights,
    without_parameters,
)
from moecompile.passes.base import is_ours, op_name
from moecompile.passes.match import FFNMatch
from moecompile.passes.match_experts import ExpertsMatch
from moecompile.passes.rewrite import activation_module
from moecompile.passes.trained import freeze_stack
from moecompile.passes.upcycle import DenseWeights
from moecompile.plan import LayerPlan

ops = torch.ops.moecompile
_OWN = "own_experts"  # the model's experts module in the graph of its region before the rewrite


@dataclass(frozen=True)
class ExistingRegion:
    """Experts of a model and what was found of them. ffn: the traced first expert and its FFN, for form `modules`."""

    match: ExpertsMatch
    module: nn.Module
    ffn: tuple[fx.GraphModule, FFNMatch] | None = None

    def captured(self) -> fx.GraphModule:
        """The region as it is, to be shown: one call of the model's own experts."""
        graph = fx.Graph()
        given = tuple(graph.placeholder(name) for name in self.match.call.arguments)
        graph.output(graph.call_module(_OWN, given))
        return fx.GraphModule({_OWN: without_parameters(self.module)}, graph, class_name=type(self.module).__name__)


@dataclass(frozen=True, kw_only=True)
class RewriteExisting:
    """No options: the model says what its experts are."""

    name: str = "rewrite"

    def run(self, region: ExistingRegion, layer: LayerPlan | None = None) -> fx.GraphModule:
        """A new GraphModule; stacked weights are the model's own parameters, separate experts are stacked copies.

        Args:
            layer: gives the nodes and the balance rule of the load meter; None: one node, no rule.
        """
        match, module = region.match, region.module
        root: dict[str, Any] = {}
        graph = fx.Graph()
        # Step 1
        hidden, ids, weights = (graph.placeholder(name) for name in match.call.arguments)
        root["wide_weights"] = WideWeights()
        weights = graph.call_module("wide_weights", (weights, hidden))
        # Step 2
        if match.call.one_hot:
            root["one_hot_ids"] = OneHotIds()
            ids = graph.call_module("one_hot_ids", (ids,))
        if match.num_identity:
            root["identity_experts"] = IdentityExperts(match.num_experts)
            ids, same = items(graph, graph.call_module("identity_experts", (hidden, ids, weights)), "kept_ids", "same")
        root["meter"] = _meter(region, layer)
        graph.call_module("meter", (ids,))
        # Step 3
        tokens = hidden if match.call.is_flat else graph.call_function(ops.flatten_tokens, (hidden,))
        permuted = graph.call_function(ops.permute, (tokens, ids, match.num_experts, False))
        rows, order, counts = items(graph, permuted, "rows", "order", "counts")
        root |= _experts(region, layer.site.fqn if layer is not None else "")
        given = [graph.get_attr(name) for name in match.weights]
        outputs = graph.call_module("experts", (rows, counts, *given))
        if match.norm:
            root[match.norm] = module.get_submodule(match.norm)
            outputs = graph.call_module(match.norm, (outputs,))
        result = graph.call_function(ops.unpermute, (outputs, order, weights))
        if match.num_identity:
            result = graph.call_function(torch.ops.aten.add.Tensor, (result, same))
        if not match.call.is_flat:
            result = graph.call_function(ops.unflatten_tokens, (result, hidden))
        graph.output(result)
        new = fx.GraphModule(root, graph, class_name=type(module).__name__)
        for child in new.children():
            child.train(module.training)
        new.training = module.training
        new.graph.lint()
        return new

    def ensures(self, graph_module: fx.GraphModule, where: str) -> None:
        """One permute, experts call and unpermute; no exchange."""
        names = [op_name(node) for node in graph_module.graph.nodes if is_ours(node)]
        found = [name for name in names if name not in ("flatten_tokens", "unflatten_tokens")]
        if found != ["permute", "unpermute"]:
            raise PassError(self.name, where, f"the graph holds {found}, one permute and one unpermute are meant")


def _meter(region: ExistingRegion, layer: LayerPlan | None) -> ExistingMeter:
    device, num_experts = next(region.module.parameters()).device, region.match.num_experts
    if layer is None:
        return ExistingMeter(num_experts, device=device)
    meter = ExistingMeter(num_experts, layer.placement.nodes, device)
    meter.bias_rate, meter.bias_update = layer.balance.rate, layer.balance.update
    return meter


def _experts(region: ExistingRegion, fqn: str) -> dict[str, Any]:
    """What the graph reads to compute the experts: name -> parameter or module."""
    match, module = region.match, region.module
    if region.ffn is None:
        compute = computing(match, module)
        return {"experts": compute, **{name: _weight(module, name, match) for name in match.weights}}
    return {"experts": _stacked(match, module, *region.ffn, fqn)}


def computing(match: ExpertsMatch, module: nn.Module) -> ExistingExperts:
    """What computes the experts on rows, with weights that it is given."""
    if match.are_matrices:
        holder = module.get_submodule(match.weights[0].rpartition(".")[0])
        return MatrixExperts(match.num_experts, without_parameters(holder), match.weights)
    return ExistingExperts(match.num_experts, without_parameters(module), match.weights, transposed=match.transposed)


def _weight(module: nn.Module, name: str, match: ExpertsMatch) -> nn.Parameter:
    """The model's own parameter; rows of experts that are the identity, which nothing reads, are cut off."""
    parameter = module.get_parameter(name)
    if not match.num_identity or parameter.shape[0] == match.num_experts:
        return parameter
    rows = parameter.detach()[: match.num_experts].clone()
    return nn.Parameter(rows, requires_grad=parameter.requires_grad)


@torch.no_grad()
def _stacked(match: ExpertsMatch, module: nn.Module, traced: fx.GraphModule, ffn: FFNMatch, fqn: str) -> Experts:
    """Separate experts as one stack; their parameters' names change."""
    dense = DenseWeights.of(traced, ffn)
    like: Tensor = dense.down_DF
    bias_up, bias_down = any(linear.bias for linear in ffn.ins), ffn.down.bias is not None
    stack = Experts(
        ffn.down.d_out, ffn.down.d_in, match.num_experts, gated=len(ffn.ins) == 2, bias_up=bias_up,
        bias_down=bias_down, activation=activation_module(traced, ffn), device=like.device, dtype=like.dtype,
    )  # fmt: skip
    for i, path in enumerate(match.modules):
        expert = module.get_submodule(path)
        getattr(stack, stack.in_name)[i].copy_(torch.cat([x.weight_of(expert) for x in ffn.ins]))
        stack.down_proj[i].copy_(ffn.down.weight_of(expert))
        if bias_up:
            given = [x.bias_of(expert) for x in ffn.ins]
            biases = [like.new_zeros(x.d_out) if b is None else b for b, x in zip(given, ffn.ins, strict=True)]
            getattr(stack, f"{stack.in_name}_bias")[i].copy_(torch.cat(biases))
        if stack.down_proj_bias is not None and (bias := ffn.down.bias_of(expert)) is not None:
            stack.down_proj_bias[i].copy_(bias)
    freeze_stack(stack, [module.get_submodule(path) for path in match.modules], ffn, fqn)
    return stack


def forget_weights(graph_module: fx.GraphModule) -> None:
    """Empties the parameters of a rewritten region that is kept to be shown, or sharding would free nothing."""
    for path in {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}:
        owner, _, name = path.rpartition(".")
        empty = nn.Parameter(graph_module.get_parameter(path).detach().to("meta"), requires_grad=False)
        graph_module.get_submodule(owner).register_parameter(name, empty)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What code around the experts may read of them: numbers of experts, widths, the config."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
