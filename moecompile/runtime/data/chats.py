"""Chats as rows of tokens, with the assistant's tokens as the only targets.

Algorithm:
  1. Every record is checked and rendered by the model's chat template, once. Tokens, and which of them the assistant
     wrote, are written to a store in the cache, named by the hash of the files, the tokenizer and the template.
  2. A chat of L tokens has L - 1 inputs, each with the token after it as label if the assistant wrote that; of these
     `seq_len` are used. Chats without a target are left out, and counted.
  3. Some chats, the same for every seed, are held out. The seed shuffles the others.
  4. `layout=pack` puts several chats into a row. Best fit, longest first: each chat goes into the fullest row in which
     it still has room, or into a new one. Positions start at 0 in each: so transformers' masks keep them apart.
     `layout=pad` has one chat a row.
  5. Rows of a micro-batch are filled up to its longest, and with `mesh.cp` to a multiple of its ranks.

A batch has `input_ids`, `labels` (already shifted), `attention_mask` (1 for a token, 0 for padding), all (B, S), and
with packing `position_ids`. Rows do not depend on ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from moecompile.errors import ChatError
from moecompile.runtime.data.batches import IGNORED, TokenWindows, permutation, shuffled
from moecompile.runtime.data.cache import Progress, content_of, key_of, made
from moecompile.runtime.data.corpus import HELD_OUT, num_held_out
from moecompile.runtime.data.store import StoreWriter, TokenStore
from moecompile.runtime.data.tokens import num_ids
from moecompile.runtime.records import Found, Record, bad, check_characters, records
from moecompile.schema import DataConfig, RowLayout

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAPE = 'Write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
_FORMAT = 2  # of stores; a change makes them anew


class ChatRenderer(Protocol):
    """A model's tokenizer with its chat template (`models.chat.ChatTemplate`)."""

    tokenizer: Tokenizer
    pad_id: int
    template: str

    def encode(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
    ) -> tuple[list[int], list[bool]]:
        """Tokens of a chat, and whether the assistant wrote each. Raises ChatError."""
        ...


@dataclass(frozen=True)
class ChatCounts:
    """What is in a set of chats, training and validation together.

    records: chats in the files. left_out: those of them without a target. truncated: those longer than `seq_len`.
    tokens, supervised: inputs and targets in one pass. rows: of tokens, of one chat or several. fill: tokens over
    places in batches, the rest of which is padding, in the first pass over the training rows; with `mesh.cp=1`.
    """

    files: int
    skipped: int
    records: int
    left_out: int
    truncated: int
    tokens: int
    supervised: int
    rows: int
    fill: float


class ChatRows(Dataset[dict[str, Tensor]]):
    """Rows of one or more chats (steps 4 and 5). Row `TokenWindows.PADDING` has no tokens but padding.

    Args:
        store: of chats. rows: of indices of chats. seq_len: longest row. pad_id: the token that fills rows up.
    """

    def __init__(
        self, store: TokenStore, rows: Sequence[Sequence[int]], seq_len: int, *, packed: bool, pad_id: int
    ) -> None:
        self.store, self.seq_len, self.packed, self.pad_id = store, seq_len, packed, pad_id
        self._chats = np.array([chat for row in rows for chat in row], dtype=np.int64)
        self._starts = np.cumsum([0, *map(len, rows)])
        chat_lengths = np.minimum(store.lengths() - 1, seq_len)[self._chats]
        self.lengths = np.add.reduceat(chat_lengths, self._starts[:-1])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == TokenWindows.PADDING:
            return {name: torch.zeros(0, dtype=torch.int64) for name in ("input_ids", "labels", "position_ids")}
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        chats = self._chats[self._starts[index] : self._starts[index + 1]]
        parts = [self._chat(int(chat)) for chat in chats]
        return {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}

    def _chat(self, chat: int) -> dict[str, NDArray[np.int64]]:
        start, end = self.store.bounds(chat)
        length = min(end - start - 1, self.seq_len)
        tokens = self.store.tokens(start, start + length + 1)
        targets = self.store.targets(start + 1, start + length + 1)
        labels = np.where(targets, tokens[1:], IGNORED)
        return {"input_ids": tokens[:-1], "labels": labels, "position_ids": np.arange(length)}

    def collate(self, items: list[dict[str, Tensor]], multiple: int = 1) -> dict[str, Tensor]:
        """A batch: rows filled up to the longest, and to a `multiple`.

        Positions of padding start at 0: it is a chat of its own.
        """
        longest = -(-max(2, *(len(item["input_ids"]) for item in items)) // multiple) * multiple
        shape = (len(items), longest)
        batch = {
            "input_ids": torch.full(shape, self.pad_id),
            "labels": torch.full(shape, IGNORED),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "position_ids": torch.zeros(shape, dtype=torch.int64),
        }
        for row, item in enumerate(items):
            length = len(item["input_ids"])
            for name, values in item.items():
                batch[name][row, :length] = values
            batch["attention_mask"][row, :length] = 1
            batch["position_ids"][row, length:] = torch.arange(longest - length)
        if not self.packed:
            del batch["position_ids"]
        return batch


def load_chats(
    found: Found, data: DataConfig, renderer: ChatRenderer, cache: Path, seed: int
) -> tuple[ChatRows, ChatRows, ChatCounts, str]:
    """(training, validation, counts, hash of all that was rendered).

    Raises:
        ConfigError: a record is wrong, or too few have targets.
    """
    store = chat_store(found, data, renderer, cache)
    targets = _Targets(store, data.seq_len)
    used = targets.used  # Step 2
    order = used[shuffled(np.arange(len(used)), max(1, len(used)), HELD_OUT)]  # Step 3
    held_out = num_held_out(len(used), data.val_fraction, "chat with a target within data.seq_len")
    train = order[held_out:]
    train = train[shuffled(np.arange(len(train)), len(train), f"seed {seed}")]
    packed = data.layout is RowLayout.pack
    splits = []
    for chats in (train, order[:held_out]):
        lengths = targets.lengths[chats]
        rows = pack(lengths, data.seq_len) if packed else [[index] for index in range(len(chats))]  # Step 4
        numbered = [[int(chats[index]) for index in row] for row in rows]
        splits.append(ChatRows(store, numbered, data.seq_len, packed=packed, pad_id=renderer.pad_id))
    counts = ChatCounts(
        files=len(found.files), skipped=len(found.skipped), records=store.num_documents,
        left_out=store.num_documents - len(used), truncated=targets.num_truncated,
        tokens=int(targets.lengths[used].sum()), supervised=targets.total, rows=sum(map(len, splits)),
        fill=_fill(splits[0], data.micro_batch_size, seed),
    )  # fmt: skip
    return splits[0], splits[1], counts, key_of(store.folder.name, data.layout.value)


def _fill(rows: ChatRows, micro_batch_size: int, seed: int) -> float:
    """Tokens over places in the micro-batches of the first pass."""
    lengths = rows.lengths[permutation(len(rows), seed, 0).numpy()]
    starts = np.arange(0, len(lengths), micro_batch_size)
    sizes = np.diff(starts, append=len(lengths))
    return float(lengths.sum() / (np.maximum.reduceat(lengths, starts) * sizes).sum())


def chat_store(found: Found, data: DataConfig, renderer: ChatRenderer, cache: Path) -> TokenStore:
    """The rendered chats; made by the first process that comes, and only once (step 1).

    Raises:
        ConfigError: a record is wrong.
    """
    contents = [content_of(path, cache) for path in found.files]
    key = key_of("chats", _FORMAT, contents, renderer.tokenizer.to_str(), renderer.template)
    return TokenStore(made(cache, key, partial(_render, found, renderer)))


class _Targets:
    """Of every chat: used length in tokens, and whether there is a target within it (step 2)."""

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        full = store.lengths() - 1
        self.lengths = np.minimum(full, seq_len)
        first, count = (np.fromfile(store.folder / name, dtype=np.int32) for name in ("first.bin", "count.bin"))
        has_target = (count > 0) & (first <= self.lengths)
        self.used = np.flatnonzero(has_target)
        cut = np.flatnonzero(has_target & (full > seq_len))
        self.num_truncated = len(cut)
        self.total = int(count[self.used].astype(np.int64).sum())
        for chat in cut.tolist():  # their targets beyond `seq_len` do not count
            start, end = store.bounds(chat)
            self.total -= int(store.targets(start + seq_len + 1, end).sum())


def _render(found: Found, renderer: ChatRenderer, folder: Path) -> None:
    """Step 1. first.bin, count.bin: position of the first target of each chat, from 1, and number of targets; int32."""
    progress = Progress("rendering chats", "of them")
    with (
        StoreWriter(folder, num_ids(renderer.tokenizer), has_targets=True) as writer,
        (folder / "first.bin").open("wb") as first_file,
        (folder / "count.bin").open("wb") as count_file,
    ):
        for path in found.files:
            for record in records(path):
                tokens, targets = _encoded(record, renderer)
                writer.add(tokens, targets)
                places = np.flatnonzero(targets[1:]) + 1  # nothing is before the first token to predict it from
                first_file.write(np.int32(places[0] if len(places) else 0).tobytes())
                count_file.write(np.int32(len(places)).tobytes())
                progress.show(writer.num_documents)
        writer.end({})


def _encoded(record: Record, renderer: ChatRenderer) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    messages, tools = messages_of(record), record.value.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise bad(record.where, "tools is not a list", "Write a list of JSON schemas of functions")
    check_characters(record, [messages, tools])
    try:
        tokens, targets = renderer.encode(messages, tools or None)
    except ChatError as error:
        raise bad(record.where, str(error), "Correct the record, or the chat template beside the model") from error
    if len(tokens) < 2:
        raise bad(record.where, f"the template makes {len(tokens)} tokens of it", "Correct the record")
    return np.array(tokens, dtype=np.int64), np.array(targets, dtype=np.bool_)


def messages_of(record: Record) -> list[dict[str, Any]]:
    """The messages of a record, with `prompt` and `completion` as a user's and the assistant's.

    Raises:
        ConfigError: it has neither, or a message is wrong.
    """
    value = record.value
    if value.get("messages") is None and {"prompt", "completion"} <= value.keys():
        for name in ("prompt", "completion"):
            if not isinstance(value[name], str):
                rule = f"{name} is {type(value[name]).__name__}, not a string"
                raise bad(record.where, rule, f"Write strings, or join lists of messages: {_SHAPE[6:]}")
        roles = zip(("user", "assistant"), ("prompt", "completion"), strict=True)
        return [{"role": role, "content": value[name]} for role, name in roles]
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        fields = ", ".join(map(str, value)) or "none"
        raise bad(record.where, f"has no list of messages, nor prompt and completion (fields: {fields[:200]})", _SHAPE)
    checked = [_message(message, f"messages[{i}]", record.where) for i, message in enumerate(messages)]
    if not any(message["role"] == "assistant" for message in checked):
        raise bad(record.where, "has no message of the assistant, so there is nothing to learn", "Remove the record")
    return checked


def _message(message: Any, name: str, where: str) -> dict[str, Any]:
    """A message without the fields that are null, which a table has in every row."""
    if not isinstance(message, dict):
        raise bad(where, f"{name} is {type(message).__name__}, not an object", _SHAPE)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise bad(where, f"{name}.role is {role!r}, not one of {', '.join(ROLES)}", "Rename the role")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise bad(where, f"{name}.content is {type(content).__name__}, not a string", "Write the text of the message")
    return {key: item for key, item in message.items() if item is not None or key == "content"}


def pack(lengths: NDArray[np.int64], size: int) -> list[list[int]]:
    """Rows of indices into `lengths`, the longest first in each; every row has at most `size` tokens.

    Args:
        lengths: of the chats in tokens, each in 1 .. size.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # room in tokens -> rows, the newest last
    rooms = 0  # bit r: some row has room for r more tokens
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1  # the lowest bit: the fullest of these rows
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = size, len(rows)
            rows.append([])
        rows[row].append(index)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows
