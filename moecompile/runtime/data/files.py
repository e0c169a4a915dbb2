"""Loads a corpus or chats. Slow work is done once, and other ranks wait for it outside of collectives."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moecompile.errors import ConfigError
from moecompile.runtime.data.cache import cache_folder, content_of, key_of, made
from moecompile.runtime.data.chats import ChatRenderer, load_chats
from moecompile.runtime.data.corpus import CorpusCounts, CorpusWindows, corpus_store, num_held_out, sample
from moecompile.runtime.data.loaded import TextData
from moecompile.runtime.data.tokens import END_OF_TEXT, num_ids, plain_tokenizer, save_tokenizer, train_tokenizer
from moecompile.runtime.records import Found, find_files
from moecompile.schema import DataConfig, TokenizerSource

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

    contents = [content_of(path, cache) for path in found.files]
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
