"""Tiny tokenizers and MoE models with chat templates of real families, each written for these tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from moecompile.runtime.data import train_tokenizer
from moecompile.runtime.text import load_text
from moecompile.schema import DataConfig

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<bos>",
    "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "[INST]", "[/INST]", "<think>", "</think>", "<|user|>",
    "<|assistant|>", "<|end|>", "<|system|>", "<|tool|>",
)  # fmt: skip

# Family -> (template, what the assistant writes of a message that is not the last one, and of the last one).
CHATML = """{%- if messages[0].role != 'system' %}<|im_start|>system
You are a whale.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """<bos>{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{% if message.role == 'assistant' %}{% generation %}{{ message.content | trim }}<|eot_id|>{% endgeneration %}{% else %}{{ message.content | trim }}<|eot_id|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
GEMMA = """<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content | trim }}<end_of_turn>{% endgeneration %}{% else %}{{ message.content | trim }}<end_of_turn>{% endif %}
{{ '' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
MISTRAL = """<s>{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }}[/INST]{% elif message.role == 'assistant' %}{% generation %} {{ message.content | trim }}</s>{% endgeneration %}{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"""
PHI3 = """{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|assistant|>\\n' }}{% generation %}{{ message.content }}<|end|>{% endgeneration %}{{ '\\n' }}{% else %}{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
# Qwen3: thoughts are kept in the last answer alone, which begins with thoughts, empty ones if there are none.
QWEN3 = """{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' %}
{%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in content else '' %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{{- '<|im_start|>assistant\\n' }}{% generation %}{% if loop.last %}{{ '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}{% endif %}{{ content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
# DeepSeek-R1: the prompt already begins the thoughts, which no answer in the history has.
R1 = """<bos>{% for message in messages %}{% if message.role == 'assistant' %}<|assistant|>{% generation %}{{ message.content.split('</think>')[-1] }}<|endoftext|>{% endgeneration %}{% else %}<|user|>{{ message.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>
{% endif %}"""
FAMILIES = {
    "chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "phi3": PHI3, "qwen3": QWEN3, "r1": R1,
}  # fmt: skip


def unmarked(template: str) -> str:
    """The template as most models come: it does not say what the assistant wrote."""
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@cache
def _bpe() -> str:
    return train_tokenizer(load_text(DataConfig())[:60_000], 480, special=SPECIAL).to_str()


def tokenizer(template: str | None) -> Any:
    """A tokenizer of transformers: byte-level BPE of 480 entries, with the special tokens of all families."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe()), eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
    )  # fmt: skip
    made.chat_template = template
    return made


def save_mixtral(folder: Path, template: str | None, **changes: Any) -> Path:
    """A tiny Mixtral with its tokenizer and chat template, as `save_pretrained` writes them."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 480, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        "max_position_embeddings": 128, "sliding_window": None, "bos_token_id": None, "eos_token_id": 0,
        "pad_token_id": 0,
    }  # fmt: skip
    MixtralForCausalLM(MixtralConfig(**{**settings, **changes})).save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chats(count: int) -> list[dict[str, Any]]:
    """Chats of one to three turns and different lengths, in words of the text that the tokenizer knows."""
    words = load_text(DataConfig())[:20_000].split()
    out = []
    for i in range(count):
        at, messages = 37 * i, []
        for turn in range(1 + i % 3):
            for role, size in (("user", 3 + i % 5), ("assistant", 2 + (i + turn) % 9)):
                messages.append({"role": role, "content": " ".join(words[at : at + size])})
                at += size
        out.append({"messages": messages})
    return out
