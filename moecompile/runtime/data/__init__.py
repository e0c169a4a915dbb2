"""Text, tokens and batches: `load_data` once per rank, then `train_loader` and `val_loader`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from moecompile.checkpoint.fingerprint import content_hash
from moecompile.errors import ConfigError
from moecompile.runtime.data.batches import IGNORED, GlobalBatchSampler, TokenWindows, ValidationSampler
from moecompile.runtime.data.spans import SpanCorruption, SpanCounts
from moecompile.runtime.data.tokens import (
    encode,
    model_tokenizer,
    shared_tokenizer,
    train_tokenizer,
    unigram_cross_entropy,
    unigram_entropy,
)
from moecompile.runtime.text import load_text, split_text
from moecompile.schema import DataConfig, TokenizerSource

__all__ = [
    "IGNORED",
    "GlobalBatchSampler",
    "SpanCorruption",
    "SpanCounts",
    "TextData",
    "TokenWindows",
    "ValidationSampler",
    "check_tokens",
    "encode",
    "load_data",
    "load_text",
    "model_tokenizer",
    "shared_tokenizer",
    "split_text",
    "train_loader",
    "train_tokenizer",
    "unigram_cross_entropy",
    "unigram_entropy",
    "val_loader",
]


@dataclass(frozen=True)
class TextData:
    """A text, tokenized and split into windows, as `load_data` returns them or for another objective.

    text_hash: of the whole text, for the fingerprint in checkpoints.
    """

    tokenizer: Tokenizer
    train: TokenWindows | SpanCorruption
    val: TokenWindows | SpanCorruption
    text_hash: str = ""


def load_data(
    data: DataConfig, run_dir: Path, *, rank: int, barrier: Callable[[], object], model_folder: Path | None = None
) -> TextData:
    """Loads, splits and tokenizes the text; all ranks call it, and rank 0 writes `run_dir/tokenizer.json`.

    Args:
        model_folder: of the pretrained model, for `data.tokenizer=model`.

    Raises:
        ConfigError: the text cannot be read, or is too short.
    """
    text = load_text(data)
    train, val = split_text(text, data.val_fraction)
    path = run_dir / "tokenizer.json"
    if data.tokenizer is TokenizerSource.model:
        assert model_folder is not None, "validate() has seen that the model has a folder"
        tokenizer = model_tokenizer(model_folder / path.name, path, rank=rank, barrier=barrier)
    else:
        assert data.vocab_size is not None
        tokenizer = shared_tokenizer(path, train, data.vocab_size, rank=rank, barrier=barrier)
    windows = [_windows(tokenizer, part, data.seq_len) for part in (train, val)]
    return TextData(tokenizer, windows[0], windows[1], content_hash(text))


def check_tokens(data: DataConfig) -> None:
    """Checks that the text is long enough for the vocabulary and a sequence per split; for small texts.

    Raises:
        ConfigError: it is too short.
    """
    train, val = split_text(load_text(data), data.val_fraction)
    assert data.vocab_size is not None
    tokenizer = train_tokenizer(train, data.vocab_size)
    for text in (train, val):
        _windows(tokenizer, text, data.seq_len)


def train_loader(
    windows: TokenWindows | SpanCorruption, data: DataConfig, *, seed: int, rank: int, world_size: int,
    start_step: int = 0, num_steps: int | None = None,
) -> DataLoader[Any]:  # fmt: skip
    """This rank's training micro-batches from step `start_step` on: input_ids and labels, one row per window."""
    sampler = GlobalBatchSampler(
        len(windows),
        global_batch_size=data.global_batch_size,
        micro_batch_size=data.micro_batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        start_step=start_step,
        num_steps=num_steps,
        distinct_epochs=isinstance(windows, SpanCorruption),
    )
    return DataLoader(windows, batch_sampler=sampler)


def val_loader(
    windows: TokenWindows | SpanCorruption, data: DataConfig, *, rank: int, world_size: int
) -> DataLoader[Any]:
    """This rank's validation micro-batches; every rank has the same number."""
    sampler = ValidationSampler(
        len(windows),
        micro_batch_size=data.micro_batch_size,
        rank=rank,
        world_size=world_size,
        max_batches=data.val_batches,
    )
    return DataLoader(windows, batch_sampler=sampler)


def _windows(tokenizer: Tokenizer, text: str, seq_len: int) -> TokenWindows:
    windows = TokenWindows(encode(tokenizer, text), seq_len)
    if not len(windows):
        raise ConfigError(
            "data.seq_len", seq_len, f"a split of the text has {len(windows.tokens)} tokens, too few for one sequence",
            "Use shorter sequences, a longer text, or another data.val_fraction",
        )  # fmt: skip
    return windows
