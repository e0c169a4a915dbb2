"""Models of other systems as model types of transformers: by their widths, or by their published name.

A shipped option of `conf/model` with the same widths stands for them, since it has what a training script leaves to its
tokenizer (the size of the vocabulary).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecompile.imports.settings import Settings
from moecompile.libyaml import load_yaml

NOT_WIDTHS = (
    "dtype",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
)
"""Keys of a model's config that are not compared: they are no widths, or training scripts write them otherwise."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """A published model. option: of conf/model. architecture, config: else, beside what transformers takes itself.

    source: where its widths are from.
    """

    option: str | None = None
    architecture: str = ""
    config: Mapping[str, Any] | None = None
    source: str = ""


_DEFAULTS = "widths that transformers has as the default of this model type"
_NAMED: tuple[tuple[str, Named], ...] = (
    (r"mixtral-?8x7b", Named(option="mixtral_8x7b")),
    (r"mixtral-?8x22b", Named(option="mixtral_8x22b")),
    (r"qwen3-(coder-)?30b-a3b", Named(option="qwen3_30b_a3b")),
    (r"qwen3-235b-a22b", Named(option="qwen3_235b_a22b")),
    (r"gpt-oss-(safeguard-)?120b", Named(option="gpt_oss_120b")),
    (r"gpt-oss-(safeguard-)?20b", Named(option="gpt_oss_20b")),
    (r"deepseek-v3|deepseek-r1(?!-distill)", Named(option="deepseek_v3")),
    (r"deepseek-(coder-)?v2-lite", Named(
        architecture="deepseek_v2", source="published config of DeepSeek-V2-Lite", config={
            "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
            "num_hidden_layers": 27, "first_k_dense_replace": 1, "num_attention_heads": 16, "num_key_value_heads": 16,
            "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
            "topk_method": "greedy", "norm_topk_prob": False, "max_position_embeddings": 163840,
        })),
    (r"deepseek-(coder-)?v2", Named(option="deepseek_v2")),
    (r"olmoe-1b-7b", Named(option="olmoe_1b_7b")),
    (r"nemotron-3-nano-30b-a3b", Named(option="nemotron3_nano_30b_a3b")),
    (r"longcat-flash", Named(option="longcat_flash")),
    (r"glm-4\.5-air", Named(
        architecture="glm4_moe", config={"head_dim": 128, "attention_bias": True}, source=_DEFAULTS)),
    (r"glm-4\.7-flash", Named(architecture="glm4_moe_lite", config={}, source=_DEFAULTS)),
    (r"qwen1\.5-moe-a2\.7b", Named(architecture="qwen2_moe", config={}, source=_DEFAULTS)),
    (r"jamba-v0\.1", Named(architecture="jamba", config={}, source=_DEFAULTS)),
    (r"llama-4-scout-17b-16e", Named(
        architecture="llama4_text", config={}, source=f"{_DEFAULTS}; the tower for images is left out")),
    (r"llama-4-maverick-17b-128e", Named(
        architecture="llama4_text", config={"num_local_experts": 128, "interleave_moe_layer_step": 2},
        source=f"{_DEFAULTS}, with 128 experts in every second layer; the tower for images is left out")),
    (r"qwen3-next-80b-a3b", Named(architecture="qwen3_next", config={}, source=_DEFAULTS)),
    (r"minimax-m2(?![.\d])", Named(architecture="minimax_m2", config={}, source=_DEFAULTS)),
)  # fmt: skip
"""Patterns of published names, without the owner, in lower case -> the model. The first one counts."""

_TOKENIZERS = (("llama2", 32000), ("qwen3", 151936), ("deepseek-v3", 129280), ("deepseek-v2", 102400))
"""Part of a tokenizer's name, in lower case -> the size of its vocabulary as models have it."""


def named(name: str) -> Named | None:
    """The model with a published name, such as `Qwen/Qwen3-30B-A3B`; None: it is not known."""
    last = name.rstrip("/").rpartition("/")[2].lower()
    return next((model for pattern, model in _NAMED if re.search(pattern, last)), None)


def taken(settings: Settings, model: Named, text: str) -> str | dict[str, Any]:
    """What a draft has of a published model: the shipped option, with this text in the report, or a content of one."""
    if model.option is not None:
        settings.assume("model", model.option, text)
        return model.option
    settings.assume("model.architecture", model.architecture, model.source)
    config = {"dtype": "bfloat16", **(model.config or {})}
    return {"architecture": model.architecture, "device": "meta", "config": config}


def vocabulary(tokenizer: str) -> int | None:
    """The size of the vocabulary that a tokenizer's name tells; None: it tells none."""
    return next((size for part, size in _TOKENIZERS if part in tokenizer.lower()), None)


def shipped(conf: Path, architecture: str, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The option of conf/model with these widths, and its config; None: there is none."""
    for name, model in _options(conf):
        theirs = model.get("config", {})
        if model.get("architecture") == architecture and all(
            theirs.get(key) == value for key, value in config.items() if key not in NOT_WIDTHS
        ):
            return name, theirs
    return None


def _options(conf: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path in sorted((conf / "model").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        if "device: meta" in text:  # a published model
            yield path.stem, load_yaml(text)
