"""Models of transformers of a unit's shape, their FLOPs by torch's counter, and the identity of weights."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from quality.study import DENSE, REAL, REAL_VOCAB, SEQ, SHAPES, VOCAB


def hf_config(size: str, arm: str) -> Any:
    """transformers' config of a unit's shape: a Llama, or a Mixtral with as many experts as the arm ends with."""
    from transformers import LlamaConfig, MixtralConfig

    sizes = SHAPES[size]
    common: dict[str, Any] = {
        "vocab_size": REAL_VOCAB if size == REAL else VOCAB, "max_position_embeddings": SEQ,
        "hidden_size": sizes.hidden, "num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if arm in DENSE:
        return LlamaConfig(intermediate_size=sizes.ffn, **common)
    slices = 4 if arm == "virtual" else 2
    experts = {"virtual": 16, "moe": 4, "parent_moe": 4}.get(arm, 8)
    return MixtralConfig(
        intermediate_size=sizes.ffn // slices, num_local_experts=experts, num_experts_per_tok=slices,
        sliding_window=None, **common,
    )  # fmt: skip


def new_model(size: str, arm: str, seed: int, **options: Any) -> nn.Module:
    """A random model of transformers."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model: nn.Module = AutoModelForCausalLM.from_config(hf_config(size, arm), **options)
    return model


def counted_flops(size: str, arm: str) -> float:
    """Operations per token, forward and backward, by torch's counter on transformers' own model."""
    model = new_model(size, arm, 0, attn_implementation="eager", **_eager(arm))
    ids = torch.randint(VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(0))
    counter = FlopCounterMode(display=False)
    with counter:
        logits = model(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    return counter.get_total_flops() / ids.numel()


def _eager(arm: str) -> dict[str, str]:
    return {} if arm in DENSE else {"experts_implementation": "eager"}


def weights_hash(model: nn.Module) -> str:
    """sha256 of all weights, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()
