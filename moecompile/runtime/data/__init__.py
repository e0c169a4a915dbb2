"""Text, chats, tokens and batches: `load_data` once per rank, then `train_loader` and `val_loader`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from moecompile.checkpoint.fingerprint import content_hash
from moecompile.errors import ConfigError
from moecompile.runtime.data.batches import IGNORED, GlobalBatchSampler, TokenWindows, ValidationSampler
from moecompile.runtime.data.chats import ChatCounts, ChatRenderer, ChatRows
from moecompile.runtime.data.corpus import CorpusCounts, CorpusWindows
from moecompile.runtime.data.files import load_corpus, load_sft
from moecompile.runtime.data.loaded import Split, TextData, mean_length
from moecompile.runtime.data.spans import SpanCorruption, SpanCounts
from moecompile.runtime.data.tokens import (
    encode,
    model_tokenizer,
    num_ids,
    shared_tokenizer,
    train_tokenizer,
    unigram_cross_entropy,
    unigram_entropy,
)
from moecompile.runtime.text import load_text, split_text
from moecompile.schema import DataConfig, DataKind, TokenizerSource

__all__ = [
    "IGNORED",
    "ChatCounts",
    "ChatRenderer",
    "ChatRows",
    "CorpusCounts",
    "CorpusWindows",
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
    "mean_length",
    "model_tokenizer",
    "num_ids",
    "shared_tokenizer",
    "split_text",
    "train_loader",
    "train_tokenizer",
    "unigram_cross_entropy",
    "unigram_entropy",
    "val_loader",
]


def load_data(
    data: DataConfig, run_dir: Path, *, rank: int, barrier: Callable[[], object], model_folder: Path | None = None,
    seed: int = 0, chat_template: Callable[[Path], ChatRenderer] | None = None,
) -> TextData:  # fmt: skip
    """Loads, splits and tokenizes the data; all ranks call it, and rank 0 writes `run_dir/tokenizer.json`.

    Args:
        model_folder: of the pretrained model, for `data.tokenizer=model`. seed: of the order of documents and chats.
        chat_template: loads tokenizer and chat template of a folder, for `data.kind=sft`.

    Raises:
        ConfigError: the data cannot be read, or are too short.
    """
    if data.kind is DataKind.sft:
        assert model_folder is not None and chat_template is not None, "validate() has seen that the model has a folder"
        return load_sft(data, run_dir, rank=rank, seed=seed, model_folder=model_folder, chat_template=chat_template)
    if data.kind is DataKind.corpus:
        return load_corpus(data, run_dir, rank=rank, seed=seed, model_folder=model_folder)
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
    windows: Split, data: DataConfig, *, seed: int, rank: int, world_size: int,
    start_step: int = 0, num_steps: int | None = None, multiple: int = 1,
) -> DataLoader[Any]:  # fmt: skip
    """This rank's training micro-batches from step `start_step` on: input_ids and labels, one row per window; of chats,
    attention_mask and position_ids too (chats.py).

    Args:
        multiple: what divides the tokens of a row: `mesh.cp`, whose ranks have equally many positions. `data.seq_len`
            is a multiple of it.
    """
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
        computed_order=isinstance(windows, CorpusWindows),
    )
    return DataLoader(windows, batch_sampler=sampler, collate_fn=_collate(windows, multiple))


def val_loader(
    windows: Split, data: DataConfig, *, rank: int, world_size: int, multiple: int = 1
) -> DataLoader[Any]:  # fmt: skip
    """This rank's validation micro-batches; every rank has the same number. multiple: as for `train_loader`."""
    sampler = ValidationSampler(
        len(windows),
        micro_batch_size=data.micro_batch_size,
        rank=rank,
        world_size=world_size,
        max_batches=data.val_batches,
    )
    return DataLoader(windows, batch_sampler=sampler, collate_fn=_collate(windows, multiple))


def _collate(windows: Split, multiple: int) -> Callable[[list[Any]], dict[str, Tensor]] | None:
    """How items become a batch; None: they are stacked."""
    return partial(windows.collate, multiple=multiple) if isinstance(windows, ChatRows) else None


def _windows(tokenizer: Tokenizer, text: str, seq_len: int) -> TokenWindows:
    windows = TokenWindows(encode(tokenizer, text), seq_len)
    if not len(windows):
        raise ConfigError(
            "data.seq_len", seq_len, f"a split of the text has {len(windows.tokens)} tokens, too few for one sequence",
            "Use shorter sequences, a longer text, or another data.val_fraction",
        )  # fmt: skip
    return windows
