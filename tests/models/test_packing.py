"""Packed chats are apart: block-diagonal masks, logits of each as if it were alone, and models where it does not hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from moecompile.errors import ConfigError
from moecompile.models.packing import check_packing
from moecompile.runtime.data import IGNORED

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
PACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 4}),
    "mixtral, sliding": ("MixtralConfig", {**SIZES, "num_local_experts": 4, "sliding_window": 3}),
    "qwen3_moe": ("Qwen3MoeConfig", {**SIZES, **MOE, "head_dim": 8}),
    "olmoe": ("OlmoeConfig", {**SIZES, "num_experts": 4, "num_experts_per_tok": 2}),
    "llama": ("LlamaConfig", SIZES),
    "gpt2": ("GPT2Config", {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}),
}  # fmt: skip
LEAKS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt_oss": (
        "GptOssConfig",
        {**SIZES, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "another first chat changes the second one",
    ),
    "opt": ("OPTConfig", {"vocab_size": 61, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}, "another first chat"),
    "qwen3_next": ("Qwen3NextConfig", {**SIZES, **MOE, **LINEAR, "head_dim": 8}, "layers of the kind linear_attention have a state and no mask"),
    "bloom": ("BloomConfig", {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}, "another first chat"),
}  # fmt: skip
LENGTHS = [5, 3, 7]


def a_model(kind: str, settings: dict[str, Any], attention: str = "eager", *, meta: bool = False) -> nn.Module:
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, kind)(**settings), attn_implementation=attention, experts_implementation="eager"
        )
    for parameter in model.parameters():
        if not meta and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.double().train()


def a_row() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 61, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    return ids, torch.cat([torch.arange(length) for length in LENGTHS])[None]


def logits(model: nn.Module, ids: Tensor, **inputs: Tensor) -> Tensor:
    out: Tensor = model(input_ids=ids, use_cache=False, **inputs).logits
    return out


@pytest.fixture
def wide_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """A softmax of float64 stays one: eager attention asks for fp32, whose sums over rows of other lengths round
    differently on some processors.
    """

    def softmax(x: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.softmax(x, -1 if dim is None else dim, dtype=x.dtype if x.dtype == torch.float64 else dtype)

    monkeypatch.setattr(nn.functional, "softmax", softmax)


@pytest.mark.usefixtures("wide_softmax")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PACKS)
def test_packed_chats_are_as_if_alone(family: str, attention: str) -> None:
    """Logits and every gradient, in float64. Without positions that start again they are not: the check can fail."""
    model = a_model(*PACKS[family], attention).eval()
    ids, positions = a_row()
    weights = torch.randn(1, sum(LENGTHS), 61, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    packed = logits(model, ids, position_ids=positions)
    (packed * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = [logits(model, part) for part in ids.split(LENGTHS, dim=1)]
    (torch.cat(alone, 1) * weights).sum().backward()
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-7, atol=1e-8, msg=name)
    one = logits(model, ids)
    assert (one - torch.cat(alone, 1)).abs().max() > 1e-2
    check_packing(model, family)
    check_packing(a_model(*PACKS[family], meta=True), family)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_mask_is_block_diagonal(attention: str) -> None:
    """The mask that transformers makes of our positions, against one that is made of sample numbers by hand."""
    from transformers.masking_utils import create_causal_mask

    _, positions = a_row()
    config = transformers.MixtralConfig(**{**SIZES, "num_local_experts": 4}, attn_implementation=attention)
    mask = create_causal_mask(config, torch.zeros(1, 15, 32), None, None, position_ids=positions)
    allowed = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
    sample = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    place = torch.arange(15)
    assert torch.equal(allowed, (sample[:, None] == sample) & (place[:, None] >= place))


@pytest.mark.parametrize("family", LEAKS)
def test_a_model_in_which_chats_would_see_each_other_is_refused(family: str) -> None:
    kind, settings, reason = LEAKS[family]
    for meta in (False, True):
        model = a_model(kind, settings, meta=meta)
        with pytest.raises(ConfigError) as caught:
            check_packing(model, family)
        start = f"data.layout=pack: chats in one row of the model {family} would see each other: "
        assert str(caught.value).startswith(start) and str(caught.value).endswith("Use data.layout=pad.")
        assert reason in str(caught.value) or (meta and "masks are not made from position_ids" in str(caught.value))
        assert model.training


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "opt", "gpt2"])
def test_padding_changes_nothing(family: str) -> None:
    """Right padding with an attention mask: logits of the tokens are those of each chat alone."""
    kind, settings = (*PACKS.get(family, ()), *LEAKS.get(family, ()))[:2]
    model = a_model(kind, settings).eval()
    ids, _ = a_row()
    parts = ids.split(LENGTHS, dim=1)
    padded, mask = torch.zeros(3, 7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64)
    for row, part in enumerate(parts):
        padded[row, : part.shape[1]], mask[row, : part.shape[1]] = part, 1
    out = logits(model, padded, attention_mask=mask)
    for row, part in enumerate(parts):
        torch.testing.assert_close(out[row, : part.shape[1]], logits(model, part)[0], rtol=1e-9, atol=1e-9)
    assert IGNORED == -100
