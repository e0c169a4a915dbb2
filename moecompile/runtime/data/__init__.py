"""Text, chats, tokens and batches: `load_data` once per rank, then `train_loader` and `val_loader`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from moecompile.checkpoint.fingerprint import content_hash
from moecompile.errors import ConfigError
from moecompile.runtime.data.batches import IGNORED, GlobalBatchSampler, TokenWindows, ValidationSampler
from moecompile.runtime.data.cache import cache_folder, content_of, key_of, made
from moecompile.runtime.data.chats import ChatCounts, ChatRenderer, ChatRows, load_chats, marked, warnings_of
from moecompile.runtime.data.corpus import CorpusCounts, CorpusWindows, corpus_store, num_held_out, sample
from moecompile.runtime.data.spans import SpanCorruption, SpanCounts
from moecompile.runtime.data.tokens import (
    END_OF_TEXT,
    encode,
    model_tokenizer,
    num_ids,
    plain_tokenizer,
    save_tokenizer,
    shared_tokenizer,
    train_tokenizer,
    unigram_cross_entropy,
    unigram_entropy,
)
from moecompile.runtime.records import Found, find_files, is_text, reader_code
from moecompile.runtime.text import load_text, split_text
from moecompile.schema import DataConfig, DataKind, TokenizerSource

# -- the data of a run: both splits, their tokenizer, and what is in them -------------------------------------------

Split = TokenWindows | CorpusWindows | SpanCorruption | ChatRows
"""Training or validation data: items by index, and item `TokenWindows.PADDING`, which has no targets."""


@dataclass(frozen=True)
class TextData:
    """Tokenized data, split into windows or rows, as `load_data` returns them or for another objective.

    text_hash: of all the data, for the fingerprint in checkpoints. counts: what is in a corpus or in chats.
    """

    tokenizer: Tokenizer
    train: Split
    val: Split
    text_hash: str = ""
    counts: CorpusCounts | ChatCounts | None = None


def data_warnings(data: TextData, seq_len: int) -> list[str]:
    """What a user should know of the data before a model is trained on them; a sentence each, without full stop."""
    return warnings_of(data.counts, seq_len) if isinstance(data.counts, ChatCounts) else []


def mean_length(split: Split, seq_len: int) -> float:
    """Tokens of a row without padding; all windows have `seq_len`."""
    return float(split.lengths.mean()) if isinstance(split, ChatRows) else float(seq_len)


# -- a corpus or chats: slow work is done once, and other ranks wait for it outside of collectives ------------------

TOKENIZER = "tokenizer.json"


def load_sft(
    data: DataConfig, run_dir: Path, *, rank: int, seed: int, model_folder: Path,
    chat_template: Callable[[Path], ChatRenderer],
) -> TextData:  # fmt: skip
    """Chats in the model's own template; rank 0 writes `run_dir/tokenizer.json`.

    Raises:
        ConfigError: a file or a record is wrong, or the model has no chat template.
    """
    renderer = chat_template(model_folder)
    train, val, counts, text_hash = load_chats(find_files(data), data, renderer, cache_folder(data.cache), seed)
    _write(renderer.tokenizer, run_dir, rank)
    return TextData(renderer.tokenizer, train, val, text_hash, counts)


def load_corpus(data: DataConfig, run_dir: Path, *, rank: int, seed: int, model_folder: Path | None) -> TextData:
    """A corpus, in the model's tokens or in those of a new tokenizer; rank 0 writes `run_dir/tokenizer.json`.

    Raises:
        ConfigError: a file or a record is wrong, or there are too few tokens.
    """
    found, cache = find_files(data), cache_folder(data.cache)
    if data.tokenizer is TokenizerSource.model:
        assert model_folder is not None, "validate() has seen that the model has a folder"
        tokenizer = plain_tokenizer(model_folder / TOKENIZER)
        end = _end_of_text(model_folder, tokenizer)
    else:
        tokenizer = _trained(found, data, cache)
        end = int(tokenizer.token_to_id(END_OF_TEXT) or 0)  # special tokens come first
    store = corpus_store(found, data, tokenizer, end, cache)
    total, documents = store.num_documents, store.counts["documents"]
    held_out = num_held_out(total, data.val_fraction, "piece of text (a record, or 64 KiB of a file)")
    windows = partial(CorpusWindows, store, data.seq_len, cache=cache)
    train = windows(first=held_out, count=total - held_out, key=f"seed {seed}")
    val = windows(first=0, count=held_out, key=None)
    for split in (train, val):
        if not len(split):
            raise ConfigError(
                "data.seq_len", data.seq_len, f"a split has {split.num_tokens} tokens, too few for one sequence",
                "Use shorter sequences, more text, or another data.val_fraction",
            )  # fmt: skip
    _write(tokenizer, run_dir, rank)
    counts = CorpusCounts(len(found.files), len(found.skipped), documents, store.num_tokens)
    return TextData(tokenizer, train, val, store.folder.name, counts)


def _trained(found: Found, data: DataConfig, cache: Path) -> Tokenizer:
    """A new tokenizer of the beginning of the corpus, with a token for the end of a document."""
    size = data.vocab_size
    assert size is not None, "validate() has seen that there is a size"

    def train(folder: Path) -> None:
        train_tokenizer(sample(found, data), size, special=[END_OF_TEXT]).save(str(folder / TOKENIZER))

    contents = [[content_of(path, cache), is_text(path), reader_code(path)] for path in found.files]
    return Tokenizer.from_file(
        str(made(cache, key_of("tokenizer", contents, size, data.text_field), train) / TOKENIZER)
    )


def _end_of_text(folder: Path, tokenizer: Tokenizer) -> int:
    """The model's own end-of-text token, from its tokenizer's config, else from its config."""
    named = _json(folder / "tokenizer_config.json").get("eos_token")
    text = named.get("content") if isinstance(named, dict) else named
    number: Any = tokenizer.token_to_id(text) if isinstance(text, str) else None
    if number is None:
        number = _json(folder / "config.json").get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
    if not isinstance(number, int) or not 0 <= number < num_ids(tokenizer):
        raise ConfigError(
            "data.tokenizer", "model", f"the tokenizer in {folder} names no end of text, which parts documents",
            "Name it as eos_token in tokenizer_config.json",
        )  # fmt: skip
    return int(number)


def _json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def _write(tokenizer: Tokenizer, run_dir: Path, rank: int) -> None:
    """Writes the copy of the tokenizer that belongs to the run; nobody waits for it."""
    if rank == 0:
        save_tokenizer(tokenizer, run_dir / TOKENIZER)


# -- all kinds of data ----------------------------------------------------------------------------------------------

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
    "data_warnings",
    "encode",
    "load_data",
    "load_text",
    "marked",
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
