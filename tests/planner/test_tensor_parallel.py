"""What a model's tp_plan allows, and what is said about the rest."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import moecompile
from moecompile.compose import compose_config
from moecompile.errors import ConfigError, PlanError
from moecompile.match.regions import Captured
from moecompile.mesh import MeshSpec
from moecompile.pipeline.facts import no_split, splits_of
from moecompile.pipeline.shape import shape_of_model
from moecompile.plan import Plan, SplitModules
from moecompile.planner import ModelFacts
from moecompile.planner.cost_model.counts import parallel_bytes
from moecompile.planner.cost_model.inputs import inputs_of
from moecompile.planner.params import SplitFact
from moecompile.planner.tensor_parallel import split_modules
from tests.existing_models import moe_model
from tests.tiny import COPY4, TinyGPT, config, ids, tiny_llama

FOUR = MeshSpec(ranks_per_node=4, ep=4, tp=2)


def fact(**changes: Any) -> SplitFact:
    usual: dict[str, Any] = {
        "path": "layers.0.q_proj", "pattern": "layers.*.q_proj", "style": "colwise", "kind": "linear", "size": 32,
        "size_name": "out_features", "params": 1024, "site": None,
    }  # fmt: skip
    return SplitFact(**{**usual, **changes})


def facts(*split: SplitFact, **changes: Any) -> ModelFacts:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return ModelFacts(**{"params_total": 10_000, "split": split, "no_split": "", "heads": heads, **changes})


def test_modules_of_one_pattern_are_one_entry() -> None:
    found = split_modules([], FOUR, facts(fact(), fact(path="layers.1.q_proj"), fact(pattern="head", style="rowwise")))
    assert found == (
        SplitModules(modules="layers.*.q_proj", style="colwise"), SplitModules(modules="head", style="rowwise"),
    )  # fmt: skip


def test_what_becomes_experts_is_not_split() -> None:
    inside = fact(style="packed_colwise", site="layers.0.mlp")
    assert split_modules(["layers.0.mlp"], FOUR, facts(inside)) == ()
    with pytest.raises(ConfigError, match="packed_colwise"):
        split_modules([], FOUR, facts(inside))


def test_norms_of_heads_that_a_tp_plan_leaves_out() -> None:
    """GLM-4.5's: of one head they are summed over tp; a plan with others is refused."""
    model = tiny_llama(num_attention_heads=2, num_key_value_heads=2, hidden_size=16)
    attention = model.model.layers[0].self_attn
    attention.q_norm, attention.k_norm = nn.RMSNorm(8), nn.RMSNorm(16)
    found = {fact.path: fact.style for fact in splits_of(model, Captured()) if "norm" in fact.path}
    assert found == {
        "model.layers.0.self_attn.q_norm": "replicated_with_grad_allreduce", "model.layers.0.self_attn.k_norm": "unnamed"
    }  # fmt: skip
    message = (
        "mesh.tp=2: layers.0.q_proj is not in the model's tp_plan, which splits its heads, and its weights are not those "
        "of one. Use mesh.tp=1."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        split_modules([], FOUR, facts(fact(style="unnamed")))


def test_without_the_axis_nothing_is_split() -> None:
    assert split_modules([], MeshSpec(), facts(fact(size=3))) == ()


@pytest.mark.parametrize(
    ("tp", "of_model", "message"),
    [
        (2, facts(no_split="Tiny has no tp_plan"), "mesh.tp=2: Tiny has no tp_plan. Use mesh.tp=1."),
        (
            2, facts(fact(size=33)),
            "mesh.tp=2: layers.0.q_proj (colwise in the model's tp_plan) cannot be split into 2 equal parts: its "
            "out_features is 33. Use mesh.tp=1.",
        ),
        (
            4, facts(fact(path="layers.0.k_proj")),
            "mesh.tp=4: layers.0.k_proj (colwise in the model's tp_plan) cannot be split into 4 equal parts: it has "
            "num_key_value_heads=2. Use mesh.tp=2.",
        ),
        (
            4, facts(fact(style="local_params", kind="Sinks")),
            "mesh.tp=4: layers.0.q_proj (local_params in the model's tp_plan) cannot be split: this style is not "
            "carried outside of MoE layers. Use mesh.tp=1.",
        ),
        (
            2, facts(fact(kind="Conv1D")),
            "mesh.tp=2: layers.0.q_proj (colwise in the model's tp_plan) cannot be split: it is a Conv1D, not a plain "
            "linear. Use mesh.tp=1.",
        ),
    ],
)  # fmt: skip
def test_which_weight_and_why(tp: int, of_model: ModelFacts, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        split_modules([], replace(FOUR, tp=tp), of_model)


def test_dropout_of_attention_is_refused_by_each_of_its_names() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "vocab_size": 32}
    for rate, reason in ((0.0, ""), (0.1, "attn_pdrop=0.1 of GPTJForCausalLM would be drawn alike")):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gptj", attn_pdrop=rate, **sizes))
        assert no_split(model).startswith(reason) and bool(no_split(model)) is bool(reason)


def planned(model: nn.Module, *overrides: str) -> Plan:
    return moecompile.make_plan(model, [*overrides, "mesh.ranks_per_node=4", "mesh.tp=2"], example={"input_ids": ids()})


def test_a_model_of_transformers_is_split_by_its_own_plan() -> None:
    plan = planned(tiny_llama(num_attention_heads=2, num_key_value_heads=2, vocab_size=32), *COPY4)
    assert {entry.modules: entry.style for entry in plan.tensor_parallel} == {
        "model.embed_tokens": "embedding_rowwise",
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.self_attn.k_proj": "colwise",
        "model.layers.*.self_attn.v_proj": "colwise",
        "model.layers.*.self_attn.o_proj": "rowwise",
        "lm_head": "colwise_gather_output",
    }
    assert all(layer.cut_over == ("tp",) for layer in plan.layers)
    assert moecompile.plan.from_yaml(moecompile.plan.to_yaml(plan)) == plan


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_the_forecast_has_the_bytes_of_the_plan(name: str) -> None:
    """Forward as the estimate counts it from the modules; in backward an all-reduce before each split part and the
    head, and a gather of the rows' gradients.
    """
    model = moe_model(name)
    words = [
        "mesh.ranks_per_node=4",
        "mesh.tp=2",
        "hardware=h100",
        "data.micro_batch_size=2",
        "data.global_batch_size=4",
    ]
    given = compose_config(words)
    plan = moecompile.make_plan(model, given, example={"input_ids": ids()})
    assert plan.estimate is not None
    inputs = inputs_of(shape_of_model(model, plan), plan, given)
    parts = inputs.layout.over_tp
    splits_heads = any("self_attn" in path for path in model.config.base_model_tp_plan)  # DeepSeek-V3's since 5.25
    assert parts is not None and ("attention" in parts) == splits_heads and {"head", "embedding"} <= parts
    hidden, tokens = model.config.hidden_size, 2 * given.data.seq_len
    layers = model.config.num_hidden_layers
    dense = getattr(model.config, "first_k_dense_replace", 0) + len(plan.layers) * ("ffn" in parts)
    backward = (2 * layers * ("attention" in parts) + 2 * dense + len(plan.layers) + 2) * hidden * 4 / 2
    counted = parallel_bytes(inputs.model, inputs.layout, inputs.machine, inputs.software).tensor
    assert counted.intra == pytest.approx(tokens * (plan.estimate.tp_bytes_per_token.intra_node + backward))


def test_dense_layers_that_stay_are_split_too() -> None:
    plan = planned(tiny_llama(num_attention_heads=2, num_key_value_heads=2, vocab_size=32), *COPY4, "experts.layers=1:")
    assert SplitModules(modules="model.layers.*.mlp.down_proj", style="rowwise") in plan.tensor_parallel


def test_experts_that_the_model_has_are_not_split() -> None:
    paths = [entry.modules for entry in planned(moe_model("mixtral")).tensor_parallel]
    assert paths and not any("experts" in path for path in paths)


def test_models_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(ConfigError, match=re.escape("mesh.tp=2: TinyGPT has no tp_plan, which says how its weights")):
        moecompile.make_plan(TinyGPT(), config(*COPY4, "mesh.ranks_per_node=4", "mesh.tp=2"), example=ids())
    with pytest.raises(ConfigError, match=re.escape("mesh.tp=2: attention_dropout=0.1 of LlamaForCausalLM would be")):
        planned(tiny_llama(attention_dropout=0.1), *COPY4)


def test_a_plan_and_its_axis_belong_together() -> None:
    plan = planned(tiny_llama(num_attention_heads=2, num_key_value_heads=2, vocab_size=32), *COPY4)
    with pytest.raises(PlanError, match=re.escape("tensor_parallel=model.embed_tokens: is split, but mesh.tp=1")):
        replace(plan, mesh=replace(plan.mesh, tp=1))
    with pytest.raises(PlanError, match=re.escape("layers[0].cut_over=[tp]: does not fit mesh.tp=1")):
        replace(plan, mesh=replace(plan.mesh, tp=1), tensor_parallel=())
    with pytest.raises(PlanError, match=re.escape("tensor_parallel.lm_head=sideways: must be one of")):
        SplitModules(modules="lm_head", style="sideways")
