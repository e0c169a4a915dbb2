"""build_plan: sites and config -> Plan. Everything that is impossible is an error that says what to change.

Algorithm:
  1. Validate the config and derive the mesh.
  2. Select the sites that the config names.
  3. Decide experts, routing, placement and dispatch for each.
  4. Derive the reductions and the estimate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatchcase

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.plan import (
    BalancePlan,
    DispatchPlan,
    ExpertPlacement,
    ExpertsPlan,
    FFNSite,
    LayerPlan,
    Plan,
    RoutingPlan,
    reductions,
)
from moecompile.planner import ModelFacts, Wire, choose_dispatch, estimate
from moecompile.schema import (
    BalanceRule,
    Config,
    DispatchKind,
    ExpertInit,
    LayerSettings,
    layer_settings,
    resolve_groups,
    site_slice,
    validate_settings,
    validate_transform,
)

_GIB = 2**30


def build_plan(sites: Sequence[FFNSite], config: Config, facts: ModelFacts) -> Plan:
    """The plan for the sites that `config` selects; with no site it is empty.

    Args:
        sites: all matched sites, in model order.
        facts: sizes of the dense model, for the estimate.

    Raises:
        ConfigError: a rule of the config or of a site is broken.
    """
    mesh = validate_transform(config)  # Step 1
    chosen = select(sites, config)  # Step 2
    layers = tuple(  # Step 3
        _layer(site, layer_settings(config, site.fqn, i, len(chosen)), config, mesh) for i, site in enumerate(chosen)
    )
    tokens = config.data.micro_batch_size * config.data.seq_len
    return Plan(  # Step 4
        mesh=mesh,
        layers=layers,
        reductions=reductions(mesh),
        estimate=estimate(layers, mesh, facts, tokens_per_rank=tokens, memory_bytes=config.hardware.memory_gib * _GIB),
    )


def select(sites: Sequence[FFNSite], config: Config) -> list[FFNSite]:
    """The sites that `experts.match` and `experts.layers` name.

    Raises:
        ConfigError: there are sites, but the config selects none of them.
    """
    experts = config.experts
    matched = [site for site in sites if fnmatchcase(site.fqn, experts.match)]
    if sites and not matched:
        known = ", ".join(site.fqn for site in sites[:3])
        raise ConfigError(
            "experts.match",
            experts.match,
            f"matches none of the {len(sites)} FFNs ({known}, ...)",
            "Change the pattern",
        )
    selected = matched[site_slice(experts.layers)]
    if matched and not selected:
        raise ConfigError(
            "experts.layers", experts.layers, f"selects none of {len(matched)} FFNs", "Use ':' for all of them"
        )
    return selected


def _layer(site: FFNSite, settings: LayerSettings, config: Config, mesh: MeshSpec) -> LayerPlan:
    validate_settings(settings, mesh)
    experts, routing, balance = settings.experts, settings.routing, settings.balance
    if site.d_ff % experts.granularity:
        raise ConfigError(
            "experts.granularity", experts.granularity, f"must divide d_ff={site.d_ff} of {site.fqn}",
            f"Use a divisor of {site.d_ff}",
        )  # fmt: skip
    groups, top_groups = resolve_groups(routing, experts.num_routed, mesh)
    d_expert = site.d_ff // experts.granularity
    routing_plan = RoutingPlan(
        top_k=routing.top_k,
        score=routing.score.value,
        normalize=routing.normalize,
        scale=routing.scale,
        groups=groups,
        top_groups=top_groups,
        group_score=routing.group_score.value,
        choice=routing.choice.value,
        bias=routing.bias,
        capacity_factor=routing.capacity_factor,
        drop="none" if routing.capacity_factor is None else routing.drop.value,
        jitter=routing.jitter,
        workload=routing.workload.value,
        skew=routing.skew,
    )
    placement = ExpertPlacement(num_experts=experts.num_routed, ep=mesh.ep)
    return LayerPlan(
        site=site,
        experts=ExpertsPlan(
            num_routed=experts.num_routed,
            granularity=experts.granularity,
            num_shared=experts.num_shared,
            d_expert=d_expert,
            d_shared=experts.num_shared * d_expert,
            init=ExpertInit(experts.init).value,
            shared_gate=experts.shared_gate and experts.num_shared > 0,
        ),
        routing=routing_plan,
        balance=BalancePlan(
            rule=balance.rule.value,
            rate=balance.rate if balance.rule is BalanceRule.bias else 0.0,
            update=balance.update.value,
            **dataclasses.asdict(balance.losses),
        ),
        placement=placement,
        dispatch=DispatchPlan(kind=_dispatch(config, mesh, routing_plan, placement, site)),
    )


def _dispatch(config: Config, mesh: MeshSpec, routing: RoutingPlan, placement: ExpertPlacement, site: FFNSite) -> str:
    """The dispatch of one layer; with one EP rank nothing has to travel, whatever is asked for."""
    kind = config.dispatch.kind
    if kind is DispatchKind.local and mesh.ep > 1:
        raise ConfigError(
            "dispatch.kind", "local", f"experts are spread over mesh.ep={mesh.ep} ranks", "Use auto, flat or dedup"
        )
    if mesh.ep == 1:
        return str(DispatchKind.local.value)
    if kind is not DispatchKind.auto:
        return str(kind.value)
    wire = Wire(d_model=site.d_model, tokens_per_rank=config.data.micro_batch_size * config.data.seq_len)
    return choose_dispatch(placement, routing, mesh, wire)
