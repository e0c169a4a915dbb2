"""Dense FFNs of a recorded model, and the smallest module that holds each, traced."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

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
from moecompile.match.linears import common_owner
from moecompile.match.patterns import FFNMatch
from moecompile.match.regions import Captured, Region, Site
from moecompile.match.swiglu import ffn_is_swiglu
from moecompile.match.view import GraphView
from moecompile.plan import FFNSite

_SHARED = "lies in an MoE block that the model has already (a shared expert); name it by experts.match to rewrite it"


@dataclass(frozen=True)
class RecordedFFN:
    """An FFN in the recorded dataflow. fqn: of its site. region: path of the smallest module that ran all of it."""

    fqn: str
    region: str
    ffn: FFNMatch

    @property
    def owners(self) -> set[str]:
        """Paths, seen from the region, of the modules whose Python ran a node of it."""
        ran_by = {str(node.meta["owner"]) for node in self.ffn.nodes}
        return {path.removeprefix(self.region).removeprefix(".") for path in ran_by}


def find_dense(
    recording: Recording, experts: Collection[str], refused: list[Site], named: Callable[[str], bool]
) -> list[RecordedFFN]:
    """FFNs outside of MoE blocks; near misses and shared experts, which lie inside, are added to `refused`.

    Args:
        experts: paths of the experts that the model has; their parents are its MoE blocks, but for whole layers: what
            lies beside the experts of Gemma 4 is the layer's, not a block's.
        named: whether a shared expert is asked for by its path.
    """
    layers = set(layers_of(recording.model))
    blocks = {path.rpartition(".")[0] for path in experts}
    blocks = {path for path in blocks if recording.model.get_submodule(path) not in layers}
    matches, misses = find_ffns(GraphView(recording.graph, recording.model))
    for miss in misses:
        where = common_owner([miss.weight])
        if _inside(where, experts):
            continue  # one of the experts
        reason = _SHARED if _inside(where, blocks) else miss.reason
        refused.append(Site(fqn=where, kind="-", where=where, status="not_matched", reason=reason))
    found = []
    for match in matches:
        region = _region_of(match)
        if _inside(region, experts):
            continue  # one of the experts
        if _inside(region, blocks) and not named(region):
            refused.append(Site(fqn=region, kind=match.kind, where=region, status="not_matched", reason=_SHARED))
        else:
            found.append(RecordedFFN(region, region, match))
    return _told_apart(_in_outer_regions(found))


def _inside(path: str, owners: Collection[str]) -> bool:
    return any(path == owner or path.startswith(f"{owner}.") for owner in owners)


def _region_of(match: FFNMatch) -> str:
    """The smallest module that ran every node of the match."""
    owners = [str(node.meta["owner"]) for node in match.nodes]
    # A linear is run by its own module, whose parent is meant; the others are run by the region or below it.
    return common_owner([f"{owner}.x" for owner in owners])


def _in_outer_regions(found: list[RecordedFFN]) -> list[RecordedFFN]:
    """FFNs whose region is part of another one's Python are in that region: a module can be replaced once."""
    outer = list(found)
    for i, item in enumerate(found):
        for other in found:
            prefix = f"{other.region}." if other.region else ""
            below = item.region != other.region and item.region.startswith(prefix)
            if below and _inlined([other]) & {item.region[len(prefix) :]}:
                outer[i] = replace(outer[i], fqn=other.region, region=other.region)
    return outer


def _told_apart(found: list[RecordedFFN]) -> list[RecordedFFN]:
    """FFNs of one region are called after their last linears."""
    regions = [item.region for item in found]
    return [
        item
        if regions.count(item.region) == 1
        else replace(item, fqn=f"{item.region}@{item.ffn.down.weight.removeprefix(f'{item.region}.')}")
        for item in found
    ]


def _inlined(items: Collection[RecordedFFN]) -> frozenset[str]:
    """Paths below the region of the modules that own a node of the FFNs, and of all modules around these."""
    paths: set[str] = set()
    for owner in set().union(*(item.owners for item in items)):
        parts = owner.split(".")
        paths.update(".".join(parts[:i]) for i in range(1, len(parts) + 1))
    return frozenset(paths)


def trace_all(recording: Recording, found: list[RecordedFFN], captured: Captured) -> None:
    """Traces the regions of the FFNs; FFNs whose region cannot be traced are refused.

    Regions of equal structure that are called alike are traced once and share the graph.
    """
    traced: dict[tuple[object, ...], fx.GraphModule] = {}
    by_region: dict[str, list[RecordedFFN]] = {}
    for item in found:
        by_region.setdefault(item.region, []).append(item)
    regions: dict[str, Region] = {}
    reasons: dict[str, str] = {}
    for path, items in by_region.items():
        try:
            regions[path] = _trace(recording, path, items, traced, reasons)
        except MoecompileError as error:
            reasons |= {item.fqn: str(error) for item in items}
    _leave_stateful(recording, regions, reasons)
    index = 0
    for path, items in by_region.items():
        for item in items:
            if item.fqn in reasons:
                where, reason = item.region or "the model", reasons[item.fqn]
                captured.refused.append(
                    Site(fqn=item.fqn, kind=item.ffn.kind, where=where, status="not_matched", reason=reason)
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
    """Drops regions whose Python takes another way when the model keeps a cache or a state, as in `generate`."""
    asking = {path: region for path, region in regions.items() if region.graph.meta.get("asserted")}
    if not asking:
        return
    for path, call in calls_with_caches(recording, asking).items():
        if rule := broken_rule(asking[path].graph, asking[path].module, call):
            reasons |= dict.fromkeys(asking[path].matches, f"its Python does something else with a cache: {rule}")
            del regions[path]


def ffn_site(fqn: str, root: fx.GraphModule, match: FFNMatch, index: int) -> FFNSite:
    """The noun for a match in the graph of `root`."""
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
    items: list[RecordedFFN],
    traced: dict[tuple[object, ...], fx.GraphModule],
    reasons: dict[str, str],
) -> Region:
    """The traced region; for each site that its graph does not hold, the reason is added to `reasons`."""
    if path not in recording.calls:
        raise CaptureError(f"its region {path or 'the model'} is not called as a module")
    module = recording.model.get_submodule(path)
    graph_module = _traced(module, recording.calls[path], _inlined(items), traced)
    matches, misses = find_ffns(GraphView(graph_module.graph, graph_module))
    prefix = f"{path}." if path else ""
    by_weight = {prefix + match.down.weight: match for match in matches}
    why = {prefix + miss.weight: miss.reason for miss in misses}
    found: dict[str, FFNMatch] = {}
    for item in items:
        weight = item.ffn.down.weight
        lost = _lost_hooks(path, module, by_weight[weight], items) if weight in by_weight else None
        if lost is not None:
            reasons[item.fqn] = lost
        elif weight in by_weight:
            found[item.fqn] = by_weight[weight]
        else:
            reasons[item.fqn] = why.get(weight, f"in its region {path or 'the model'} it is no FFN any more")
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    in_order = dict(sorted(found.items(), key=lambda item: order[item[1].down.node]))
    return Region(path=path, graph=graph_module, module=module, matches=in_order)


def _lost_hooks(path: str, region: nn.Module, match: FFNMatch, items: Collection[RecordedFFN]) -> str | None:
    """The first module whose hooks would not run any more: of the FFN, or one whose Python is traced through.

    Those of the region itself, whose place the graph takes, are kept.
    """
    parts = {str(node.target) for node in match.nodes if node.op == "call_module"}
    parts |= {linear.weight.rpartition(".")[0] for linear in (*match.ins, match.down)} | _inlined(items)
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
            pass  # structure is not all there is to it: it gets a trace of its own
    traced[key] = trace_region(module, call, inlined)
    return traced[key]


def _form(call: ModuleCall) -> tuple[object, ...]:
    """What a trace depends on: which arguments are tensors, and their shapes."""
    return tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf
        for leaf in tree_leaves((call.args, sorted(call.kwargs.items())))
        if isinstance(leaf, (Tensor, torch.dtype, int, float, str, bool, type(None)))
    )
