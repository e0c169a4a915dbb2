"""Tiny models of transformers, dense and MoE, on which "nothing else changes" is tried."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moecompile.pipeline import Compilation, compile_with_report
from tests.existing_models import CONFIGS, moe_model
from tests.tiny import COPY4, config

VOCAB = 64
_ATTENTION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
_GATED = {**_ATTENTION, "num_key_value_heads": 2, "intermediate_size": 64}
DENSE: dict[str, dict[str, Any]] = {
    "llama": _GATED,
    "qwen3": {**_GATED, "head_dim": 8},
    "gpt_neox": {**_ATTENTION, "intermediate_size": 64},
    "gemma2": {**_GATED, "head_dim": 8, "sliding_window": 8},
    "t5": {
        "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0,
    },
}  # fmt: skip
_MOE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_GATED, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**_GATED, "num_experts": 4, "num_experts_per_tok": 2},
}
EXISTING = (*CONFIGS, *_MOE)
ALL = (*DENSE, *EXISTING)
SEQ2SEQ = ("t5", "switch_transformers")
IDS = torch.randint(1, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


def model_of(name: str, **changes: Any) -> nn.Module:
    """The untouched model in evaluation mode, with random weights so large that its choices are clear."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if name in CONFIGS:
        return moe_model(name, **changes)
    settings = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "use_cache": False}
    made = AutoConfig.for_model(name, **{**settings, **DENSE.get(name, {}), **_MOE.get(name, {}), **changes})
    made._experts_implementation = "eager"
    torch.manual_seed(0)
    auto: Any = AutoModelForSeq2SeqLM if name in SEQ2SEQ else AutoModelForCausalLM
    model: nn.Module = auto.from_config(made)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


def inputs_of(name: str, ids: Tensor = IDS) -> dict[str, Tensor]:
    """Arguments of one forward."""
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if name in SEQ2SEQ else {"input_ids": ids}


def rewrite(model: nn.Module, name: str, *overrides: str) -> Compilation:
    """Compiles in place: dense FFNs to copied experts, experts that the model has to themselves."""
    device = next(model.parameters()).device
    example = {key: ids.to(device) for key, ids in inputs_of(name).items()}
    return compile_with_report(model, config(*COPY4, *overrides), example=example)
