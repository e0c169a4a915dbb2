"""Which weights of a model are matrices of hidden layers, and how the matrices lie in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moecompile.nn.adapters import own_router
from moecompile.nn.matrices import Layout, hidden_matrices
from moecompile.pipeline import compile_model, plan_of
from moecompile.runtime.weight_groups import weight_groups
from moecompile.schema import OptimizerConfig
from tests.existing_models import moe_inputs, moe_model
from tests.tiny import COPY4

ATTENTION = {f"self_attn.{name}_proj.weight": Layout() for name in "qkvo"}
EXISTING = ["balance.rule=none", "mesh=cpu_1"]


def in_layer(model: nn.Module, number: int) -> dict[str, Layout]:
    prefix = f"model.layers.{number}."
    found = hidden_matrices(model)
    assert all(name.startswith("model.layers.") for name in found)  # no embeddings, no head
    return {name.removeprefix(prefix): layout for name, layout in found.items() if name.startswith(prefix)}


@pytest.mark.parametrize(
    ("architecture", "experts"),
    [
        ("mixtral", {"mlp.experts.gate_up_proj": Layout(parts=2), "mlp.experts.down_proj": Layout()}),
        (
            "gpt_oss",
            {
                "mlp.experts.gate_up_proj": Layout(parts=2, interleaved=True, transposed=True),
                "mlp.experts.down_proj": Layout(transposed=True),
            },
        ),
    ],
)
def test_of_existing_experts_without_their_router(architecture: str, experts: dict[str, Layout]) -> None:
    model = moe_model(architecture)
    model = compile_model(model, EXISTING, example=moe_inputs(architecture, torch.arange(8).view(1, 8)))
    assert in_layer(model, 0) == ATTENTION | experts
    assert any("bias" in name and p.ndim == 2 for name, p in model.named_parameters()) is (architecture == "gpt_oss")


AS_MANY_ROWS: dict[str, Any] = {"n_routed_experts": 8, "moe_intermediate_size": 8}  # as Qwen3-Next has 512 of both


def test_a_shared_expert_with_a_row_per_expert_is_no_router() -> None:
    example = moe_inputs("deepseek_v3", torch.arange(8).view(1, 8))
    model = moe_model("deepseek_v3", **AS_MANY_ROWS)
    model = compile_model(model, [*EXISTING, "optimizer=muon"], example=example)
    found = hidden_matrices(model)
    assert {name: layout for name, layout in found.items() if ".mlp." in name and ".1." in name} == {
        "model.layers.1.mlp.experts.gate_up_proj": Layout(parts=2), "model.layers.1.mlp.experts.down_proj": Layout(),
        **{f"model.layers.1.mlp.shared_experts.{name}_proj.weight": Layout() for name in ("gate", "up", "down")},
    }  # fmt: skip
    estimate = plan_of(model).estimate
    assert estimate is not None and estimate.params_muon == sum(model.get_parameter(n).numel() for n in found)


def test_such_a_shared_expert_has_adapters_and_is_not_trained_as_a_router() -> None:
    model, overrides = moe_model("deepseek_v3", **AS_MANY_ROWS), ["adapters=lora", "adapters.train_router=true"]
    example = moe_inputs("deepseek_v3", torch.arange(8).view(1, 8))
    model = compile_model(model, [*EXISTING, *overrides], example=example)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and ".1.mlp" in name}
    assert {name for name in trained if "lora_" not in name} == {"model.layers.1.mlp.gate.weight"}
    assert {f"model.layers.1.mlp.shared_experts.gate_proj.lora_{side}.default.weight" for side in "AB"} <= trained


def test_logits_that_come_from_elsewhere_name_no_router() -> None:
    """A module behind the router's linear may return them, as one that caps them."""
    block = nn.ModuleDict({"gate": nn.Linear(8, 4), "cap": nn.Tanh(), "experts": nn.Identity()})
    for source in ("gate", "cap", None):
        assert [path for path, _ in own_router(block, block["experts"], 4, source)] == ["gate"]


def test_factors_of_adapters_are_matrices_of_their_own() -> None:
    model = moe_model("mixtral")
    overrides = [*EXISTING, "adapters=lora", "adapters.rank=4"]
    model = compile_model(model, overrides, example=moe_inputs("mixtral", torch.arange(8).view(1, 8)))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    found = hidden_matrices(model)
    assert trained <= found.keys()
    assert {found[name] for name in trained} == {Layout()}


class Stack(nn.Module):
    """Layers with what is no matrix of a hidden layer beside one that is."""

    def __init__(self, **in_layer: Any) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        layer = nn.ModuleDict({"up": nn.Linear(8, 16), "table": nn.Embedding(4, 8), "norm": nn.LayerNorm(8)})
        layer["conv"], layer["one"] = nn.Conv1d(8, 8, 3), nn.Linear(8, 1)
        self.layers = nn.ModuleList([layer])
        self.classifier = nn.Linear(8, 3)


def test_others_are_outside_of_layers_or_no_matrices() -> None:
    assert hidden_matrices(Stack()) == {"layers.0.up.weight": Layout()}


class ShortConvolution(nn.Module):
    """Filters of two dims beside a linear that makes others of the input (Inkling 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.static_weight, self.dynamic = nn.Parameter(torch.ones(3, 8)), nn.Linear(8, 6)


class ConvertedLinear(nn.Linear):
    """A linear by its class, no convolution by its name."""


def test_vectors_of_each_head_position_or_channel_are_no_matrices() -> None:
    model = Stack()
    layer: Any = model.layers[0]
    for name in ("A_log", "position_bias", "scale"):  # of Jamba's Mamba, DeepSeek-V4's compressor, Inkling 2's norms
        layer.register_parameter(name, nn.Parameter(torch.ones(4, 8)))
    layer["convolution"], layer["converted"] = ShortConvolution(), ConvertedLinear(8, 6)
    layer.register_parameter("upscale_proj", nn.Parameter(torch.ones(4, 8)))  # multiplies activations
    found = {
        f"layers.0.{name}" for name in ("up.weight", "convolution.dynamic.weight", "converted.weight", "upscale_proj")
    }
    assert hidden_matrices(model).keys() == found
    decays = {
        weight: group.weight_decay > 0 for group in weight_groups(model, OptimizerConfig()) for weight in group.weights
    }
    assert [decays[layer.get_parameter(name)] for name in ("A_log", "position_bias", "scale")] == [False] * 3
    assert decays[layer.upscale_proj] and decays[layer["convolution"].static_weight]  # as filters of other convolutions


def test_without_a_list_of_layers_all_matrices_count() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    assert list(hidden_matrices(model)) == ["1.weight", "3.weight"]
    compiled = compile_model(model, COPY4, example=torch.arange(6).view(1, 6))
    assert sorted(hidden_matrices(compiled).values(), key=str) == [Layout(), Layout()]


def test_linears_of_gpt2_are_stored_the_other_way() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8))
    found = hidden_matrices(model)
    assert list(found) == [
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert set(found.values()) == {Layout(transposed=True)}
