"""Adapters in a compiled model: what is there, what is trained, and first values."""

from __future__ import annotations

import copy

import pytest
import torch

import moecompile
from moecompile.errors import ConfigError, PassError, PlanError
from moecompile.nn.adapters import side_of
from moecompile.passes.adapters import AttachAdapters
from moecompile.passes.base import run_on_model
from moecompile.passes.trained import counts_of
from moecompile.pipeline import compile_with_report, plan_of
from tests.existing_models import moe_model

LORA = ["adapters=lora", "adapters.rank=4", "mesh.ranks_per_node=1"]
EXAMPLE = {"input_ids": torch.arange(8).reshape(1, 8)}


def compiled(architecture: str, *overrides: str, dtype: torch.dtype = torch.float32) -> moecompile.Compilation:
    return compile_with_report(moe_model(architecture, dtype=dtype), [*LORA, *overrides], example=EXAMPLE)


def test_exactly_the_adapters_are_trained_and_the_model_computes_as_before() -> None:
    done, before = compiled("deepseek_v3"), moe_model("deepseek_v3")
    trained = {name for name, parameter in done.model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in done.model.named_parameters() if side_of(name)}
    assert "model.layers.1.mlp.experts.lora_A.gate_up_proj" in trained
    assert "model.layers.1.mlp.shared_experts.gate_proj.lora_B.default.weight" in trained
    assert torch.allclose(done.model(**EXAMPLE).logits, before(**EXAMPLE).logits, atol=1e-5)


def test_trained_and_frozen_weights_are_counted_by_kind() -> None:
    done = compiled("mixtral")
    assert counts_of(done.model, done.plan) == {
        "adapters of experts": (6656, 0), "adapters of linears": (1792, 0), "experts": (0, 36864), "routers": (0, 256),
        "embeddings": (0, 4096), "other weights": (0, 6304),
    }  # fmt: skip
    assert "trained: 8,448 weights (adapters of experts 6,656, adapters of linears 1,792)" in done.notes
    assert done.plan.estimate is not None and done.plan.estimate.params_trained == 8448
    assert done.plan.estimate.params_total == sum(parameter.numel() for parameter in done.model.parameters())
    routers = compiled("mixtral", "adapters.train_router=true")
    assert counts_of(routers.model, routers.plan)["routers"] == (256, 0)


def test_a_frozen_part_of_any_model_is_noted() -> None:
    model = moe_model("mixtral")
    model.get_submodule("model.layers.0").requires_grad_(False)
    notes = compile_with_report(model, ["mesh.ranks_per_node=1"], example=EXAMPLE).notes
    assert any(note.startswith("frozen: ") and "experts 18,432" in note for note in notes)
    assert not any("frozen" in note for note in compile_with_report(
        moe_model("mixtral"), ["mesh.ranks_per_node=1"], example=EXAMPLE).notes)  # fmt: skip


def test_first_values_depend_on_seed_and_name_alone() -> None:
    one, same, other = (compiled("mixtral", f"seed={seed}").model.state_dict() for seed in (0, 0, 1))
    name = "model.layers.0.mlp.experts.lora_A.down_proj"
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
    assert one[name].abs().max() <= 48**-0.5 < 1.1 * one[name].abs().max()
    assert not torch.equal(one[name][0], one[name][1])
    assert not one[name.replace("lora_A", "lora_B")].any()


def test_adapters_of_narrow_weights_are_fp32_and_the_output_stays_narrow() -> None:
    model = moe_model("mixtral", dtype=torch.bfloat16, num_experts_per_tok=4)  # no choice that rounding could change
    done = compile_with_report(model, LORA, example=EXAMPLE)
    kinds = {side_of(name) is not None: parameter.dtype for name, parameter in done.model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    logits = done.model(**EXAMPLE).logits
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert done.model.get_parameter("model.layers.0.mlp.experts.lora_B.down_proj").grad is not None


def test_a_plan_for_another_model_is_refused() -> None:
    plan = compiled("mixtral").plan
    model = moe_model("mixtral")
    del model.get_submodule("model.layers.0.self_attn").q_proj
    with pytest.raises(PlanError, match=r"adapters\.linears=model\.layers\.0\.self_attn\.q_proj: is not a linear"):
        run_on_model([AttachAdapters(seed=0)], model, plan)


def test_a_frozen_adapter_violates_the_contract() -> None:
    done = compiled("mixtral")
    broken = copy.deepcopy(done.model)
    broken.get_parameter("model.layers.1.mlp.experts.lora_A.down_proj").requires_grad_(False)
    with pytest.raises(PassError, match=r"layers\.1\.mlp\.experts\.lora_A\.down_proj: is an adapter and is frozen"):
        AttachAdapters(seed=0).ensures(broken, plan_of(done.model))


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"need the package peft\. pip install 'moecompile\[lora\]'"):
        compiled("mixtral")
