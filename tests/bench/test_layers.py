"""What is timed as a layer is the layer: the graph of the compiled model, and a dense FFN with the activated width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moecompile.bench import measure_layers
from moecompile.bench.layers import DenseFFN, Pair, layer_pairs
from moecompile.models.build import example_inputs
from moecompile.nn import Router
from moecompile.passes.base import experts_calls
from moecompile.pipeline import compile_with_report, make_plan
from moecompile.report.graphs import graph_summary
from moecompile.schema import Config
from tests.tiny import UpDown, config, tiny_llama

CPU = torch.device("cpu")
SMALL = ("data.seq_len=16", "data.micro_batch_size=2", "bench.rounds=2", "bench.warmup=1")
SLICES = (
    "experts.init=virtual_group", "experts.granularity=4", "experts.num_shared=1", "experts.num_routed=12",
    "routing.top_k=3", "experts.layers='-2:'",
)  # fmt: skip


def pairs(model: nn.Module, settings: Config, example: Any = None) -> list[Pair]:
    example = example_inputs(model, 8) if example is None else example
    plan = make_plan(model, settings, example=example)
    return list(layer_pairs(model, plan, settings, example, CPU))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    )


@pytest.mark.parametrize("mesh", [(), ("mesh.ranks_per_node=2",)])
def test_a_rewritten_ffn_is_timed_as_the_graph_it_becomes(mesh: tuple[str, ...]) -> None:
    (pair,) = pairs(tiny_llama(num_hidden_layers=3), config(*SMALL, *SLICES, *mesh))
    assert pair.sites == ("model.layers.1.mlp", "model.layers.2.mlp")
    compiled = compile_with_report(tiny_llama(), config(*SLICES), example=example_inputs(tiny_llama(), 8))
    assert graph_summary(pair.moe) == graph_summary(compiled.graphs["fused"]["model.layers.1.mlp"])
    assert isinstance(pair.dense, DenseFFN)
    assert (
        pair.dense.down.in_features == 3 * 16 + 16 and pair.dense.up.out_features == 2 * 64
    )  # top-3 and the shared one


def test_a_layer_whose_experts_a_hash_chooses_has_new_ids_in_each_round() -> None:
    (pair,) = pairs(tiny_llama(), config(*SMALL, "routing.choice=hash", "experts.layers=0:1"))
    (router,) = (module for module in pair.moe.modules() if isinstance(module, Router))
    seen: list[Any] = []
    router.register_forward_hook(lambda module, args, out: seen.append(out[0].clone()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        pair.moe(*pair.draw(generator))
    assert seen[0].shape == (32, 2) and not torch.equal(*seen)
    (cost,) = measure_layers(
        tiny_llama(), make_plan(tiny_llama(), settings := config(*SMALL, "routing.choice=hash"), example=example_inputs(tiny_llama(), 8)),
        settings, example_inputs(tiny_llama(), 8), CPU,
    )  # fmt: skip
    assert cost.moe.cpu_ms > 0


def test_experts_of_the_model_are_timed_with_their_own_weights_and_without_a_router() -> None:
    model = mixtral()
    (pair,) = pairs(model, config(*SMALL))
    assert len(pair.sites) == 3 and len(experts_calls(pair.moe)) == 1
    assert not any(isinstance(module, Router) for module in pair.moe.modules())
    weight = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    assert torch.equal(pair.moe.get_parameter("gate_up_proj"), weight)
    assert pair.moe.get_parameter("gate_up_proj") is not weight  # gradients of the benchmark stay its own
    hidden, ids, weights = pair.draw(torch.Generator())
    assert (hidden.shape, ids.shape, weights.shape) == ((32, 32), (32, 2), (32, 2))
    experts = model.get_submodule("model.layers.0.mlp.experts")
    torch.testing.assert_close(pair.moe(hidden, ids, weights), experts(hidden, ids, weights))


def test_new_inputs_and_precision() -> None:
    (pair,) = pairs(tiny_llama(), config(*SMALL, "trainer.precision=bf16_params"))
    generator = torch.Generator().manual_seed(0)
    (first,), (second,) = pair.draw(generator), pair.draw(generator)
    assert first.shape == (2, 16, 32) and first.dtype == torch.bfloat16 and not torch.equal(first, second)
    kinds = {
        (isinstance(module, Router), parameter.dtype)
        for module in pair.moe.modules()
        for parameter in module.parameters(recurse=False)
    }
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_what_is_between_the_linears_may_need_whole_vectors() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.norm(self.up(x)).relu())

    model = nn.Sequential(Normed(), nn.Linear(8, 8))
    made = pairs(model, config(*SMALL, "experts.num_routed=4"), torch.randn(5, 8))
    assert [pair.dense.down.in_features for pair in made] == [32]
    assert made[0].dense(torch.randn(3, 8)).shape == (3, 8)


def test_costs_say_what_was_measured() -> None:
    model, settings = nn.Sequential(UpDown(), UpDown(), nn.Linear(8, 8)), config(*SMALL, "experts.num_routed=4")
    example = torch.randn(5, 8)
    plan = make_plan(model, settings, example=example)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    (cost,) = measure_layers(model, plan, settings, example, CPU)
    assert (cost.num_experts, cost.top_k, cost.d_expert, cost.tokens, cost.has_router) == (4, 2, 16, 32, True)
    assert len(cost.sites) == 2 and cost.ratio > 0 and cost.moe.cpu_ms > 0
    # x, up's output for relu's backward, relu's output for down: relu keeps its result, so (8 + 32) numbers a token.
    assert cost.dense_kept == 32 * (8 + 32) * 4
    assert cost.moe_kept > 0 and cost.kept_ratio == cost.moe_kept / cost.dense_kept
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16_params"])
def test_a_fused_layer_keeps_little_more_than_half_of_what_a_dense_ffn_keeps(precision: str) -> None:
    """Width 256, top-6 of 16, hidden size 512, behind a router of the model's own: the target is 0.6."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes = {"hidden_size": 512, "intermediate_size": 256, "num_local_experts": 16, "num_experts_per_tok": 6}
    block = MixtralSparseMoeBlock(MixtralConfig(**sizes))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    settings = config(*SMALL, "data.seq_len=512", "bench.rounds=1", f"trainer.precision={precision}")
    example = torch.randn(1, 4, 512)
    (cost,) = measure_layers(block, make_plan(block, settings, example=example), settings, example, CPU)
    assert 0.5 < cost.kept_ratio <= 0.6
