"""Finds the sites of a model, dense FFNs and existing experts, and the region that holds each.

A region is the smallest module that holds a whole FFN, or the experts module itself. Only the region is replaced;
attention, routers, caches, `generate()` and hooks around it stay as they are.

Algorithm:
  1. Find experts: modules that are called like experts, or that hold stacked weights (existing.py).
  2. Decide the kind of site: `auto` selects the model's own experts if it has any, else its dense FFNs.
  3. Find FFNs by dataflow (dense.py). FFNs inside an MoE block are shared experts and stay, unless they are named.
  4. Trace the regions of FFNs, if dense FFNs are selected.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import partial

from torch import Tensor, fx, nn

from moecompile.capture import Example, Recording, is_meta, record
from moecompile.errors import CaptureError, ConfigError
from moecompile.match.dense import ffn_site, find_dense, trace_all
from moecompile.match.existing import Prove, find_existing, may_be_experts
from moecompile.match.ffn import find_ffns
from moecompile.match.patterns import FFNMatch
from moecompile.match.regions import Captured, Site
from moecompile.match.view import GraphView, common_owner
from moecompile.plan import FFNSite
from moecompile.schema import SiteKind
from moecompile.torch_private import fake_tensors, tree_map_only


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
        ConfigError: `auto` finds only experts that cannot be rewritten, or `existing` finds none.
    """
    captured = Captured()
    existing = find_existing(recording, captured, prove)  # Step 1
    paths = [region.path for region, _ in existing]
    selected = _selected(kind, len(existing), captured.refused)  # Step 2
    experts = [*paths, *(site.fqn for site in captured.refused)]
    dense = find_dense(recording, experts, captured.refused, named)  # Step 3
    if selected is SiteKind.dense:
        captured.others += [_left(path, "experts", "experts.sites=dense takes dense FFNs alone") for path in paths]
    else:
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


def list_sites(captured: Captured, planned: Container[str]) -> list[Site]:
    """Every site of the selected kind with its status, then sites of the other kind and everything that was refused."""
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
    return matched + captured.others + captured.refused
