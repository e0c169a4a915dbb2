"""Plans the dispatch of a layer: its kind, the dtype of rows in an exchange, and the overlap with computation."""

from __future__ import annotations

import dataclasses

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec, Part
from moecompile.plan import KINDS, DispatchPlan, ExpertPlacement, PlannedSite, RoutingPlan
from moecompile.planner.cost_model.inputs import links_of
from moecompile.planner.cost_model.seconds import LayerSeconds, choose_chunks, choose_overlap, row_seconds
from moecompile.planner.lending import plan_lending
from moecompile.planner.traffic import Wire, choose_dispatch, forward_traffic, row_bytes
from moecompile.ranges import Whole
from moecompile.schema import Config, DispatchKind, OverlapKind, Precision, WireDtype


def plan_dispatch(
    config: Config, mesh: MeshSpec, site: PlannedSite, d_expert: int, d_shared: int, routing: RoutingPlan,
    placement: ExpertPlacement,
) -> DispatchPlan:  # fmt: skip
    """The dispatch of one layer.

    Args:
        site: with the width of a row as d_model.
        d_expert, d_shared: widths of a routed expert, and of the shared experts in the region.

    Raises:
        ConfigError: the kind, the overlap, the number of chunks or lending is not possible here.
    """
    kind = _dispatch_kind(config, mesh, routing, placement, site)
    lending = plan_lending(config, mesh, site, d_expert, kind, routing, placement)
    if kind == "local":
        return lending  # nothing is sent
    overlap, chunks = _overlap(config, mesh, site, (d_expert, d_shared), kind, routing, placement)
    wire, backend = _wire_dtype(config).value, config.dispatch.backend or ""
    return dataclasses.replace(lending, kind=kind, wire_dtype=wire, overlap=overlap, chunks=chunks, backend=backend)


def _wire_dtype(config: Config) -> WireDtype:
    """Under autocast, experts cast their rows to bf16 and return bf16, so a cast before the exchange is exact."""
    if config.dispatch.wire_dtype is WireDtype.auto and config.trainer.precision is Precision.bf16_mixed:
        return WireDtype.bf16
    return config.dispatch.wire_dtype


def _dispatch_kind(
    config: Config, mesh: MeshSpec, routing: RoutingPlan, placement: ExpertPlacement, site: PlannedSite
) -> str:
    """For every configured kind: with one EP rank nothing is sent (local), and on one node hierarchical is dedup."""
    kind = config.dispatch.kind
    if kind is DispatchKind.local and mesh.ep > 1:
        raise ConfigError(
            "dispatch.kind", "local", f"experts are spread over mesh.ep={mesh.ep} ranks", "Use auto, flat or dedup"
        )
    if mesh.ep == 1:
        return str(DispatchKind.local.value)
    if kind is DispatchKind.auto and config.dispatch.backend:
        return next(name for name, row in KINDS.items() if row.for_backends)
    if kind is not DispatchKind.auto:
        return (mesh.nodes_per_ep_group == 1 and KINDS[kind.value].on_one_node) or str(kind.value)
    return choose_dispatch(placement, routing, mesh, _wire(config, mesh, site), links_of(config.hardware))


def _tokens(config: Config, mesh: MeshSpec) -> int:
    """Tokens of a micro-batch that a rank sends to experts."""
    return mesh.share(config.data.micro_batch_size * config.data.seq_len, Part.SEQUENCE, Part.TOKENS)


def _wire(config: Config, mesh: MeshSpec, site: PlannedSite) -> Wire:
    return Wire(
        d_model=site.d_model,
        tokens_per_rank=_tokens(config, mesh),
        element_bytes=row_bytes(_wire_dtype(config).value, 4),
    )


def _overlap(
    config: Config, mesh: MeshSpec, site: PlannedSite, widths: tuple[int, int], kind: str, routing: RoutingPlan,
    placement: ExpertPlacement,
) -> tuple[str, int]:  # fmt: skip
    """The overlap and the number of chunks."""
    overlap, chunks = config.dispatch.overlap, config.dispatch.chunks
    tokens = _tokens(config, mesh)
    if overlap is not OverlapKind.chunks:
        if chunks != "auto":
            raise ConfigError(
                "dispatch.chunks", chunks, f"needs overlap=chunks, but dispatch.overlap={overlap.value}",
                "Use dispatch.overlap=chunks, or chunks=auto",
            )  # fmt: skip
        if overlap is not OverlapKind.auto:
            return overlap.value, 1
    elif chunks != "auto":
        _check_chunks(chunks, tokens, mesh)
        return "chunks", int(chunks)
    if overlap is OverlapKind.auto and (KINDS[kind].no_overlap or config.dispatch.backend):
        return "none", 1
    times = _seconds(config, mesh, site, widths, kind, routing, placement)
    rows_per_expert = tokens * mesh.ep * routing.top_k / placement.num_experts
    if overlap is OverlapKind.chunks:
        return "chunks", choose_chunks(times, rows_per_expert)
    return choose_overlap(times, rows_per_expert)


def _check_chunks(chunks: int | str, tokens: int, mesh: MeshSpec) -> None:
    Whole(2).check("dispatch.chunks", chunks)
    cut = "".join(f" / mesh.{axis}" for axis in mesh.axes(Part.SEQUENCE, Part.TOKENS))
    if int(chunks) > tokens:
        raise ConfigError(
            "dispatch.chunks", chunks, f"a micro-batch has {tokens} tokens (data.micro_batch_size * data.seq_len{cut})",
            f"Use at most {tokens}",
        )  # fmt: skip


def _seconds(
    config: Config, mesh: MeshSpec, site: PlannedSite, widths: tuple[int, int], kind: str, routing: RoutingPlan,
    placement: ExpertPlacement,
) -> LayerSeconds:  # fmt: skip
    """Times of one layer's forward on one rank, from the bandwidths and the speed of `hardware`."""
    tokens, (routed, shared) = _tokens(config, mesh), (row_seconds(config.hardware, site, width) for width in widths)
    traffic = forward_traffic(kind, placement, routing, mesh, _wire(config, mesh, site))
    return LayerSeconds(
        wire=tokens * links_of(config.hardware).seconds(traffic.intra_node, traffic.inter_node),
        routed=tokens * routing.top_k * routed,
        shared=tokens * shared,
    )
