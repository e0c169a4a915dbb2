"""Models that are MoE already: refused or left alone, never rewritten by mistake."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moecompile.errors import ConfigError
from moecompile.pipeline import compile_with_report, make_plan

EXAMPLE = {"input_ids": torch.arange(8).reshape(1, 8)}


def model() -> nn.Module:
    """DeepSeek-V3 with one dense layer and one MoE layer with a shared expert."""
    config: Any = AutoConfig.for_model(
        "deepseek_v3", num_hidden_layers=2, first_k_dense_replace=1, hidden_size=32, intermediate_size=64,
        moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, vocab_size=64, max_position_embeddings=16, num_mtp_layers=0,
    )  # fmt: skip
    built: nn.Module = AutoModelForCausalLM.from_config(config)
    return built


def test_auto_refuses_a_model_that_has_experts() -> None:
    with pytest.raises(
        ConfigError, match=r"experts\.sites=auto: the model has experts already \(model\.layers\.1\.mlp"
    ):
        make_plan(model(), [], example=EXAMPLE)


def test_dense_leaves_the_shared_expert() -> None:
    compiled = compile_with_report(model(), ["experts.sites=dense"], example=EXAMPLE)
    assert [layer.site.fqn for layer in compiled.plan.layers] == ["model.layers.0.mlp"]
    refused = {site.fqn: site.reason for site in compiled.sites if site.status == "not_matched"}
    assert refused == {
        "model.layers.1.mlp.shared_experts": "lies in an MoE block that the model has already (a shared expert)"
    }
    assert compiled.step0_max_abs_diff is not None and compiled.step0_max_abs_diff < 1e-5
