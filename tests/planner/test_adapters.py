"""Which weights get adapters, what is counted, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.plan import ExpertAdapters, ExpertsSite, FFNSite, Plan
from moecompile.planner import ModelFacts
from moecompile.planner.build_plan import build_plan

LORA = ["adapters=lora", "adapters.rank=4", "adapters.alpha=6"]
SITE = ExpertsSite(
    fqn="layers.0.mlp.experts", d_model=8, d_ff=16, num_experts=4, top_k=2, activation="SiLU", index=0, swiglu=True,
    correction_bias=True,
)  # fmt: skip
LINEARS = {
    "layers.0.attn.q": (8, 8),
    "layers.0.attn.o": (8, 8),
    "layers.0.mlp.gate": (8, 4),
    "layers.0.mlp.up_proj": (8, 6),
}
STACKS = 4 * 3 * 8 * 16
FACTS = ModelFacts(params_total=STACKS + 500, params_embedding=100, num_layers=1, linears=LINEARS)


def planned(*overrides: str, site: ExpertsSite | FFNSite = SITE) -> Plan:
    return build_plan([site], compose_config([*LORA, *overrides]), FACTS)


def test_all_experts_and_all_linears_but_routers() -> None:
    plan = planned()
    (layer,) = plan.layers
    assert layer.adapters == ExpertAdapters(rank=4, alpha=6.0, weights=("gate_up_proj", "down_proj"))
    assert layer.adapters.scale == 1.5 and not layer.fused
    assert plan.adapters is not None
    assert plan.adapters.linears == ("layers.0.attn.q", "layers.0.attn.o", "layers.0.mlp.up_proj")
    assert plan.adapters.as_parameters == ("layers.0.mlp.up_proj",)
    assert build_plan([SITE], compose_config([]), FACTS).layers[0].fused  # without adapters
    assert plan.hash != planned("adapters.alpha=7").hash


def test_linears_that_do_not_run_get_none() -> None:
    """Nor does a router that chooses among identity experts too."""
    facts = replace(FACTS, idle=frozenset({"layers.0.attn.o"}), linears={**LINEARS, "layers.0.mlp.gate": (8, 7)})
    plan = build_plan([replace(SITE, num_identity=3)], compose_config([*LORA, "adapters.experts=null"]), facts)
    assert plan.adapters is not None and plan.adapters.linears == ("layers.0.attn.q", "layers.0.mlp.up_proj")


def test_patterns_choose_by_path() -> None:
    plan = planned("adapters.dense='*.attn.q'", "adapters.experts='*.down_proj'")
    assert plan.adapters is not None and plan.adapters.linears == ("layers.0.attn.q",)
    assert plan.layers[0].adapters is not None and plan.layers[0].adapters.weights == ("down_proj",)
    alone = planned("adapters.experts=null")
    assert alone.layers[0].adapters is None and alone.layers[0].fused


def test_only_trained_weights_have_gradients_and_moments() -> None:
    plan = planned("mesh.ranks_per_node=1")
    dense = 4 * (16 + 16 + 14)
    experts = 4 * 4 * ((8 + 32) + (16 + 8))
    assert plan.estimate is not None
    assert plan.estimate.params_trained == dense + experts
    assert plan.estimate.params_total == STACKS + 500 + dense + experts
    memory = plan.estimate.memory_bytes_per_rank
    assert (memory.grads, memory.optimizer) == (4 * (dense + experts), 8 * (dense + experts))
    trained = planned("mesh.ranks_per_node=1", "adapters.train_router=true").estimate
    assert trained is not None and trained.params_trained == dense + experts + 4 * 8


def test_a_trained_router_has_all_its_parameters() -> None:
    """Those of its bias, and of the width of the model where experts have a latent one."""
    alone = planned("mesh.ranks_per_node=1").estimate
    facts = replace(FACTS, router_params={SITE.fqn: 4 * 12 + 4})
    config = compose_config([*LORA, "mesh.ranks_per_node=1", "adapters.train_router=true"])
    trained = build_plan([SITE], config, facts).estimate
    assert alone is not None and trained is not None
    assert trained.params_trained == alone.params_trained + 4 * 12 + 4


def test_two_ranks_halve_them() -> None:
    estimate = planned("mesh.ranks_per_node=2").estimate
    assert estimate is not None
    assert estimate.memory_bytes_per_rank.optimizer == 8 * estimate.params_trained // 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapters.dense='*.nothing'"], r"adapters\.dense=\*\.nothing: matches none of the 3 linears \(layers\.0\.attn\.q"),
        (["adapters.experts='*.up'"], r"adapters\.experts=\*\.up: matches none of the 2 weights of experts"),
        (["adapters.dense=null", "adapters.experts=null"], "there would be no adapters"),
        (["adapters.dropout=0.1"], "has no meaning for adapters of experts"),
        (["adapters.dropout=0.1", "adapters.experts=null"], r"names of experts \(layers\.0\.mlp\.up_proj\)"),
        (["adapters.kind=none"], r"adapters\.rank=4: has no effect without adapters\. Use adapters=lora"),
        (["balance.rule=bias"], r"router of layers\.0\.mlp\.experts, which is frozen"),
        (["adapters.rank=0"], r"adapters\.rank=0: must be at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(*overrides)


def test_dense_ffns_and_experts_that_are_modules_are_refused() -> None:
    ffn = FFNSite(
        fqn="layers.0.mlp", kind="gated", d_model=8, d_ff=16, bias_up=False, bias_down=False, activation="silu", index=0
    )
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp is a dense FFN that becomes experts"):
        planned(site=ffn)
    modules = ExpertsSite(
        fqn="layers.0.mlp.experts", form="modules", d_model=8, d_ff=16, num_experts=4, top_k=2, activation="", index=0
    )
    with pytest.raises(ConfigError, match="has one module per expert"):
        planned(site=modules)


def test_experts_of_a_form_without_adapters_are_refused_where_they_would_get_some() -> None:
    facts = replace(FACTS, no_adapters={SITE.fqn: "are one matrix per projection"})
    with pytest.raises(
        ConfigError, match=r"^adapters\.experts=\*: the experts of layers\.0\.mlp\.experts are one matrix"
    ):
        build_plan([SITE], compose_config(LORA), facts)
    assert build_plan([SITE], compose_config([*LORA, "adapters.experts=null"]), facts).layers[0].adapters is None
