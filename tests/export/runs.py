"""Tiny trained models: a run directory whose experts, routers and correction biases are independently random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from moecompile.compose import compose_config
from moecompile.export import Run, write_native
from moecompile.models.build import build_model, example_inputs
from moecompile.pipeline import compile_with_report
from moecompile.schema import Config, ModelConfig, validate

SEQ = 24
_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "max_position_embeddings": 64}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
_GATED = {**_SIZES, **_ATTENTION, **_TOKENS, "intermediate_size": 48}
DENSE: dict[str, dict[str, Any]] = {
    "llama": {**_GATED, "tie_word_embeddings": True},
    "mistral": {**_GATED, "sliding_window": 8},
    "qwen2": _GATED,
    "qwen3": {**_GATED, "head_dim": 16},
    "olmo2": _GATED,
    "granite": {
        **_GATED, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "cohere2": {
        **_GATED, "sliding_window": 8, "logit_scale": 0.5,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50_000.0},
    },
    "ernie4_5": {**_GATED, "head_dim": 8},
    "hunyuan_v1_dense": {**_GATED, "head_dim": 8},
    "qwen3_5_text": {
        **_GATED, "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "deepseek_v3": {
        **_GATED, "num_key_value_heads": 4, "first_k_dense_replace": 3, "q_lora_rank": 16, "kv_lora_rank": 8,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_mtp_layers": 0,
    },
    "nemotron_h": {
        **{key: value for key, value in _GATED.items() if key != "num_hidden_layers"}, "head_dim": 8, "mamba_num_heads": 4,
        "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8,
        "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
    },
    "gpt_neox": {**_SIZES, "num_attention_heads": 4, "intermediate_size": 48, **_TOKENS},
}  # fmt: skip


def tiny_config(architecture: str, overrides: list[str], model: dict[str, Any] | None = None) -> Config:
    """A checked config. model: other keys for the model's config."""
    config = compose_config([*overrides, f"data.seq_len={SEQ}"])
    config.name = f"tiny_{architecture}"
    settings = {**DENSE.get(architecture, {}), **(model or {})}
    config.model = ModelConfig(name=architecture, architecture=architecture, config=settings)
    validate(config)
    return config


@torch.no_grad()
def scramble(model: nn.Module) -> None:
    """Every weight independently random; a correction bias as large as differences of scores."""
    generator = torch.Generator().manual_seed(7)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("correction_bias"):
                tensor.copy_(noise * 0.1)
            elif tensor.ndim > 1:
                tensor.copy_(noise * 0.15)
            else:  # norms stay near 1
                tensor.add_(noise * 0.05)


def tiny_run(folder: Path, config: Config) -> Path:
    """A run directory in native form. Without a bias rule the correction bias stays zero, as training leaves it."""
    model = build_model(config.model, config.seed)
    compiled = compile_with_report(model, config, example=example_inputs(model, SEQ), until="rewrite")
    scramble(compiled.model)
    if config.balance.rule.value in ("auto", "none"):
        for name, buffer in compiled.model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.zero_()
    folder.mkdir(parents=True)
    write_native(compiled.model, Run(folder, folder, config, compiled.plan), folder)
    return folder
