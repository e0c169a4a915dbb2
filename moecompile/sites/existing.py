"""Experts that a recorded model has already: known by their call, understood by their weights, proven on the call.

A match is proven like a traced region: on the recorded call, its rewritten graph must compute what the module computes.
On the meta device there are no values; there only forms are taken whose meaning is known without.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from moecompile.capture import ModuleCall, Recording, in_mode, is_meta, trace_region
from moecompile.errors import CaptureError
from moecompile.nn.existing import correction_bias
from moecompile.passes.existing import ExistingRegion, RewriteExisting, computing
from moecompile.passes.match import FFNMatch, GraphView, find_ffns
from moecompile.passes.match_experts import (
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
from moecompile.passes.swiglu import ffn_is_swiglu, is_swiglu
from moecompile.plan import ExpertsSite
from moecompile.sites.hooks import lost_hooks
from moecompile.sites.nouns import Site

_Traced = dict[tuple[object, ...], tuple[fx.GraphModule, FFNMatch] | str]  # structure -> an expert's FFN, or why none


def may_be_experts(module: nn.Module) -> bool:
    """Whether `module` holds experts in a form that is known, judged by its weights alone."""
    return holds_stacks(module) or bool(expert_modules(module)) or matrices_of(module) is not None


def find_existing(recording: Recording, refused: list[Site]) -> dict[str, ExistingRegion]:
    """Experts by path, in the order of their calls; what looks like experts and is not supported goes to `refused`."""
    found: dict[str, ExistingRegion] = {}
    traced: _Traced = {}
    for path, call in recording.calls.items():
        module = recording.model.get_submodule(path)
        seen = experts_call(_arguments(module, call))
        region: ExistingRegion | str | None
        if seen is not None:
            region = _region(path, module, call, seen, traced)
        else:
            region = _CALLED_OTHERWISE if holds_stacks(module) else None
        if isinstance(region, ExistingRegion):
            found[path] = region
        elif region is not None:
            where = path or "the model"
            refused.append(Site(fqn=path, kind="experts", where=where, status="not_matched", reason=region))
    return found


_CALLED_OTHERWISE = (
    "it holds stacked weights, but is not called with hidden states (T, D), expert ids (T, K) and weights (T, K)"
)


def experts_site(recording: Recording, path: str, region: ExistingRegion, index: int) -> ExpertsSite:
    """The noun for experts; groups and the correction bias are those of the router in the block around them."""
    match, block = region.match, recording.model.get_submodule(path.rpartition(".")[0])
    groups, top_groups = groups_of(block, region.module)
    ins = region.ffn[1].ins if region.ffn else ()
    bias_up = any(name.endswith("up_proj_bias") for name in match.weights) or any(linear.bias for linear in ins)
    down_bias = region.ffn[1].down.bias is not None if region.ffn else "down_proj_bias" in match.weights
    return ExpertsSite(
        fqn=path,
        form=match.form,
        d_model=match.call.d_model,
        d_ff=match.d_expert,
        num_experts=match.num_experts,
        top_k=match.call.top_k,
        groups=groups,
        top_groups=top_groups,
        correction_bias=correction_bias(block, match.num_experts) is not None,
        num_in_projections=len(ins) or (2 if match.gated else 1),
        bias_up=bias_up,
        bias_down=down_bias,
        activation=match.activation,
        index=index,
        swiglu=_is_swiglu(region),
    )


def _is_swiglu(region: ExistingRegion) -> bool:
    if region.ffn is not None:
        return ffn_is_swiglu(*region.ffn)
    return region.match.norm is None and is_swiglu(computing(region.match, region.module))


def _region(
    path: str, module: nn.Module, call: ModuleCall, seen: ExpertsCall, traced: _Traced
) -> ExistingRegion | str | None:
    """Experts, the reason why they are not supported, or None for a module without weights."""
    match: ExpertsMatch | str
    ffn = None
    if "forward" in vars(module):
        return "it has a forward of its own, beside that of its class, which would be lost"
    if children := expert_modules(module):
        ffn = _expert_ffn(module.get_submodule(children[0]), call, traced)
        match = ffn if isinstance(ffn, str) else _of_modules(seen, children, ffn[1])
    elif matrices_of(module):
        match = match_matrices(module, seen)
    elif any(True for _ in module.parameters()):
        match = match_stacked(module, seen)
    else:
        return None
    if isinstance(match, str) or isinstance(ffn, str):
        return str(match)
    region = ExistingRegion(match, module, ffn)
    return lost_hooks(path, module, lambda name: name != match.norm) or _unproven(region, call) or region


def _of_modules(seen: ExpertsCall, children: tuple[str, ...], ffn: FFNMatch) -> ExpertsMatch:
    return ExpertsMatch(
        call=seen, num_experts=len(children), d_expert=ffn.down.d_in, modules=children, activation=ffn.activation
    )


def _expert_ffn(expert: nn.Module, call: ModuleCall, traced: _Traced) -> tuple[fx.GraphModule, FFNMatch] | str:
    """The FFN of an expert that is a module of its own; experts of equal structure share one trace."""
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
        why = "".join(f": {miss.reason}" for miss in misses[:1])
        return f"one of its experts holds {len(matches)} FFNs, one is supported{why}"
    return graph_module, matches[0]


def _unproven(region: ExistingRegion, call: ModuleCall) -> str | None:
    """Why the rewritten experts may not compute what the module computes."""
    match, module = region.match, region.module
    if is_meta(module):
        # Classes of transformers declare their layout, and one-hot ids can mean nothing else.
        # The same holds of experts that are the identity, and of matrices by the names of DBRX.
        named = match.num_identity > 0 or match.are_matrices
        known = hasattr(module, "is_concatenated") or match.call.one_hot or named
        return None if known else "its class does not declare the layout, and on the meta device it cannot be tried"
    graph_module = RewriteExisting().run(region)
    wanted, got = _output(module, call), _output(graph_module, call)
    if not isinstance(wanted, Tensor) or wanted.shape != got.shape or wanted.dtype != got.dtype:
        return "it does not return one tensor like its hidden states"
    tolerance = torch.finfo(wanted.dtype).eps ** 0.5 * float(wanted.abs().max())
    if not float((wanted - got).abs().max()) <= tolerance:
        return f"the recorded call gives other outputs than its {', '.join(match.weights) or 'experts'} explain"
    if region.ffn is None and not torch.equal(_output(module, call, training=True), wanted):
        return "it computes something else in training mode"
    return None


@torch.no_grad()
def _output(module: nn.Module, call: ModuleCall, *, training: bool = False) -> Tensor:
    with torch.random.fork_rng(devices=[]), in_mode(module, training=training):
        out: Tensor = module.forward(*call.args, **call.kwargs)  # its own hooks go over to the graph
    return out


def _arguments(module: nn.Module, call: ModuleCall) -> Mapping[str, object]:
    """The call's arguments by the forward's names; those that are None or empty are left out."""
    bound = inspect.signature(module.forward).bind(*call.args, **call.kwargs)
    return {name: value for name, value in bound.arguments.items() if isinstance(value, Tensor) or value}
