"""Finds the sites of a model, dense FFNs and existing experts, and the region that holds each.

A region is the smallest module that holds a whole FFN, or the experts module itself. Only the region is replaced;
attention, routers, caches, `generate()` and hooks around it stay as they are.

Algorithm:
  1. Find experts: modules that are called like experts, or that hold stacked weights.
  2. Decide the kind of site: `auto` selects the model's own experts if it has any, else its dense FFNs.
  3. Find FFNs by dataflow. FFNs inside an MoE block are shared experts and stay, unless they are named.
  4. Trace the regions of FFNs, if dense FFNs are selected.

Existing experts are recognized by their call, read from their weights, and proven like a traced region: on the recorded
call, the rewritten graph must compute what the module computes. The proof needs a rewrite, so the caller passes it in:
passes import match, not the other way round.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx, nn

from moecompile.capture import (
    Example,
    ModuleCall,
    Recording,
    broken_rule,
    calls_with_caches,
    is_meta,
    layers_of,
    record,
    trace_again,
    trace_region,
)
from moecompile.errors import CaptureError, ConfigError, MoecompileError
from moecompile.match.experts import (
    OWN,
    ExpertsCall,
    ExpertsMatch,
    RouterMatch,
    are_swiglu,
    expert_modules,
    experts_call,
    ffn_is_swiglu,
    groups_of,
    holds_stacks,
    match_matrices,
    match_stacked,
    matrices_of,
    own_router,
    skips_tokens,
    structure,
)
from moecompile.match.ffn import FFNMatch, find_ffns
from moecompile.match.linears import GraphView, common_owner, is_attribute
from moecompile.match.regions import Captured, Region, Site
from moecompile.nn.existing import correction_bias
from moecompile.plan import ExpertsSite, FFNSite
from moecompile.schema import SiteKind
from moecompile.torch_private import fake_tensors, hooks_of, hooks_of_weights, tree_leaves, tree_map_only

# -- hooks -------------------------------------------------------------------------------------------------------------


def lost_hooks(
    path: str, region: nn.Module, is_lost: Callable[[str], bool], weights: Collection[str] = ()
) -> str | None:
    """A message about the first module below the region that has hooks and would not be called any more.

    Hooks on a module that a graph replaces move to the graph; modules around it are not changed. Also
    warns, because the site stays as it is although the user asked for a rewrite.

    Args:
        path: of the region. is_lost: whether a module, by its path below the region, is not called any more.
        weights: those of the region that are replaced.
    """
    for name, module in region.named_modules(remove_duplicate=False):
        if name and not is_lost(name):
            continue
        for hook in hooks_of(module) if name else hooks_of_weights(region, weights):
            full = ".".join(filter(None, (path, name))) or "the model"
            reason = f"{full} has {hook}, which would not run any more: remove it, or put it on a module around"
            warnings.warn(f"{path or 'the model'} stays as it is: {reason}", stacklevel=2)
            return reason
    return None


# -- dense FFNs --------------------------------------------------------------------------------------------------------


_SHARED = "lies in an MoE block that the model has already (a shared expert); name it by experts.match to rewrite it"


@dataclass(frozen=True)
class RecordedFFN:
    """An FFN in the recorded graph. fqn: of its site. region: path of the smallest module that ran all of its nodes."""

    fqn: str
    region: str
    ffn: FFNMatch

    @property
    def owners(self) -> set[str]:
        """Paths, relative to the region, of the modules whose Python ran its nodes."""
        ran_by = {str(node.meta["owner"]) for node in self.ffn.nodes}
        return {path.removeprefix(self.region).removeprefix(".") for path in ran_by}


def find_dense(
    recording: Recording, experts: Collection[str], refused: list[Site], named: Callable[[str], bool]
) -> list[RecordedFFN]:
    """The FFNs outside of MoE blocks. Near misses and shared experts (FFNs inside MoE blocks) are added to `refused`.

    Args:
        experts: paths of the model's own experts. Their parents are MoE blocks, unless the parent is a whole layer, as
            in Gemma 4: the FFN beside the experts belongs to the layer there.
        named: whether experts.match names the path of a shared expert.
    """
    layers = set(layers_of(recording.model))
    blocks = {path.rpartition(".")[0] for path in experts}
    blocks = {path for path in blocks if recording.model.get_submodule(path) not in layers}
    matches, misses = find_ffns(GraphView(recording.graph, recording.model))
    for miss in misses:
        owner = common_owner([miss.weight])
        if _inside(owner, experts):
            continue  # one of the experts
        reason = _SHARED if _inside(owner, blocks) else miss.reason
        refused.append(Site(fqn=owner, kind="-", where=owner, status="not_matched", reason=reason))
    ffns = []
    for match in matches:
        region = _region_of(match)
        if _inside(region, experts):
            continue  # one of the experts
        if _inside(region, blocks) and not named(region):
            refused.append(Site(fqn=region, kind=match.kind, where=region, status="not_matched", reason=_SHARED))
        else:
            ffns.append(RecordedFFN(region, region, match))
    return _with_unique_names(_in_outer_regions(ffns))


def _inside(path: str, owners: Collection[str]) -> bool:
    return any(path == owner or path.startswith(f"{owner}.") for owner in owners)


def _region_of(match: FFNMatch) -> str:
    """The smallest module that ran every node of the match."""
    owners = [str(node.meta["owner"]) for node in match.nodes]
    # Its own module runs an nn.Linear, so take the parent of that; the region or its descendants run all other nodes.
    return common_owner([f"{owner}.x" for owner in owners])


def _in_outer_regions(ffns: list[RecordedFFN]) -> list[RecordedFFN]:
    """Moves FFNs whose region is inlined into another region to that region: a module can be replaced only once."""
    outer = list(ffns)
    for i, ffn in enumerate(ffns):
        for other in ffns:
            prefix = f"{other.region}." if other.region else ""
            below = ffn.region != other.region and ffn.region.startswith(prefix)
            if below and _inlined([other]) & {ffn.region[len(prefix) :]}:
                outer[i] = replace(outer[i], fqn=other.region, region=other.region)
    return outer


def _with_unique_names(ffns: list[RecordedFFN]) -> list[RecordedFFN]:
    """Names FFNs that share a region after their last linears."""
    regions = [ffn.region for ffn in ffns]
    return [
        ffn
        if regions.count(ffn.region) == 1
        else replace(ffn, fqn=f"{ffn.region}@{ffn.ffn.down.weight.removeprefix(f'{ffn.region}.')}")
        for ffn in ffns
    ]


def _inlined(ffns: Collection[RecordedFFN]) -> frozenset[str]:
    """Paths, relative to the region, of the modules that own a node of the FFNs, and of their ancestors."""
    paths: set[str] = set()
    for owner in set().union(*(ffn.owners for ffn in ffns)):
        parts = owner.split(".")
        paths.update(".".join(parts[:i]) for i in range(1, len(parts) + 1))
    return frozenset(paths)


def trace_all(recording: Recording, ffns: list[RecordedFFN], captured: Captured) -> None:
    """Traces the regions of the FFNs. FFNs whose region cannot be traced are refused.

    Regions with equal structure and equal calls are traced once and share the graph.
    """
    traced: dict[tuple[object, ...], fx.GraphModule] = {}
    by_region: dict[str, list[RecordedFFN]] = {}
    for ffn in ffns:
        by_region.setdefault(ffn.region, []).append(ffn)
    regions: dict[str, Region] = {}
    reasons: dict[str, str] = {}
    for path, region_ffns in by_region.items():
        try:
            regions[path] = _trace(recording, path, region_ffns, traced, reasons)
        except MoecompileError as error:
            reasons |= {ffn.fqn: str(error) for ffn in region_ffns}
    _leave_stateful(recording, regions, reasons)
    index = 0
    for path, region_ffns in by_region.items():
        for ffn in region_ffns:
            if ffn.fqn in reasons:
                where, reason = ffn.region or "the model", reasons[ffn.fqn]
                captured.refused.append(
                    Site(fqn=ffn.fqn, kind=ffn.ffn.kind, where=where, status="not_matched", reason=reason)
                )
        region = regions.get(path)
        if region is not None and region.matches:
            captured.regions[path] = region
            for fqn, match in region.matches.items():
                assert isinstance(match, FFNMatch)
                captured.sites.append(ffn_site(fqn, region.graph, match, index))
                captured.region_of[fqn] = path
                index += 1


def _leave_stateful(recording: Recording, regions: dict[str, Region], reasons: dict[str, str]) -> None:
    """Drops regions whose Python takes another branch when the model uses a cache or a state, as in `generate`."""
    guarded = {path: region for path, region in regions.items() if region.graph.meta.get("asserted")}
    if not guarded:
        return
    for path, call in calls_with_caches(recording, guarded).items():
        if rule := broken_rule(guarded[path].graph, guarded[path].module, call):
            reasons |= dict.fromkeys(guarded[path].matches, f"its Python does something else with a cache: {rule}")
            del regions[path]


def ffn_site(fqn: str, root: fx.GraphModule, match: FFNMatch, index: int) -> FFNSite:
    """The plan's description of a match in the graph of `root`."""
    return FFNSite(
        fqn=fqn,
        kind=match.kind,
        d_model=match.down.d_out,
        d_ff=match.down.d_in,
        bias_up=any(linear.bias is not None for linear in match.ins),
        bias_down=match.down.bias is not None,
        activation=match.activation,
        index=index,
        swiglu=ffn_is_swiglu(root, match),
    )


def _trace(
    recording: Recording,
    path: str,
    ffns: list[RecordedFFN],
    traced: dict[tuple[object, ...], fx.GraphModule],
    reasons: dict[str, str],
) -> Region:
    """The traced region. For each FFN that its graph does not hold, the reason is added to `reasons`."""
    if path not in recording.calls:
        raise CaptureError(f"its region {path or 'the model'} is not called as a module")
    module = recording.model.get_submodule(path)
    graph_module = _traced(module, recording.calls[path], _inlined(ffns), traced)
    matches, misses = find_ffns(GraphView(graph_module.graph, graph_module))
    prefix = f"{path}." if path else ""
    by_weight = {prefix + match.down.weight: match for match in matches}
    miss_reasons = {prefix + miss.weight: miss.reason for miss in misses}
    by_fqn: dict[str, FFNMatch] = {}
    for ffn in ffns:
        weight = ffn.ffn.down.weight
        lost = _lost_hooks(path, module, by_weight[weight], ffns) if weight in by_weight else None
        if lost is not None:
            reasons[ffn.fqn] = lost
        elif weight in by_weight:
            by_fqn[ffn.fqn] = by_weight[weight]
        else:
            reasons[ffn.fqn] = miss_reasons.get(weight, f"in its region {path or 'the model'} it is no FFN any more")
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    in_order = dict(sorted(by_fqn.items(), key=lambda entry: order[entry[1].down.node]))
    return Region(path=path, graph=graph_module, module=module, matches=in_order, runs=recording.runs[path])


def _lost_hooks(path: str, region: nn.Module, match: FFNMatch, ffns: Collection[RecordedFFN]) -> str | None:
    """The first module whose hooks would be lost: a part of the FFN, or a module that tracing inlines.

    Hooks of the region itself are kept: the graph takes its place.
    """
    parts = {str(node.target) for node in match.nodes if node.op == "call_module"}
    parts |= {linear.weight.rpartition(".")[0] for linear in (*match.ins, match.down)} | _inlined(ffns)
    parts.discard("")
    weights = {name for linear in (*match.ins, match.down) for name in (linear.weight, linear.bias) if name}
    return lost_hooks(
        path, region, lambda name: any(name == part or name.startswith(f"{part}.") for part in parts), weights
    )


def _traced(
    module: nn.Module,
    call: ModuleCall,
    inlined: frozenset[str],
    traced: dict[tuple[object, ...], fx.GraphModule],
) -> fx.GraphModule:
    key = (structure(module, inlined), inlined, _form(call))
    if key in traced:
        try:
            return trace_again(traced[key], module, call)
        except CaptureError:
            pass  # equal structure, but another function: trace it separately
    traced[key] = trace_region(module, call, inlined)
    return traced[key]


def _form(call: ModuleCall) -> tuple[object, ...]:
    """What a trace depends on: shapes and dtypes of tensor arguments, and values of the others."""
    return tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf
        for leaf in tree_leaves((call.args, sorted(call.kwargs.items())))
        if isinstance(leaf, (Tensor, torch.dtype, int, float, str, bool, type(None)))
    )


# -- existing experts --------------------------------------------------------------------------------------------------


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
            match = replace(match, router=_router(recording, path, match), skips=skips_tokens(recording, path))
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
    if between := _weights_between(expert, matches[0]):
        return f"its experts have weights between their linears ({between[0]}), for which a stack has no rows"
    return graph_module, matches[0]


def _weights_between(expert: nn.Module, ffn: FFNMatch) -> list[str]:
    """Parameters and buffers of the expert that its activation reads. A stack has one activation for all experts, and a
    folder's weights no place in it, so they are refused even where all experts share them.
    """
    read = {str(node.target) for between in ffn.pointwise for node in between.all_input_nodes if is_attribute(node)}
    called = tuple(f"{node.target}." for node in ffn.pointwise if node.op == "call_module")
    tensors = (*expert.named_parameters(remove_duplicate=False), *expert.named_buffers(remove_duplicate=False))
    return [name for name, _ in tensors if name in read or name.startswith(called)]


def _arguments(module: nn.Module, call: ModuleCall) -> Mapping[str, object]:
    """The arguments of the call by parameter name, without those that are None or empty."""
    bound = inspect.signature(module.forward).bind(*call.args, **call.kwargs)
    return {name: value for name, value in bound.arguments.items() if isinstance(value, Tensor) or value}


# -- all sites ---------------------------------------------------------------------------------------------------------


def record_model(model: nn.Module, example: Example) -> Recording:
    """Records one forward. On the meta device experts do not run, because they depend on values.

    If other parts of a meta model depend on values too, fake tensors often help, but take twenty times as long.
    """
    try:
        return record(model, example, opaque=may_be_experts)
    except CaptureError:
        if not is_meta(model):
            raise
    with fake_tensors() as mode:
        fake = tree_map_only(Tensor, partial(mode.from_tensor, static_shapes=True), example)
        return record(model, fake, opaque=may_be_experts)


def capture_regions(
    recording: Recording, prove: Prove, kind: SiteKind = SiteKind.auto, named: Callable[[str], bool] = lambda fqn: False
) -> Captured:
    """The sites of a recorded model, in model order.

    Args:
        prove: why the rewrite of existing experts may not compute the same; None if it does.
        named: whether experts.match names the path of a shared expert (an FFN inside an MoE block).

    Raises:
        ConfigError: `auto` finds only experts that cannot be rewritten, `existing` finds none, or some run more than
            once.
    """
    captured = Captured(idle=_idle(recording))
    existing = find_existing(recording, captured, prove)  # Step 1
    paths = [region.path for region, _ in existing]
    selected = _selected(kind, len(existing), captured.refused)  # Step 2
    experts = [*paths, *(site.fqn for site in captured.refused)]
    dense = find_dense(recording, experts, captured.refused, named)  # Step 3
    if selected is SiteKind.dense:
        captured.others += [_left(path, "experts", "experts.sites=dense takes dense FFNs alone") for path in paths]
    else:
        _check_run_once(recording, paths)
        captured.regions |= {region.path: region for region, _ in existing}
        captured.region_of |= {path: path for path in paths}
        captured.sites += [site for _, site in existing]
    if selected is SiteKind.existing:
        reason = f"experts.sites={kind.value} takes the experts that the model has"
        captured.others += [_left(match.fqn, match.ffn.kind, reason) for match in dense]
    else:
        trace_all(recording, dense, captured)  # Step 4
    order = {path: i for i, path in enumerate(recording.calls)}
    captured.sites.sort(key=lambda site: order[captured.region_of[site.fqn]])
    return captured


def _idle(recording: Recording) -> frozenset[str]:
    """Linears that did not run, in modules that did: these read their weights at most (Jamba's `dt_proj`). On the meta
    device experts run without what is in them.
    """
    model = recording.model
    ran = {model.get_submodule(path) for path in recording.calls}
    idle = [path for path, each in model.named_modules() if isinstance(each, nn.Linear) and each not in ran]
    owners = {path: model.get_submodule(path.rpartition(".")[0]) for path in idle}
    return frozenset(path for path, owner in owners.items() if owner in ran and not may_be_experts(owner))


def _check_run_once(recording: Recording, paths: Iterable[str]) -> None:
    """Refuses a model that loops over its experts (Inkling2-loop). Gradients would be right, but rows, memory and
    seconds are planned for one run, and losses of a router are those of its last.
    """
    for path in paths:
        if (runs := recording.runs[path]) > 1:
            raise ConfigError(
                "model", type(recording.model).__name__,
                f"runs {path or 'itself'} {runs} times in one forward; plans count the rows, memory and seconds of one "
                "run, and balance losses those of the last",
                "Use a model that runs its experts once",
            )  # fmt: skip


def _selected(kind: SiteKind, num_existing: int, refused: Sequence[Site]) -> SiteKind:
    """Resolves `auto`."""
    if kind in (SiteKind.dense, SiteKind.both) or num_existing:
        return SiteKind.existing if kind is SiteKind.auto else kind
    if refused:
        first = refused[0]
        raise ConfigError(
            "experts.sites", kind.value,
            f"the model has experts already ({first.fqn}), and they cannot be rewritten: {first.reason}",
            "Use experts.sites=dense to rewrite only its dense FFNs outside of MoE blocks",
        )  # fmt: skip
    if kind is SiteKind.existing:
        raise ConfigError("experts.sites", "existing", "the model has no experts", "Use auto or dense")
    return SiteKind.dense


def _left(path: str, kind: str, reason: str) -> Site:
    return Site(fqn=path, kind=kind, where=path or "the model", status="left", reason=reason)


def graph_sites(graph_module: fx.GraphModule) -> dict[FFNSite, FFNMatch]:
    """The FFNs of a user's graph. Sites with the same owner are distinguished by the name of their last node."""
    matches, _ = find_ffns(GraphView(graph_module.graph, graph_module))
    owners = [common_owner([m.down.weight, *(linear.weight for linear in m.ins)]) for m in matches]
    sites: dict[FFNSite, FFNMatch] = {}
    for i, (match, owner) in enumerate(zip(matches, owners, strict=True)):
        fqn = owner if owners.count(owner) == 1 else f"{owner}@{match.down.node.name}"
        sites[ffn_site(fqn, graph_module, match, i)] = match
    return sites


def list_sites(captured: Captured, planned: Container[str], why: str) -> list[Site]:
    """Every site of the selected kind with its status, then sites of the other kind and everything that was refused.

    why: those that are not planned are not.
    """
    matched = [
        Site(
            fqn=site.fqn,
            kind=site.kind,
            where=site.fqn or "the model",
            status="rewritten" if site.fqn in planned else "left",
            reason="" if site.fqn in planned else why,
        )
        for site in captured.sites
    ]
    return matched + captured.others + captured.refused
