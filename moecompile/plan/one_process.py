"""The plan of the same model on one process."""

from __future__ import annotations

import dataclasses

from moecompile.mesh import MeshSpec
from moecompile.plan.dispatch import DispatchPlan, can_fuse
from moecompile.plan.layers import LayerPlan
from moecompile.plan.plan import Plan
from moecompile.plan.reductions import reductions


def on_one_process(plan: Plan) -> Plan:
    """The same model without a mesh: experts and routers stay the same, and all experts are on one rank."""
    mesh = MeshSpec(device=plan.mesh.device)
    layers = tuple(map(on_one_rank, plan.layers))
    return Plan(mesh=mesh, layers=layers, reductions=reductions(mesh), adapters=plan.adapters)


def on_one_rank(layer: LayerPlan) -> LayerPlan:
    """One layer with all of its experts on one rank, fused unless the plan could have fused them and did not.

    Without back ends: it is what they are compared with.
    """
    placement = dataclasses.replace(layer.placement, ep=1, nodes=1, order=())
    dispatch = DispatchPlan(kind="local")
    fusable = can_fuse(layer.site, dispatch) and layer.adapters is None
    fused = fusable and (layer.fused or not can_fuse(layer.site, layer.dispatch))
    experts = dataclasses.replace(layer.experts, backend="")
    return dataclasses.replace(layer, experts=experts, placement=placement, dispatch=dispatch, fused=fused, cut_over=())
