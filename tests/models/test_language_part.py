"""Sizes of a language model that is a part of one that also sees: its config is a part of the model's (Gemma 3)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config

import moecompile
from moecompile.pipeline.facts import facts_of
from moecompile.pipeline.shape import shape_of_model
from moecompile.planner.cost_model.shapes import Attention

VOCAB, D, HEADS = 61, 16, 4


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """What `AutoModelForCausalLM` makes of its config: the whole model, with its tower."""
    text = {
        "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 4,
        "num_attention_heads": HEADS, "num_key_value_heads": 2, "sliding_window": 7, "max_position_embeddings": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    tower = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    ids = {"image_token_index": 60, "boi_token_index": 58, "eoi_token_index": 59}
    config = Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4, **ids)
    made: nn.Module = AutoModelForCausalLM.from_config(config)
    return made


def test_logits_are_counted(model: nn.Module) -> None:
    facts = facts_of(model)
    assert (facts.vocab_size, facts.d_model, facts.num_layers) == (VOCAB, D, 3)


def test_the_head_and_attention_are_priced_and_the_tower_has_none_of_these_heads(model: nn.Module) -> None:
    plan = moecompile.make_plan(model, ["mesh=cpu_1"], example={"input_ids": torch.arange(16).reshape(2, 8)})
    assert len(plan.layers) == 2
    shape = shape_of_model(model, plan)
    assert (shape.hidden, shape.vocab) == (D, VOCAB)
    mixers = {path: shape.layers[place].mixer for path, place in shape.places}
    attention = Attention(heads=HEADS, kv_heads=2, d_qk=4, d_v=4)
    assert list(mixers.values()) == [None, Attention(heads=HEADS, kv_heads=2, d_qk=4, d_v=4, window=7), attention]
    assert next(iter(mixers)).startswith("model.vision_tower")
