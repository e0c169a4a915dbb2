"""A larger MoE from an MoE: experts and router rows are copied; outputs stay where that is promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moecompile
from moecompile.errors import ArgumentError, ConfigError
from moecompile.models import widen
from moecompile.models.widen import widen_experts
from tests.existing_models import moe_inputs, moe_model

IDS = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(0))
EXAMPLE = {"input_ids": IDS}
UNGROUPED = {"n_group": 1, "topk_group": 1}
EQUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax, normalised": ("mixtral", {}),
    "softmax, not normalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "softmax after top-k": ("gpt_oss", {}),
    "sigmoid, normalised": ("deepseek_v3", UNGROUPED),
}
CHANGED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "top-k kept": ("mixtral", {}, {"top_k": "kept"}, "copies tie with top-k kept"),
    "groups": ("deepseek_v3", {}, {}, "copies change the scores of expert groups"),
    "sigmoid": ("deepseek_v3", {**UNGROUPED, "norm_topk_prob": False}, {}, "2 copies of a sigmoid that is not normalised"),
    "by load": (
        "mixtral", {}, {"load": {f"model.layers.{i}.mlp.experts": [1, 2, 3, 40] for i in range(2)}},
        "experts have different numbers of copies",
    ),
}  # fmt: skip


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("name", EQUAL)
def test_scaled_top_k_keeps_the_outputs(name: str) -> None:
    architecture, changes = EQUAL[name]
    model = moe_model(architecture, dtype=torch.float64, **changes)
    before, weights = logits_of(model), {n: t.clone() for n, t in model.state_dict().items()}
    for factor in (2, 3):
        wide = widen_experts(model, factor, example=EXAMPLE)
        assert wide.reason is None and wide.max_abs_diff <= 2e-6
        assert float((logits_of(wide.model) - before).abs().max()) <= 2e-6  # scores in fp32
    assert all(torch.equal(tensor, weights[n]) for n, tensor in model.state_dict().items())


def test_a_near_tie_in_bf16_refuses_nothing_and_a_wrong_row_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding may send a token elsewhere in bf16: played by outputs that differ as long as they are bf16."""
    right = widen._logits

    def elsewhere(model: nn.Module, example: Any) -> Tensor:
        logits = right(model, example)
        is_wide = model.model.layers[0].mlp.experts.down_proj.shape[0] == 8
        return logits + 3 if is_wide and logits.dtype == torch.bfloat16 else logits

    monkeypatch.setattr(widen, "_logits", elsewhere)
    model = moe_model("mixtral", dtype=torch.bfloat16)
    assert widen_experts(model, 2, example=EXAMPLE).max_abs_diff >= 2.9
    monkeypatch.setattr(widen, "_logits", lambda model, example: right(model, example) * model.lm_head.weight.new_tensor(
        2.0 if model.model.layers[0].mlp.experts.down_proj.shape[0] == 8 else 1.0))  # fmt: skip
    with pytest.raises(ConfigError, match="outputs on the example are promised to stay but differ by"):
        widen_experts(model, 2, example=EXAMPLE)


@pytest.mark.slow
def test_a_model_of_bf16_stays_one() -> None:
    wide = widen_experts(moe_model("mixtral", dtype=torch.bfloat16), 2, example=EXAMPLE)
    assert {p.dtype for p in wide.model.parameters()} == {torch.bfloat16} and wide.reason is None


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGED)
def test_where_outputs_change_it_says_why(name: str) -> None:
    architecture, changes, options, reason = CHANGED[name]
    model = moe_model(architecture, **changes)
    wide = widen_experts(model, 2, example=EXAMPLE, **options)
    assert wide.reason is not None and wide.reason.startswith(reason)
    assert wide.max_abs_diff == pytest.approx(float((logits_of(wide.model) - logits_of(model)).abs().max()))
    assert wide.max_abs_diff > 1e-3  # so the reason is one
    assert reason in str(wide)


def test_every_weight_is_a_copy_of_the_planned_expert() -> None:
    model = moe_model("deepseek_v3")
    load = {"model.layers.1.mlp.experts": [9, 1, 1, 1, 5, 5, 1, 1]}
    wide = widen_experts(model, 2, example=EXAMPLE, top_k="kept", load=load)
    (rows,) = wide.copies.values()
    assert rows == [0, 0, 0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]  # four to each group of two
    old, new = model.state_dict(), wide.model.state_dict()
    assert old.keys() == new.keys()
    for name, tensor in new.items():
        per_expert = ".mlp.gate." in name or ".mlp.experts." in name
        assert torch.equal(tensor, old[name][rows] if per_expert else old[name]), name


@pytest.mark.slow
def test_noise_leaves_the_first_copies_and_everything_else() -> None:
    model = moe_model("mixtral")
    plain, noisy = (widen_experts(model, 2, example=EXAMPLE, noise=n).model.state_dict() for n in (0.0, 0.01))
    changed = {name for name in plain if not torch.equal(plain[name], noisy[name])}
    parts = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    assert changed == {f"model.layers.{i}.mlp.{part}" for i in range(2) for part in parts}
    for name in changed:
        assert torch.equal(plain[name][::2], noisy[name][::2])
        ratio = (noisy[name] - plain[name])[1::2].std() / plain[name].std()
        assert 0.006 < float(ratio) < 0.014
    again = widen_experts(model, 2, example=EXAMPLE, noise=0.01).model.state_dict()
    assert all(torch.equal(again[name], noisy[name]) for name in noisy)


def test_noise_is_for_what_grew() -> None:
    """A shared expert may have as many hidden numbers as there are experts then."""
    model = moe_model("deepseek_v3")
    shared = "model.layers.1.mlp.shared_experts.gate_proj.weight"
    factor = model.get_parameter(shared).shape[0] // model.config.n_routed_experts
    wide = widen_experts(model, factor, example=EXAMPLE, noise=0.1).model
    assert wide.config.n_routed_experts == model.get_parameter(shared).shape[0]
    for name, parameter in wide.named_parameters():
        before = model.get_parameter(name)
        assert before.shape != parameter.shape or torch.equal(before, parameter), name
    assert not torch.equal(*wide.model.layers[1].mlp.gate.weight[:2])


@pytest.mark.slow
def test_without_noise_copies_stay_alike() -> None:
    """Why noise is an option: copies that are chosen together have equal gradients."""
    grads = {}
    for noise in (0.0, 0.05):
        wide = widen_experts(moe_model("mixtral"), 2, example=EXAMPLE, noise=noise).model.train()
        wide(IDS).logits.square().mean().backward()
        grad = wide.model.layers[0].mlp.experts.down_proj.grad
        grads[noise] = float((grad[::2] - grad[1::2]).abs().max() / grad.abs().max())
    assert grads[0.0] < 1e-5 and grads[0.05] > 1e-3


def test_plain_transformers_loads_it_and_the_plan_counts_its_experts(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = moe_model("qwen3_moe")
    wide = widen_experts(model, 2, example=EXAMPLE)
    wide.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, experts_implementation="eager")
    assert (loaded.config.num_experts, loaded.config.num_experts_per_tok) == (16, 6)
    assert torch.equal(logits_of(loaded), logits_of(wide.model))
    plans = [moecompile.make_plan(m, [], example=EXAMPLE) for m in (model, loaded)]
    assert [plan.layers[0].experts.num_routed for plan in plans] == [8, 16]
    stack = 8 * 3 * 32 * 16 + 8 * 32  # of experts and router rows
    assert plans[1].estimate.params_total - plans[0].estimate.params_total == stack


def ernie() -> nn.Module:
    """Its correction bias is a parameter (1, E) beside a softmax."""
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    config = Ernie4_5_MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, moe_num_experts=8, moe_k=2, moe_num_shared_experts=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return Ernie4_5_MoeForCausalLM._from_config(config, experts_implementation="eager").eval()


def biases_of(model: nn.Module) -> dict[str, Tensor]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors if name.endswith("e_score_correction_bias")}


@pytest.mark.parametrize("std", [0.001, 0.03, 0.3])
@pytest.mark.parametrize("family", ["softmax", "sigmoid"])
def test_a_correction_bias_chooses_the_same_experts(family: str, std: float) -> None:
    """On 1024 tokens that were not compared: a bias that weighs more than before changes the experts of some."""
    model = ernie() if family == "softmax" else moe_model("deepseek_v3", **UNGROUPED)
    generator = torch.Generator().manual_seed(1)
    for bias in biases_of(model).values():
        bias.copy_(torch.randn(bias.shape, generator=generator) * std)
    tokens = torch.randint(1, 64, (64, 16), generator=generator)
    with torch.no_grad():
        before = model(tokens).logits
    for factor, top_k in ((2, "scaled"), (3, "scaled"), (2, "kept")):
        wide = widen_experts(model, factor, example=EXAMPLE, top_k=top_k)
        copied, share = biases_of(wide.model), factor if family == "softmax" else 1
        for name, bias in biases_of(model).items():
            assert torch.equal(copied[name], bias.repeat_interleave(factor, -1) / share)
        if top_k == "scaled":
            assert wide.reason is None
            with torch.no_grad():
                assert float((wide.model(tokens).logits - before).abs().max()) <= 1e-5


def test_frozen_weights_stay_frozen() -> None:
    model = moe_model("mixtral")
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].mlp.experts.down_proj.requires_grad_(False)
    wide = widen_experts(model, 2, example=EXAMPLE, noise=0.01).model
    frozen = {name for name, parameter in wide.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.embed_tokens.weight", "model.layers.1.mlp.experts.down_proj"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 1}, "factor=1: must be a whole number of at least 2"),
        ({"top_k": "more"}, "top_k=more: must be one of"),
        ({"noise": 1.0}, "noise=1.0: must be at least 0 and less than 1"),
        ({"load": {}}, "must have 4 numbers for model.layers.0.mlp.experts"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        widen_experts(moe_model("mixtral"), **{"factor": 2, "example": EXAMPLE, **options})


@pytest.mark.slow
def test_what_cannot_be_widened_says_why() -> None:
    with pytest.raises(ArgumentError, match=r"each expert of .* is a module, whose names would change"):
        widen_experts(moe_model("switch_transformers"), 2, example=moe_inputs("switch_transformers", IDS))
    from tests.tiny import tiny_llama

    with pytest.raises(ArgumentError, match="has no experts"):
        widen_experts(tiny_llama(), 2, example=EXAMPLE)
