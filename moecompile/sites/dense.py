"""Dense FFNs of a recorded model, and the smallest module that holds each, traced."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from moecompile.capture import ModuleCall, Recording, trace_again, trace_region
from moecompile.errors import CaptureError, MoecompileError
from moecompile.passes.match import FFNMatch, GraphView, find_ffns
from moecompile.passes.match_experts import structure
from moecompile.passes.rewrite import common_owner
from moecompile.plan import FFNSite
from moecompile.sites.nouns import Captured, DenseRegion, Site

_SHARED = "lies in an MoE block that the model has already (a shared expert)"


@dataclass(frozen=True)
class RecordedFFN:
    """An FFN in the recorded dataflow. fqn: path of its region."""

    fqn: str
    ffn: FFNMatch


def find_dense(recording: Recording, experts: Collection[str], refused: list[Site]) -> list[RecordedFFN]:
    """FFNs outside of MoE blocks; near misses and shared experts, which lie inside, are added to `refused`.

    Args:
        experts: paths of the experts that the model has; their parents are its MoE blocks.
    """
    blocks = {path.rpartition(".")[0] for path in experts}
    matches, misses = find_ffns(GraphView(recording.graph, recording.model))
    for miss in misses:
        where = common_owner([miss.weight])
        if _inside(where, experts):
            continue  # one of the experts
        reason = _SHARED if _inside(where, blocks) else miss.reason
        refused.append(Site(fqn=where, kind="-", where=where, status="not_matched", reason=reason))
    found = []
    for match in matches:
        fqn = _region_of(match)
        if _inside(fqn, experts):
            continue  # one of the experts
        if _inside(fqn, blocks):
            refused.append(Site(fqn=fqn, kind=match.kind, where=fqn, status="not_matched", reason=_SHARED))
        else:
            found.append(RecordedFFN(fqn, match))
    return found


def _inside(path: str, owners: Collection[str]) -> bool:
    return any(path == owner or path.startswith(f"{owner}.") for owner in owners)


def trace_all(recording: Recording, found: list[RecordedFFN], captured: Captured) -> None:
    """Traces the region of each FFN; those that cannot be traced are refused.

    Regions of equal structure that are called alike are traced once and share the graph.
    """
    traced: dict[tuple[object, ...], fx.GraphModule] = {}
    index = 0
    for item in found:
        try:
            region = _trace(recording, item, traced)
        except MoecompileError as error:
            where = item.fqn or "the model"
            captured.refused.append(
                Site(fqn=item.fqn, kind=item.ffn.kind, where=where, status="not_matched", reason=str(error))
            )
            continue
        captured.regions[item.fqn] = region
        captured.sites.append(ffn_site(item.fqn, region.match, index))
        index += 1


def ffn_site(fqn: str, match: FFNMatch, index: int) -> FFNSite:
    """The noun for a match."""
    return FFNSite(
        fqn=fqn,
        kind=match.kind,
        d_model=match.down.d_out,
        d_ff=match.down.d_in,
        bias_up=any(linear.bias is not None for linear in match.ins),
        bias_down=match.down.bias is not None,
        activation=match.activation,
        index=index,
    )


def _region_of(match: FFNMatch) -> str:
    """The smallest module that ran every node of the match."""
    owners = [str(node.meta["owner"]) for node in match.nodes]
    # A linear is run by its own module, whose parent is meant; the others are run by the region or below it.
    return common_owner([f"{owner}.x" for owner in owners])


def _trace(recording: Recording, item: RecordedFFN, traced: dict[tuple[object, ...], fx.GraphModule]) -> DenseRegion:
    fqn, match = item.fqn, item.ffn
    if fqn not in recording.calls:
        raise CaptureError(f"its region {fqn or 'the model'} is not called as a module")
    graph_module = _traced(recording.model.get_submodule(fqn), recording.calls[fqn], traced)
    inside, misses = find_ffns(GraphView(graph_module.graph, graph_module))
    prefix = f"{fqn}." if fqn else ""
    wanted = [found for found in inside if prefix + found.down.weight == match.down.weight]
    if len(inside) != 1 or not wanted:
        why = "".join(f": {miss.reason}" for miss in misses[:1] if not inside)
        raise CaptureError(f"its region {fqn or 'the model'} holds {len(inside)} FFNs, one is supported{why}")
    return DenseRegion(graph_module, wanted[0])


def _traced(module: nn.Module, call: ModuleCall, traced: dict[tuple[object, ...], fx.GraphModule]) -> fx.GraphModule:
    key = (structure(module), _form(call))
    if key in traced:
        try:
            return trace_again(traced[key], module, call)
        except CaptureError:
            pass  # structure is not all there is to it: it gets a trace of its own
    traced[key] = trace_region(module, call)
    return traced[key]


def _form(call: ModuleCall) -> tuple[object, ...]:
    """What a trace depends on: which arguments are tensors, and their shapes."""
    return tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf
        for leaf in tree_leaves((call.args, sorted(call.kwargs.items())))
        if isinstance(leaf, (Tensor, torch.dtype, int, float, str, bool, type(None)))
    )
