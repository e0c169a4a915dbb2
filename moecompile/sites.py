"""Finds the FFNs of a model and the region that holds each: recorded forward -> matches -> traced regions.

A region is the smallest module that holds a whole FFN. It alone is traced and replaced; attention, caches,
`generate()` and hooks around it stay as they are.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from moecompile.capture import Recording, trace_region
from moecompile.errors import CaptureError, MoecompileError
from moecompile.passes.match import FFNMatch, GraphView, find_ffns
from moecompile.passes.rewrite import common_owner
from moecompile.plan import FFNSite

Graphs = dict[str, fx.GraphModule]


@dataclass(frozen=True, kw_only=True)
class Site:
    """A line of the list of sites. status: `rewritten`, `left` (not selected) or `not_matched`, with the reason."""

    fqn: str
    kind: str
    where: str
    status: str
    reason: str = ""


@dataclass(kw_only=True)
class Captured:
    """Regions with an FFN, traced and matched. matches: region path -> the FFN in its graph.

    experts: experts modules that the model has already.
    """

    regions: Graphs
    matches: dict[str, FFNMatch]
    sites: list[FFNSite]
    refused: list[Site]
    experts: list[str]


def capture_regions(recording: Recording) -> Captured:
    """Matches FFNs in the recorded dataflow and traces the smallest module that holds each."""
    model = recording.model
    matches, misses = find_ffns(GraphView(recording.graph, model))
    captured = Captured(regions={}, matches={}, sites=[], refused=[], experts=existing_experts(recording))
    for miss in misses:
        where = common_owner([miss.weight])
        captured.refused.append(Site(fqn=where, kind="-", where=where, status="not_matched", reason=miss.reason))
    blocks = {experts.rpartition(".")[0] for experts in existing_experts(recording)}
    for match in matches:
        fqn = _region_of(match)
        if any(fqn == block or fqn.startswith(f"{block}.") for block in blocks):
            reason = "lies in an MoE block that the model has already (a shared expert)"
            captured.refused.append(Site(fqn=fqn, kind=match.kind, where=fqn, status="not_matched", reason=reason))
            continue
        try:
            graph_module, inner = _trace(model, fqn, recording, match)
        except MoecompileError as error:
            captured.refused.append(
                Site(fqn=fqn, kind=match.kind, where=fqn or "the model", status="not_matched", reason=str(error))
            )
            continue
        captured.regions[fqn], captured.matches[fqn] = graph_module, inner
        captured.sites.append(site_of(fqn, inner, len(captured.sites)))
    return captured


def _region_of(match: FFNMatch) -> str:
    """The smallest module that ran every node of the match."""
    owners = [str(node.meta["owner"]) for node in match.nodes]
    # A linear is run by its own module, whose parent is meant; the others are run by the region or below it.
    return common_owner([f"{owner}.x" for owner in owners])


def _trace(model: nn.Module, fqn: str, recording: Recording, match: FFNMatch) -> tuple[fx.GraphModule, FFNMatch]:
    if fqn not in recording.calls:
        raise CaptureError(f"its region {fqn or 'the model'} is not called as a module")
    graph_module = trace_region(model.get_submodule(fqn), recording.calls[fqn])
    inside, misses = find_ffns(GraphView(graph_module.graph, graph_module))
    prefix = f"{fqn}." if fqn else ""
    wanted = [found for found in inside if prefix + found.down.weight == match.down.weight]
    if len(inside) != 1 or not wanted:
        why = "".join(f": {miss.reason}" for miss in misses[:1] if not inside)
        raise CaptureError(f"its region {fqn or 'the model'} holds {len(inside)} FFNs, one is supported{why}")
    return graph_module, wanted[0]


def graph_sites(graph_module: fx.GraphModule) -> dict[FFNSite, FFNMatch]:
    """The FFNs of a graph that the user brought. Sites of one owner are told apart by the name of their last node."""
    matches, _ = find_ffns(GraphView(graph_module.graph, graph_module))
    owners = [common_owner([m.down.weight, *(linear.weight for linear in m.ins)]) for m in matches]
    sites: dict[FFNSite, FFNMatch] = {}
    for i, (match, owner) in enumerate(zip(matches, owners, strict=True)):
        fqn = owner if owners.count(owner) == 1 else f"{owner}@{match.down.node.name}"
        sites[site_of(fqn, match, i)] = match
    return sites


def existing_experts(recording: Recording) -> list[str]:
    """Paths of the experts modules that the model has already, known by their call: hidden (T, D), ids (T, K) and
    weights (T, K), as transformers calls all of its own.
    """
    return [fqn for fqn, call in recording.calls.items() if _is_experts_call(call.args)]


def _is_experts_call(args: tuple[object, ...]) -> bool:
    if len(args) != 3 or not all(isinstance(arg, Tensor) and arg.ndim == 2 for arg in args):
        return False
    hidden, ids, weights = cast(tuple[Tensor, Tensor, Tensor], args)
    return hidden.is_floating_point() and ids.dtype == torch.int64 and ids.shape == weights.shape


def site_of(fqn: str, match: FFNMatch, index: int) -> FFNSite:
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


def list_sites(captured: Captured, planned: Container[str]) -> list[Site]:
    """Every FFN with what became of it, then everything that was refused."""
    matched = [
        Site(
            fqn=site.fqn,
            kind=site.kind,
            where=site.fqn or "the model",
            status="rewritten" if site.fqn in planned else "left",
            reason="" if site.fqn in planned else "not selected by experts.match and experts.layers",
        )
        for site in captured.sites
    ]
    return matched + captured.refused
