"""The plan of a model's existing experts, as far as the model itself determines it."""

from __future__ import annotations

from moecompile.plan.dispatch import DispatchPlan, can_fuse
from moecompile.plan.experts import ExpertPlacement, ExpertsPlan
from moecompile.plan.layers import BalancePlan, LayerPlan, RoutingPlan
from moecompile.plan.sites import ExpertsSite
from moecompile.routing import NO_BALANCE


def own_routing(site: ExpertsSite, capacity_factor: float | None = None, drop: str = "none") -> RoutingPlan:
    """The routing of the model's own router, which is kept; what is over the capacity is dropped behind it."""
    return RoutingPlan(
        top_k=site.top_k,
        score="own",
        normalize=False,
        scale=1.0,
        groups=site.groups,
        top_groups=site.top_groups,
        group_score="max",
        capacity_factor=capacity_factor,
        drop=drop,
    )


def layer_of(
    site: ExpertsSite,
    placement: ExpertPlacement,
    dispatch: DispatchPlan,
    balance: BalancePlan | None = None,
    routing: RoutingPlan | None = None,
) -> LayerPlan:
    """The plan of one layer. balance, routing: None leaves the model's own router and what it chose unchanged."""
    experts = ExpertsPlan(
        num_routed=site.num_experts,
        granularity=1,
        num_shared=0,
        d_expert=site.d_ff,
        d_shared=0,
        init="existing",
        num_identity=site.num_identity,
        weight_scaling="none",
    )
    return LayerPlan(
        site=site,
        experts=experts,
        routing=routing or own_routing(site),
        balance=balance or NO_BALANCE,
        placement=placement,
        dispatch=dispatch,
        fused=can_fuse(site, dispatch),
    )


def layer_on_one_device(site: ExpertsSite) -> LayerPlan:
    """The layer without a mesh, with which the site is checked numerically before planning."""
    return layer_of(
        site,
        ExpertPlacement(num_experts=site.num_experts, ep=1, num_identity=site.num_identity),
        DispatchPlan(kind="local"),
    )
