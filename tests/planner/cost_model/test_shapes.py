"""Parameters and operations of shapes, against published counts, models of torch, and numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.forecast.families import shape_of
from moecompile.errors import ConfigError
from moecompile.planner.cost_model.shapes import Attention, Scan, training_flops

TINY = {
    "layers": 3,
    "dense_layers": 1,
    "hidden": 32,
    "vocab": 64,
    "heads": 4,
    "kv": 2,
    "head_dim": 8,
    "ffn": 96,
    "moe_ffn": 16,
    "experts": 4,
    "topk": 2,
    "shared": 1,
}


def test_attention_in_a_window_sees_as_many_keys_as_a_mask_shows() -> None:
    for window, seq in ((None, 7), (3, 7), (7, 7), (20, 7)):
        attention = Attention(heads=1, kv_heads=1, d_qk=4, d_v=4, window=window)
        mask = torch.ones(seq, seq).tril()
        if window:
            mask = mask.triu(1 - window)
        assert attention.mean_keys(seq) == pytest.approx(float(mask.sum() / seq))


def test_a_scan_by_hand() -> None:
    scan = Scan(heads=2, d_head=4, groups=1, state=3, conv=4, chunk=8)
    mixed = 8 + 2 * 3
    assert scan.weights(5) == 5 * (8 + mixed + 2) + 8 * 5 + 4 * mixed
    assert scan.core_flops(100) == 8 * (3 + 8) + 4 * 8 * 3  # half a chunk of B C^T and of its product with x, twice


def test_tiny_model_against_transformers_and_the_flop_counter_of_torch() -> None:
    """A forward of a real model, in which every expert is a product of its own; nothing of ours is used by it."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    seq = 16
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=96, moe_intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        mlp_only_layers=[0], tie_word_embeddings=False, max_position_embeddings=seq,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    ours = shape_of("tiny", {**TINY, "shared": 0})
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert ours.params_total() == sum(p.numel() for p in model.parameters()) - norms
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.arange(seq).unsqueeze(0) % 64)
    attention = ours.layers[0].mixer
    assert isinstance(attention, Attention)
    # Eager attention multiplies all pairs of tokens, and ours counts those that a token may see.
    masked = 3 * (2 * 4 * (8 + 8) * seq - attention.core_flops(seq))
    # A rotary product of positions and frequencies is in the model's forward, and no weight is in it.
    rotary = 2 * seq * 4
    forward = training_flops(ours, seq) / 3
    assert counter.get_total_flops() == pytest.approx(seq * (forward + masked) + rotary, rel=2e-3)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden": None}, "tiny.hidden=null: is not given. Add it to the description."),
        ({"heds": 4}, "tiny.heds=4: is not part of a model's description. Remove it."),
    ],
)
def test_descriptions_that_are_wrong(change: dict[str, object], text: str) -> None:
    config = {key: value for key, value in {**TINY, **change}.items() if value is not None}
    with pytest.raises(ConfigError) as error:
        shape_of("tiny", config)
    assert str(error.value) == text


def test_windows_and_predicted_tokens_are_counted() -> None:
    plain, windowed = (shape_of("tiny", {**TINY, **more}) for more in ({}, {"window": 4}))
    ahead = shape_of("tiny", {**TINY, "mtp": 1})
    assert training_flops(windowed, 64) < training_flops(plain, 64) < training_flops(ahead, 64)
    assert training_flops(ahead, 64, mtp=False) == training_flops(plain, 64)
