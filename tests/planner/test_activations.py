"""What a layer is predicted to keep for backward against what it does keep, and fusing foretold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from moecompile.bench import measure_layers
from moecompile.compose import compose_config
from moecompile.models import build_model, example_inputs
from moecompile.pipeline import compile_with_report, make_plan
from moecompile.plan import on_one_process
from moecompile.planner import ModelFacts, RunFacts
from moecompile.planner.activations import activation_bytes, moe_bytes
from moecompile.schema import Config

CPU = torch.device("cpu")
RUN = ["bench.rounds=1", "bench.warmup=1", "data.global_batch_size=4", "model.config.num_hidden_layers=2"]
SMALL = ["model.config.hidden_size=128", "model.config.intermediate_size=256"]


def kept(overrides: list[str]) -> tuple[float, float]:
    """Predicted and measured bytes of the first distinct layer, its input left out."""
    config = compose_config(["task=bench", *RUN, *overrides])
    model = build_model(config.model, config.seed)
    example = example_inputs(model, config.data.seq_len)
    plan = make_plan(model, config, example=example)
    (cost, *_) = measure_layers(model, plan, config, example, CPU)
    run = run_facts(config, cost.tokens)
    layer = on_one_process(plan).layer(cost.sites[0])
    predicted = moe_bytes(layer, on_one_process(plan).mesh, run, fused=True)
    return predicted, cost.moe_kept - cost.tokens * layer.site.d_model * run.compute_bytes


def run_facts(config: Config, tokens: int) -> RunFacts:
    precision = config.trainer.precision.value
    return RunFacts(
        tokens_per_rank=tokens,
        compute_bytes=2 if precision == "bf16_params" else 4,
        is_mixed=precision == "bf16_mixed",
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16_params", "bf16_mixed"])
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["experts.num_routed=32", "routing.top_k=6", "data.micro_batch_size=1"],
        ["experts=deepseek_moe", "routing=deepseek_v3", "routing.max_nodes=null", "model.config.intermediate_size=320"],
        ["routing.score=softmax_after_topk", "data.micro_batch_size=2"],
    ],
    ids=["copies", "many experts, few tokens", "shared, sigmoid", "softmax of the chosen"],
)
def test_a_fused_layer_keeps_what_is_predicted(settings: list[str], precision: str) -> None:
    predicted, measured = kept([*SMALL, *settings, f"trainer.precision={precision}"])
    assert predicted == pytest.approx(measured, rel=0.05)


def swiglu(**changes: bool) -> nn.Module:
    """A Llama with experts of another kind where `changes` says so."""
    from tests.models import tiny_llama

    return tiny_llama(hidden_act="gelu" if changes.get("gelu") else "silu", mlp_bias=changes.get("bias", False))


@pytest.mark.parametrize("changes", [{}, {"gelu": True}, {"bias": True}])
def test_the_plan_counts_one_op_where_the_pass_makes_one(changes: dict[str, bool]) -> None:
    _agrees(swiglu(**changes), is_one_op=not changes)


def test_experts_of_the_model_are_counted_so_too() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    _agrees(MixtralForCausalLM(MixtralConfig(**sizes)), is_one_op=True)
    _agrees(GptOssForCausalLM(GptOssConfig(**sizes, head_dim=8)), is_one_op=False)  # biases, a clamped activation


def _agrees(model: nn.Module, *, is_one_op: bool) -> None:
    config = compose_config(["data.seq_len=64", "trainer.checkpointing=none"])
    example = example_inputs(model, 8)
    compiled = compile_with_report(model, config, example=example)
    for graph in compiled.graphs["fused"].values():
        (call,) = [node for node in graph.graph.nodes if str(node.target).endswith("experts")]
        assert ("source_R" in call.kwargs) == is_one_op
    plan, run = compiled.plan, RunFacts(tokens_per_rank=4 * 64)
    bytes_of = [moe_bytes(plan.layers[0], plan.mesh, run, fused=fused) for fused in (False, True)]
    rest = 256 * 4 * (2 * 12 * 32 + 3 * 61)
    assert plan.estimate is not None
    found = plan.estimate.memory_bytes_per_rank.activations
    assert found == pytest.approx(rest + 2 * bytes_of[is_one_op])
    assert found != pytest.approx(rest + 2 * bytes_of[not is_one_op])


def test_with_exchanges_the_rows_received_are_kept() -> None:
    config = compose_config(["mesh.ranks_per_node=2", "dispatch=flat", *SMALL])
    model = build_model(config.model, 0)
    plan = make_plan(model, config, example=example_inputs(model, 8))
    layer, run = plan.layers[0], RunFacts(tokens_per_rank=100)
    local = on_one_process(plan)
    more = moe_bytes(layer, plan.mesh, run, fused=True) - moe_bytes(local.layers[0], local.mesh, run, fused=True)
    assert more == pytest.approx(100 * 2 * 128 * 4)  # flat sends a row for each of the two experts
    wide = replace(run, compute_bytes=4)
    facts = ModelFacts(params_total=0, fused=frozenset(layer.site.fqn for layer in plan.layers))
    assert activation_bytes(plan.layers, plan.mesh, facts, wide) < activation_bytes(
        plan.layers, plan.mesh, ModelFacts(params_total=0), wide
    )
