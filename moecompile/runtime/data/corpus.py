"""Text of many files as a stream of tokens, of which only the batch at hand is in memory.

Algorithm:
  1. Every document (a text file, or the text of a record) is cut into pieces of about 64 KiB, at line ends. Pieces are
     tokenized in the order of the files and written to a store in the cache, named by the hash of all files, the
     tokenizer and the field. After the last piece of a document comes the end-of-text token.
  2. Some pieces, the same for every seed, are held out for validation. The seed shuffles the others.
  3. Windows are cut from the stream of shuffled pieces: window i has the tokens [i S, (i + 1) S] of it. Where each
     piece ends in the stream is a file in the cache too; a window is found in it by bisection.

A window depends on the files, the seed and i alone, so the order of training does not depend on ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from moecompile.errors import ConfigError
from moecompile.runtime.data.batches import TokenWindows, no_targets, shuffled
from moecompile.runtime.data.cache import Progress, content_of, key_of, made
from moecompile.runtime.data.store import StoreWriter, TokenStore
from moecompile.runtime.data.tokens import num_ids
from moecompile.runtime.records import (
    Found,
    bad,
    check_characters,
    field_pieces,
    is_text,
    reader_code,
    records,
    text_pieces,
)
from moecompile.schema import DataConfig

_BATCH = 2**18  # characters that are tokenized together
_BLOCK = 2**16  # pieces whose ends are added up together
_SAMPLE = 2**25  # characters of which a tokenizer is trained
_FORMAT = 2  # of stores; a change makes them anew


@dataclass(frozen=True)
class CorpusCounts:
    """What is in a corpus. skipped: files of the folder that are not read. tokens: with the ends of documents."""

    files: int
    skipped: int
    documents: int
    tokens: int


def corpus_store(found: Found, data: DataConfig, tokenizer: Tokenizer, end: int, cache: Path) -> TokenStore:
    """The tokenized corpus; made by the first process that comes, and only once (step 1).

    Args:
        end: the token after each document.

    Raises:
        ConfigError: a record is wrong.
    """
    contents = [[content_of(path, cache), is_text(path), reader_code(path)] for path in found.files]
    key = key_of("corpus", _FORMAT, contents, tokenizer.to_str(), end, data.text_field)
    return TokenStore(made(cache, key, partial(_tokenize, found, data, tokenizer, end)))


class CorpusWindows(Dataset[dict[str, Tensor]]):
    """Windows of `seq_len` tokens over the shuffled pieces of a store; items are those of `TokenWindows`.

    Args:
        first, count: of the pieces in the order that is the same for every seed. key: shuffles them; None: as they are.
    """

    def __init__(
        self, store: TokenStore, seq_len: int, *, first: int, count: int, key: str | None, cache: Path
    ) -> None:
        self.store, self.seq_len = store, seq_len
        self._first, self._count, self._key = first, count, key
        name = key_of("order", _FORMAT, store.folder.name, first, count, key)
        folder = made(cache, name, self._write_ends)
        self._ends = np.asarray(np.memmap(folder / "ends.bin", dtype=np.int64, mode="r"))
        self.num_tokens = int(self._ends[-1])

    def __len__(self) -> int:
        return max(0, self.num_tokens - 1) // self.seq_len

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == TokenWindows.PADDING:
            return no_targets(self.seq_len)
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.seq_len
        window = torch.from_numpy(self._stream(start, start + self.seq_len + 1))
        return {"input_ids": window[:-1], "labels": window[1:]}

    def _stream(self, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens start .. stop - 1 of the shuffled stream."""
        first, last = np.searchsorted(self._ends, (start, stop - 1), side="right").tolist()
        offset, parts = start - (int(self._ends[first - 1]) if first else 0), []
        for piece in self._pieces(np.arange(first, last + 1)).tolist():
            begin, end = self.store.bounds(piece)
            parts.append(self.store.tokens(begin + offset, min(end, begin + offset + stop - start)))
            start, offset = start + len(parts[-1]), 0
        return np.concatenate(parts)

    def _pieces(self, places: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The pieces of the store at some places of the stream."""
        if self._key is not None:
            places = shuffled(places, self._count, self._key)
        return shuffled(self._first + places, self.store.num_documents, HELD_OUT)

    def _write_ends(self, folder: Path) -> None:
        total = 0
        with (folder / "ends.bin").open("wb") as file:
            for first in range(0, self._count, _BLOCK):
                pieces = self._pieces(np.arange(first, min(first + _BLOCK, self._count)))
                begins = np.where(pieces > 0, self.store.ends[np.maximum(pieces - 1, 0)], 0)
                ends = total + np.cumsum(self.store.ends[pieces] - begins)
                file.write(ends.astype(np.int64).tobytes())
                total = int(ends[-1])


HELD_OUT = "held out"
"""Key of the order whose first documents are held out; the same for every seed."""


def num_held_out(total: int, val_fraction: float, what: str) -> int:
    """How many of `total` documents or chats are held out: one or more, but not all.

    Raises:
        ConfigError: there are not two.
    """
    if total < 2:
        raise ConfigError(
            "data.val_fraction", val_fraction, f"there is {'one' if total else 'no'} {what}, and one is held out",
            "Give more data",
        )  # fmt: skip
    return min(max(1, round(total * val_fraction)), total - 1)


def sample(found: Found, data: DataConfig) -> Iterator[str]:
    """The first texts of a corpus, to train a tokenizer on."""
    taken = 0
    for piece, _ in _pieces_of(found, data):
        yield piece
        taken += len(piece)
        if taken >= _SAMPLE:
            return


def _tokenize(found: Found, data: DataConfig, tokenizer: Tokenizer, end: int, folder: Path) -> None:
    """Step 1."""
    documents, characters, progress = 0, 0, Progress(f"tokenizing {data.path}", "million characters")
    with StoreWriter(folder, max(num_ids(tokenizer), end + 1)) as writer:
        for batch in _batches(_pieces_of(found, data)):
            encoded = tokenizer.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
            for (piece, is_last), encoding in zip(batch, encoded, strict=True):
                tokens = [*encoding.ids, end] if is_last else encoding.ids
                if tokens:
                    writer.add(np.array(tokens, dtype=np.int64))
                documents, characters = documents + is_last, characters + len(piece)
            progress.show(characters / 1e6)
        writer.end({"documents": documents})


def _pieces_of(found: Found, data: DataConfig) -> Iterator[tuple[str, bool]]:
    for path in found.files:
        if is_text(path):
            yield from text_pieces(path)
            continue
        for record in records(path):
            text = record.value.get(data.text_field)
            if not isinstance(text, str):
                fields = ", ".join(map(str, record.value)) or "none"
                rule = "has no text in" if data.text_field not in record.value or text is None else "has no string in"
                raise bad(
                    record.where, f"{rule} the field {data.text_field!r} (fields: {fields[:200]})",
                    "Give data.text_field=FIELD, or correct the record",
                )  # fmt: skip
            check_characters(record, text)
            if text:
                yield from field_pieces(text)


def _batches(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
