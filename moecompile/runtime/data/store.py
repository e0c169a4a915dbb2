"""Tokenized documents on disk, memory-mapped.

    tokens-00000.bin, ...    all tokens, one document after the other: uint16 if the largest id allows, else uint32
    targets-00000.bin, ...   uint8, 1 for a token that is to be learned; of chats alone
    ends.bin                 int64, the number of tokens up to the end of each document
    meta.json                the counts, which are compared with the files' sizes

Shards hold `SHARD` tokens each, the last one fewer. A document may go on in the next shard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from moecompile.errors import ConfigError

SHARD = 2**27
"""Tokens of a shard: 256 or 512 MiB."""
_META, _ENDS, _TARGETS = "meta.json", "ends.bin", "targets"


class StoreWriter:
    """Writes a store, one document at a time; nothing of it is kept in memory. A context manager that closes its files.

    Args:
        folder: an existing, empty folder. num_ids: the largest token id plus one. shard: tokens of a shard.
    """

    def __init__(self, folder: Path, num_ids: int, *, has_targets: bool = False, shard: int = SHARD) -> None:
        self.folder, self.shard, self.has_targets = folder, shard, has_targets
        self.num_ids, self.dtype = num_ids, np.dtype(np.uint16 if num_ids <= 2**16 else np.uint32)
        self.num_tokens = self.num_documents = 0
        self._files: dict[str, BinaryIO] = {}
        self._ends = (folder / _ENDS).open("wb")

    def add(self, tokens: NDArray[Any], targets: NDArray[np.bool_] | None = None) -> None:
        """Appends one document; `targets` has a flag per token.

        Raises:
            ValueError: a token is no id below `num_ids`; a smaller dtype would store another one.
        """
        assert (targets is not None) == self.has_targets and len(tokens)
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.num_ids:
            raise ValueError(f"tokens {tokens.min()} to {tokens.max()} are not below {self.num_ids}")
        columns = {"tokens": tokens.astype(self.dtype)}
        if targets is not None:
            columns[_TARGETS] = targets.astype(np.uint8)
        done = 0
        while done < len(tokens):
            number, place = divmod(self.num_tokens, self.shard)
            part = slice(done, done + self.shard - place)
            for name, values in columns.items():
                self._file(name, number, place).write(values[part].tobytes())
            taken = len(tokens[part])
            done, self.num_tokens = done + taken, self.num_tokens + taken
        self._ends.write(np.int64(self.num_tokens).tobytes())
        self.num_documents += 1

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (*self._files.values(), self._ends):
            file.close()

    def end(self, counts: Mapping[str, Any]) -> None:
        """Ends the store. counts: for `TokenStore.counts`."""
        meta = {
            "num_tokens": self.num_tokens, "num_documents": self.num_documents, "dtype": self.dtype.name,
            "shard": self.shard, "has_targets": self.has_targets, "counts": dict(counts),
        }  # fmt: skip
        (self.folder / _META).write_text(json.dumps(meta), encoding="utf-8")

    def _file(self, name: str, number: int, place: int) -> BinaryIO:
        if place == 0:
            if name in self._files:
                self._files[name].close()
            self._files[name] = (self.folder / f"{name}-{number:05d}.bin").open("wb")
        return self._files[name]


class TokenStore:
    """A store that `StoreWriter` wrote.

    Raises:
        ConfigError: files are missing or have another size.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            meta = json.loads((folder / _META).read_text(encoding="utf-8"))
            self.num_tokens, self.num_documents = int(meta["num_tokens"]), int(meta["num_documents"])
            self.counts: dict[str, Any] = meta["counts"]
            self.shard, dtype = int(meta["shard"]), np.dtype(meta["dtype"])
            self.ends = self._mapped(_ENDS, np.dtype(np.int64), self.num_documents)
            self._tokens = self._column("tokens", dtype)
            self._targets = self._column(_TARGETS, np.dtype(np.uint8)) if meta["has_targets"] else []
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError("data.cache", folder, f"is damaged: {error}", "Delete this folder") from None

    def bounds(self, document: int) -> tuple[int, int]:
        """First token of a document, and the first one after it."""
        return int(self.ends[document - 1]) if document else 0, int(self.ends[document])

    def lengths(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Tokens of documents start .. stop - 1."""
        ends = np.asarray(self.ends[start:stop])
        return np.diff(ends, prepend=self.ends[start - 1] if start else 0)

    def tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens start .. stop - 1 of the store, copied."""
        return self._read(self._tokens, start, stop).astype(np.int64)

    def targets(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Whether each of the tokens start .. stop - 1 is to be learned."""
        return self._read(self._targets, start, stop).astype(np.bool_)

    def _read(self, shards: list[NDArray[Any]], start: int, stop: int) -> NDArray[Any]:
        parts = []
        while start < stop:
            number, place = divmod(start, self.shard)
            parts.append(shards[number][place : place + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def _column(self, name: str, dtype: np.dtype[Any]) -> list[NDArray[Any]]:
        numbers = range(-(-self.num_tokens // self.shard))
        sizes = [min(self.shard, self.num_tokens - number * self.shard) for number in numbers]
        return [
            self._mapped(f"{name}-{number:05d}.bin", dtype, size) for number, size in zip(numbers, sizes, strict=True)
        ]

    def _mapped(self, name: str, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
        path = self.folder / name
        if path.stat().st_size != size * dtype.itemsize:
            raise ValueError(f"{name} has {path.stat().st_size:,} bytes, not {size * dtype.itemsize:,}")
        # As a plain array: numpy is slow on its own subclass.
        return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if size else np.zeros(0, dtype)
