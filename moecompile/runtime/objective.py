"""The training objective: inputs and targets for `data.objective`, and checks that the model fits it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from moecompile.errors import ConfigError
from moecompile.runtime.data import CorpusWindows, SpanCorruption, SpanCounts, Split, TextData, TokenWindows, num_ids
from moecompile.schema import Config, Objective, TokenizerSource


def data_for(model: nn.Module, data: TextData, config: Config) -> TextData:
    """`data` with the inputs and targets of `config.data.objective` for `model`.

    Raises:
        ConfigError: the model's kind does not fit the objective, or its vocabulary is too small.
    """
    _check_kind(model, config)
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    check_vocabulary(vocab_size or _num_embeddings(model), num_ids(data.tokenizer), config)
    if config.data.objective is Objective.causal:
        return data
    assert vocab_size is not None
    train, val = (SpanCorruption(_windows(split), vocab_size, config.seed) for split in (data.train, data.val))
    return replace(data, train=train, val=val)


def _windows(split: Split) -> TokenWindows | CorpusWindows:
    assert isinstance(split, TokenWindows | CorpusWindows), "validate() has seen that chats are causal"
    return split


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder (T5)."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _check_kind(model: nn.Module, config: Config) -> None:
    both, objective = is_encoder_decoder(model), config.data.objective
    writes_text = getattr(model, "can_generate", None)  # a method of transformers' classes
    if callable(writes_text) and not writes_text():
        raise ConfigError(
            "data.objective", objective.value,
            f"the model {config.model.name}, a {type(model).__name__}, writes no text",
            "Use task=compile, train it with a Lightning module of your own, or use a causal model",
        )  # fmt: skip
    if both and objective is Objective.causal:
        raise ConfigError(
            "data.objective", objective.value,
            f"the model {config.model.name} has an encoder, which would see the tokens to be predicted",
            "Use data.objective=span_corruption, or a causal model",
        )  # fmt: skip
    if not both and objective is Objective.span_corruption:
        raise ConfigError(
            "data.objective", objective.value, f"the model {config.model.name} has no encoder and decoder",
            "Use data.objective=causal, or model=t5_nano",
        )  # fmt: skip


def _num_embeddings(model: nn.Module) -> int | None:
    """Rows of the embedding of a model whose config does not say it; None: not known."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        embedding = find() if callable(find) else None
    except NotImplementedError:  # transformers' classes without one
        return None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


LEAST_VOCABULARY = 257
"""Tokens of the smallest tokenizer that is trained here: all bytes, and the end of a text."""


def at_most(vocab_size: int) -> str:
    """What to change where a model has embeddings for fewer tokens than the tokenizer has."""
    if vocab_size >= LEAST_VOCABULARY:
        return f"Use at most {vocab_size}"
    return f"Use a model with at least {LEAST_VOCABULARY} embeddings, or its own tokenizer (data.tokenizer=model)"


def check_vocabulary(vocab_size: int | None, num_ids: int, config: Config) -> None:
    """Checks that the model has an embedding for every token id, and for sentinels.

    Args:
        vocab_size: of the model; None: not known. num_ids: the largest id of the tokenizer plus one.

    Raises:
        ConfigError: it has not.
    """
    data = config.data
    if vocab_size is None:
        return
    if vocab_size < num_ids:
        rule = f"the model {config.model.name} has embeddings for {vocab_size} tokens"
        if data.tokenizer is TokenizerSource.model:
            fix = "Save the tokenizer that belongs to the model beside it"
            raise ConfigError("data.tokenizer", "model", f"has token ids up to {num_ids - 1}, {rule}", fix)
        raise ConfigError("data.vocab_size", num_ids, rule, at_most(vocab_size))
    sentinels = SpanCounts(data.seq_len).num_sentinels
    if data.objective is Objective.span_corruption and vocab_size < num_ids + sentinels:
        raise ConfigError(
            "model.config.vocab_size", vocab_size,
            f"data.seq_len={data.seq_len} needs {sentinels} sentinels above the {num_ids} tokens of the text",
            f"Use at least {num_ids + sentinels}, or shorter sequences",
        )  # fmt: skip
