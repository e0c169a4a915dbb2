"""A tiny Llama whose forward takes SLEEP_S seconds longer: a run on a cluster that can be met at a step of one's choice."""

from __future__ import annotations

import os
import time
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

SMALL = (
    "model.factory=tests.cluster.slow_model:build", "mesh.device=cpu", "experts.num_routed=4", "data.vocab_size=300",
    "data.seq_len=32", "data.global_batch_size=4", "data.val_batches=1", "data.val_fraction=0.01", "optimizer.lr=0.01",
    "trainer.log_interval=1",
)  # fmt: skip
"""What the runs of these tests have in common."""

VOCAB_SIZE = 300


def build() -> LlamaForCausalLM:
    """What `model.factory=tests.cluster.slow_model:build` calls."""
    seconds = float(os.environ.get("SLEEP_S", "0"))

    def wait(module: Any, args: Any) -> None:
        time.sleep(seconds if module.training else 0)

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.register_forward_pre_hook(wait)
    return model
