"""A plan without its mesh."""

from __future__ import annotations

import dataclasses

from moecompile.mesh import MeshSpec
from moecompile.plan.layers import DispatchPlan, ExpertPlacement, LayerPlan
from moecompile.plan.plan import Plan
from moecompile.plan.reductions import reductions


def on_one_process(plan: Plan) -> Plan:
    """The same model without a mesh: groups, experts and routers stay, every expert lives here."""
    mesh = MeshSpec(device=plan.mesh.device)
    return Plan(mesh=mesh, layers=tuple(map(on_one_rank, plan.layers)), reductions=reductions(mesh))


def on_one_rank(layer: LayerPlan) -> LayerPlan:
    """One layer with all of its experts on one rank."""
    placement = ExpertPlacement(num_experts=layer.placement.num_experts, ep=1)
    return dataclasses.replace(layer, placement=placement, dispatch=DispatchPlan(kind="local"))
