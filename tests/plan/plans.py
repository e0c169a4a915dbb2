"""A plan with every part filled in: a virtual group with a shared slice, on two nodes."""

from __future__ import annotations

from moecompile.plan import FFNSite, Plan
from moecompile.planner import ModelFacts
from moecompile.planner.build_plan import build_plan
from tests.tiny import config

OVERRIDES = (
    "mesh.num_nodes=2", "mesh.ranks_per_node=2", "experts.init=virtual_group", "experts.granularity=4",
    "experts.num_shared=1", "experts.num_routed=12", "routing.top_k=3", "routing.score=sigmoid", "routing.scale=2.5",
    "routing.groups=4", "routing.top_groups=1", "routing.max_nodes=1", "balance.rule=bias",
)  # fmt: skip


def a_plan(*overrides: str) -> Plan:
    """Two layers; `overrides` come on top of those above."""
    sites = [
        FFNSite(
            fqn=f"layers.{i}.mlp", kind="gated", d_model=16, d_ff=48, bias_up=False, bias_down=True,
            activation="silu, mul", index=i,
        )
        for i in range(2)
    ]  # fmt: skip
    return build_plan(sites, config(*OVERRIDES, *overrides), ModelFacts(params_total=20_000))
