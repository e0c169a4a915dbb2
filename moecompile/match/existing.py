"""Finds existing experts in a recorded model: recognized by their call, read from their weights, proven on the call.

A match is proven like a traced region: on the recorded call, the rewritten graph must compute what the module computes.
The proof needs a rewrite, so the caller passes it in: passes import match, not the other way round.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, fx, nn

from moecompile.capture import ModuleCall, Recording, trace_region
from moecompile.errors import CaptureError
from moecompile.match.experts import (
    OWN,
    ExpertsCall,
    ExpertsMatch,
    expert_modules,
    experts_call,
    groups_of,
    holds_stacks,
    match_matrices,
    match_stacked,
    matrices_of,
    structure,
)
from moecompile.match.ffn import find_ffns
from moecompile.match.hooks import lost_hooks
from moecompile.match.own_router import RouterMatch, own_router
from moecompile.match.patterns import FFNMatch
from moecompile.match.regions import Captured, Region, Site
from moecompile.match.swiglu import are_swiglu
from moecompile.match.view import GraphView
from moecompile.nn.existing import correction_bias
from moecompile.plan import ExpertsSite
from moecompile.torch_private import tree_leaves

Prove = Callable[[Region, ExpertsSite, ModuleCall], str | None]
"""Why the rewritten region may differ from its module on the recorded call; None if they agree."""

_Traced = dict[tuple[object, ...], tuple[fx.GraphModule, FFNMatch] | str]  # structure -> an expert's FFN, or a reason


def may_be_experts(module: nn.Module) -> bool:
    """Whether `module` holds experts in a known form, judging by its weights only."""
    return holds_stacks(module) or bool(expert_modules(module)) or matrices_of(module) is not None


def find_existing(recording: Recording, captured: Captured, prove: Prove) -> list[tuple[Region, ExpertsSite]]:
    """Experts in the order of their calls. Modules that look like experts but are not supported are refused."""
    existing: list[tuple[Region, ExpertsSite]] = []
    traced: _Traced = {}
    for path, call in recording.calls.items():
        module = recording.model.get_submodule(path)
        signature = experts_call(_arguments(module, call))
        if signature is not None:
            match = _matched(path, module, call, signature, traced)
        else:
            match = _CALLED_OTHERWISE if holds_stacks(module) else None
        if isinstance(match, ExpertsMatch):
            match = replace(match, router=_router(recording, path, match))
            region = Region(path=path, graph=_own_call(module, match), module=module, matches={path: match})
            site = _site(recording, path, match, len(existing))
            reason = prove(region, site, call)
            if reason is None:
                existing.append((region, replace(site, swiglu=are_swiglu(match, module))))
                continue
            match = reason
        if match is not None:
            where = path or "the model"
            captured.refused.append(Site(fqn=path, kind="experts", where=where, status="not_matched", reason=match))
    return existing


_CALLED_OTHERWISE = (
    "it holds stacked weights, but is not called with hidden states (T, D), expert ids (T, K) and weights (T, K)"
)


def _router(recording: Recording, path: str, match: ExpertsMatch) -> RouterMatch | None:
    found = own_router(recording, path, match.num_experts + match.num_identity, match.call.d_model)
    # Identity experts have scores, but no load that is counted.
    return replace(found, score="other") if found is not None and match.num_identity else found


def _own_call(module: nn.Module, match: ExpertsMatch) -> fx.GraphModule:
    """The captured graph of the region: one call of the model's own experts."""
    graph = fx.Graph()
    placeholders = tuple(graph.placeholder(name) for name in match.call.arguments)
    graph.output(graph.call_module(OWN, placeholders))
    graph_module = fx.GraphModule({OWN: module}, graph, class_name=type(module).__name__)
    graph_module.training = module.training
    return graph_module


def _site(recording: Recording, path: str, match: ExpertsMatch, index: int) -> ExpertsSite:
    """The plan's description of existing experts; groups and correction bias come from the router of their block."""
    module, block = recording.model.get_submodule(path), recording.model.get_submodule(path.rpartition(".")[0])
    groups, top_groups = groups_of(block, module)
    ins = match.ffn[1].ins if match.ffn else ()
    bias_up = any(name.endswith("up_proj_bias") for name in match.weights) or any(linear.bias for linear in ins)
    down_bias = match.ffn[1].down.bias is not None if match.ffn else "down_proj_bias" in match.weights
    return ExpertsSite(
        fqn=path,
        form=match.form,
        d_model=match.call.d_model,
        d_ff=match.d_expert,
        num_experts=match.num_experts,
        num_identity=match.num_identity,
        top_k=match.call.top_k,
        groups=groups,
        top_groups=top_groups,
        correction_bias=correction_bias(block, match.num_experts + match.num_identity) is not None,
        score=match.router.score if match.router else "unknown",
        has_sequences=match.router is not None and match.router.sequences,
        own_capacity=match.call.one_hot,
        num_in_projections=len(ins) or (2 if match.gated else 1),
        bias_up=bias_up,
        bias_down=down_bias,
        activation=match.activation,
        index=index,
    )


def _matched(
    path: str, module: nn.Module, call: ModuleCall, signature: ExpertsCall, traced: _Traced
) -> ExpertsMatch | str | None:
    """The match, the reason why the experts are not supported, or None for a module without weights."""
    match: ExpertsMatch | str
    if "forward" in vars(module):
        return "it has a forward of its own, beside that of its class, which would be lost"
    if children := expert_modules(module):
        ffn = _expert_ffn(module.get_submodule(children[0]), call, traced)
        match = ffn if isinstance(ffn, str) else _of_modules(signature, children, ffn)
    elif matrices_of(module):
        match = match_matrices(module, signature)
    elif any(True for _ in module.parameters()):
        match = match_stacked(module, signature)
    else:
        return None
    if isinstance(match, str):
        return match
    norm = match.norm
    return lost_hooks(path, module, lambda name: name != norm) or match


def _of_modules(call: ExpertsCall, children: tuple[str, ...], ffn: tuple[fx.GraphModule, FFNMatch]) -> ExpertsMatch:
    return ExpertsMatch(
        call=call, num_experts=len(children), d_expert=ffn[1].down.d_in, modules=children, ffn=ffn,
        activation=ffn[1].activation,
    )  # fmt: skip


def _expert_ffn(expert: nn.Module, call: ModuleCall, traced: _Traced) -> tuple[fx.GraphModule, FFNMatch] | str:
    """The FFN of an expert that is a separate module; experts with equal structure share one trace."""
    key = structure(expert)
    if key not in traced:
        rows = next(leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor))
        traced[key] = _traced_ffn(expert, rows)
    return traced[key]


def _traced_ffn(expert: nn.Module, rows: Tensor) -> tuple[fx.GraphModule, FFNMatch] | str:
    try:
        graph_module = trace_region(expert, ModuleCall((rows,), {}))
    except CaptureError as error:
        return f"one of its experts: {error}"
    matches, misses = find_ffns(GraphView(graph_module.graph, graph_module))
    if len(matches) != 1:
        reason = "".join(f": {miss.reason}" for miss in misses[:1])
        return f"one of its experts holds {len(matches)} FFNs, one is supported{reason}"
    return graph_module, matches[0]


def _arguments(module: nn.Module, call: ModuleCall) -> Mapping[str, object]:
    """The arguments of the call by parameter name, without those that are None or empty."""
    bound = inspect.signature(module.forward).bind(*call.args, **call.kwargs)
    return {name: value for name, value in bound.arguments.items() if isinstance(value, Tensor) or value}
