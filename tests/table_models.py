"""Models that look up tables of hashed n-grams, each in another form than Qwen4-exp's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaMLP

from moecompile.compose import compose_config
from moecompile.schema import Config

PADDING = 3


def bigrams(ids: Tensor) -> Tensor:
    """A number for each token and the one before it."""
    before = F.pad(ids, (1, 0))[:, :-1]
    return torch.bitwise_xor(ids * 1_000_003, before * 998_244_353)


class Heads(nn.Module):
    """A table for each head (Engram), with a row that gets no gradient."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Embedding(rows + i, width // 2, padding_idx=PADDING) for i in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        """(B, S) -> (B, S, D)"""
        hashed = bigrams(ids)
        return torch.cat([head((hashed + i) % head.num_embeddings) for i, head in enumerate(self.heads)], -1)


class Indexed(nn.Module):
    """One parameter, read by ids that count from the end below zero."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        """(B, S) -> (B, S, D)"""
        return self.table[bigrams(ids) % self.table.shape[0] - self.table.shape[0] // 2] * 0.5


class Selected(nn.Module):
    """A parameter of a child, read by another module, twice."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.holder = nn.Module()
        self.holder.weight = nn.Parameter(torch.randn(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        """(B, S) -> (B, S, D)"""
        hashed = (bigrams(ids) % self.holder.weight.shape[0]).flatten()
        once = torch.index_select(self.holder.weight, 0, hashed)
        return (once + F.embedding(hashed // 2, self.holder.weight)).view(*ids.shape, -1)


class TableLlama(LlamaForCausalLM):
    """A Llama whose embeddings are added to those of three kinds of tables."""

    def __init__(self, config: LlamaConfig, rows: int = 37) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.tables = nn.ModuleDict({
            "heads": Heads(rows, width), "indexed": Indexed(2 * rows, width), "selected": Selected(rows + 4, width),
        })  # fmt: skip

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """As of a Llama."""
        embeds = self.model.embed_tokens(input_ids)
        for table in self.tables.values():
            embeds = embeds + table(input_ids)
        return super().forward(inputs_embeds=embeds, **kwargs)


def build() -> nn.Module:
    """A small one."""
    return TableLlama(
        LlamaConfig(
            vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=16, use_cache=False,
        )
    )  # fmt: skip


TABLE = "model.layers.0.ple.ple_embedding.ngram_embedding.weight"


def qwen4(*overrides: str, base: int = 5000, **settings: Any) -> Config:
    """Two layers of Qwen4-exp, without indexed attention; the first has the table `TABLE`."""
    words = ["model=qwen4_nano", "data.vocab_size=300", "data.seq_len=24", "experts.sites=existing", *overrides]
    config = compose_config([*words, "embeddings.min_numbers=3000"])
    config.model.config |= {
        "hidden_size": 32, "layer_types": ["linear_attention"] * 2, "ngram_vocab_size_base": base, **settings
    }  # fmt: skip
    return config


class TableLayer(nn.Module):
    """A layer with a table of its own, whose ids are made outside of it, and an FFN."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=width, intermediate_size=24, num_attention_heads=2))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """(B, S, D), (B, S) -> (B, S, D)"""
        x = x + self.table(ids % self.table.num_embeddings)
        return x + self.mlp(self.norm(x))


class Layered(nn.Module):
    """Tables in layers, which lie on several stages of a pipeline, and an embedding of words."""

    def __init__(self, layers: int = 4, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, width)
        self.layers = nn.ModuleList(TableLayer(37 + i, width) for i in range(layers))
        self.head = nn.Linear(width, 300)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutput:
        """(B, S) -> logits, (B, S, V)"""
        x, hashed = self.embed(input_ids), bigrams(input_ids)
        for layer in self.layers:
            x = layer(x, hashed)
        return CausalLMOutput(logits=self.head(x))
