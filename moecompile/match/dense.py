"""Finds the dense FFNs of a recorded model and traces the smallest module around each."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from moecompile.capture import (
    ModuleCall,
    Recording,
    broken_rule,
    calls_with_caches,
    layers_of,
    trace_again,
    trace_region,
)
from moecompile.errors import CaptureError, MoecompileError
from moecompile.match.experts import structure
from moecompile.match.ffn import find_ffns
from moecompile.match.hooks import lost_hooks
from moecompile.match.patterns import FFNMatch
from moecompile.match.regions import Captured, Region, Site
from moecompile.match.swiglu import ffn_is_swiglu
from moecompile.match.view import GraphView, common_owner
from moecompile.plan import FFNSite
from moecompile.torch_private import tree_leaves

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
    return Region(path=path, graph=graph_module, module=module, matches=in_order)


def _lost_hooks(path: str, region: nn.Module, match: FFNMatch, ffns: Collection[RecordedFFN]) -> str | None:
    """The first module whose hooks would be lost: a part of the FFN, or a module that tracing inlines.

    Hooks of the region itself are kept: the graph takes its place.
    """
    parts = {str(node.target) for node in match.nodes if node.op == "call_module"}
    parts |= {linear.weight.rpartition(".")[0] for linear in (*match.ins, match.down)} | _inlined(ffns)
    parts.discard("")
    return lost_hooks(path, region, lambda name: any(name == part or name.startswith(f"{part}.") for part in parts))


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
