"""`requires_grad` of what was there decides for what is made of it."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import moecompile
from moecompile.compose import compose_config
from moecompile.errors import PlanError
from moecompile.passes.trained import rounding_notes
from moecompile.pipeline import compile_with_report, plan_of
from moecompile.plan import Plan
from moecompile.report.plan_tables import print_plan
from tests.existing_models import moe_inputs, moe_model
from tests.tiny import COPY4, Gated, TinyGPT, UpDown, ids, tokens

SHARED = [
    "experts.init=virtual_group", "experts.granularity=4", "experts.num_shared=1", "experts.num_routed=3",
    "routing.top_k=3", "experts.shared_gate=true",
]  # fmt: skip


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen(model: nn.Module, *names: str) -> nn.Module:
    """Without a name: all of it."""
    for name in names or [name for name, _ in model.named_parameters()]:
        model.get_parameter(name).requires_grad_(False)
    return model


@pytest.mark.parametrize("overrides", [COPY4, SHARED], ids=["copied", "sliced and shared"])
@pytest.mark.parametrize("make", [lambda: Gated(bias=True), UpDown], ids=["gated", "up-down"])
def test_a_frozen_ffn_gives_frozen_experts_and_a_new_router_is_trained(make: type, overrides: list[str]) -> None:
    compiled = moecompile.compile_model(frozen(make()), overrides, example=tokens())
    new = {"router.weight"} | ({"shared_experts.gate_weight"} if overrides is SHARED else set())
    assert trained(compiled) == new
    estimate = plan_of(compiled).estimate
    assert estimate is not None
    assert estimate.memory_bytes_per_rank.optimizer == 8 * sum(compiled.get_parameter(name).numel() for name in new)
    out = compiled(tokens())
    out.square().sum().backward()
    assert {name for name, parameter in compiled.named_parameters() if parameter.grad is not None} == new


def test_each_kind_of_weight_for_itself() -> None:
    ffn = Gated(bias=True)
    names = [name for name, _ in ffn.named_parameters()]
    assert names == ["gate.weight", "gate.bias", "up.weight", "up.bias", "down.weight", "down.bias"]
    compiled = moecompile.compile_model(frozen(ffn, "gate.bias", "up.bias", "down.weight"), SHARED, example=tokens())
    assert trained(compiled) == {
        "router.weight", "experts.gate_up_proj", "experts.down_proj_bias", "shared_experts.gate_weight",
        "shared_experts.gate_proj.weight", "shared_experts.up_proj.weight", "shared_experts.down_proj.bias",
    }  # fmt: skip


def test_half_of_a_joined_weight_cannot_be_frozen() -> None:
    ffn = frozen(Gated(), "gate.weight")
    before = dict(ffn.named_parameters())
    says = (
        "the model.gate_up_proj=requires_grad: is made from weights of which some are trained (up.weight) and some are "
        "frozen (gate.weight). Train or freeze all of them, or leave this FFN as it is (experts.match)."
    )
    with pytest.raises(PlanError, match=re.escape(says)):
        moecompile.compile_model(ffn, COPY4, example=tokens())
    assert dict(ffn.named_parameters()) == before


@pytest.mark.parametrize("init", ["random", "drop"])
def test_experts_that_are_drawn_anew_are_trained(init: str) -> None:
    compiled = moecompile.compile_model(frozen(UpDown()), [*COPY4, f"experts.init={init}"], example=tokens())
    assert trained(compiled) == {name for name, _ in compiled.named_parameters()}


def test_steps_that_bf16_loses_are_said() -> None:
    model = TinyGPT().bfloat16()
    block = model.get_submodule("blocks.0") if hasattr(model, "blocks") else model
    frozen(block)
    left = sum(p.numel() for p in model.parameters() if p.requires_grad)
    (note,) = rounding_notes(model, compose_config([]))
    assert note.startswith(f"{left:,} trained weights are bf16, ") and "optimizer.bf16_weights=master" in note
    assert rounding_notes(model, compose_config(["optimizer.bf16_weights=stochastic"])) == []
    assert rounding_notes(TinyGPT(), compose_config([])) == []


def test_a_choice_that_is_printed() -> None:
    from io import StringIO

    from rich.console import Console

    model = TinyGPT()
    assert compile_with_report(TinyGPT(), COPY4, example=ids()).notes == []
    total = sum(parameter.numel() for parameter in model.parameters())
    block = frozen(model.get_submodule("blocks.0") if hasattr(model, "blocks") else model)
    count = sum(parameter.numel() for parameter in block.parameters())
    compiled = compile_with_report(model, COPY4, example=ids())
    first, *counts = compiled.notes
    assert first == (
        f"{count:,} of the model's {total:,} weights are frozen. Experts that are made from frozen weights stay frozen; "
        "new routers (and reinitialized experts) are trained"
    )
    parameters = [*compiled.model.parameters()]  # embeddings, attention and norms of both layers, experts, routers
    said = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in counts}
    assert said == {
        "trained:": sum(p.numel() for p in parameters if p.requires_grad),
        "frozen:": sum(p.numel() for p in parameters if not p.requires_grad),
    }
    text = StringIO()
    print_plan(compiled.plan, Console(file=text, width=200), compiled.notes)
    assert "weights are frozen" in text.getvalue()


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "switch_transformers"])
def test_experts_that_were_there_keep_theirs(architecture: str) -> None:
    inputs = moe_inputs(architecture, torch.zeros(1, 8, dtype=torch.int64))
    whole = moecompile.compile_model(moe_model(architecture), [], example=inputs)
    assert trained(whole) == {name for name, _ in whole.named_parameters()}
    model = moe_model(architecture)
    for module in model.modules():
        if "Experts" in type(module).__name__ or type(module).__name__ == "SwitchTransformersDenseActDense":
            frozen(module)
    before = {name for name in trained(model) if ".experts." not in name}
    compiled = moecompile.compile_model(model, [], example=inputs)
    assert isinstance(moecompile.plan_of(compiled), Plan)
    assert {name for name in trained(compiled) if ".experts." not in name} == before
    experts = {name for name, _ in compiled.named_parameters() if ".experts." in name}
    assert experts and not experts & trained(compiled)


def test_experts_that_differ_cannot_be_stacked() -> None:
    model = moe_model("switch_transformers")
    name = next(name for name, _ in model.named_parameters() if ".experts.expert_1.wo" in name)
    frozen(model, name)
    with pytest.raises(PlanError, match=r"down_proj=requires_grad: is made from weights of which some are trained"):
        moecompile.compile_model(model, [], example=moe_inputs("switch_transformers", torch.zeros(1, 8).long()))
