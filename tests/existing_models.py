"""Tiny models of transformers that are MoE already, with independently random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 64
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
_MLA = {
    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, **_ATTENTION},
    "gpt_oss": {
        "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8,
        **_ATTENTION,
    },
    "deepseek_v3": {
        "intermediate_size": 64, "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "num_mtp_layers": 0, **_MLA,
    },
    "qwen3_moe": {
        "intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3, "head_dim": 8,
        "mlp_only_layers": [0], **_ATTENTION,
    },
    "switch_transformers": {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1, "num_heads": 4, "num_experts": 4, "expert_capacity": 4, "dropout_rate": 0.0,
        "router_jitter_noise": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0,
    },
}  # fmt: skip
_CAUSAL = {"hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 32, "pad_token_id": 0}


def moe_model(architecture: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """The model in evaluation mode with its own experts, computed by transformers' plain loop."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    seq2seq = architecture == "switch_transformers"
    settings = {"vocab_size": VOCAB, **({} if seq2seq else _CAUSAL), **CONFIGS[architecture], **changes}
    config = AutoConfig.for_model(architecture, use_cache=False, eos_token_id=None, bos_token_id=None, **settings)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    auto: Any = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    model: nn.Module = auto.from_config(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), torch.device("cpu"):
        for parameter in model.parameters():
            if parameter.ndim >= 2 or (not parameter.is_meta and not parameter.any()):  # biases start at zero
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


def moe_inputs(architecture: str, ids: Tensor) -> dict[str, Tensor]:
    """Arguments of one forward."""
    both = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return both if architecture == "switch_transformers" else {"input_ids": ids}


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that separate experts have once they are stacked: `experts.expert_3.wi.weight` -> row 3 of
    `experts.experts.up_proj`.
    """
    result: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, found, rest = name.partition(".experts.expert_")
        if not found:
            result[name] = tensor
            continue
        expert, _, weight = rest.partition(".")
        role = {"wi.weight": "up_proj", "wo.weight": "down_proj"}[weight]
        parts.setdefault(f"{owner}.experts.experts.{role}", {})[int(expert)] = tensor
    return result | {name: torch.stack([rows[i] for i in sorted(rows)]) for name, rows in parts.items()}
