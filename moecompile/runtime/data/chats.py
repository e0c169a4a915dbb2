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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from moecompile.errors import ChatError, ConfigError
from moecompile.runtime.data.batches import IGNORED, TokenWindows, permutation, shuffled
from moecompile.runtime.data.cache import Progress, content_of, key_of, made
from moecompile.runtime.data.corpus import HELD_OUT, num_held_out
from moecompile.runtime.data.store import StoreWriter, TokenStore
from moecompile.runtime.data.tokens import num_ids
from moecompile.runtime.records import Found, Record, bad, check_characters, reader_code, records
from moecompile.schema import DataConfig, RowLayout

ROLES = ("system", "developer", "user", "assistant", "tool")
_LOOKED_AT = 1_000  # chats of which is tried whether the template renders what they say
OPEN, CLOSE = "\u27e6", "\u27e7"
"""What stands around targets where a chat is shown."""
_TRIED = 64  # chats that are looked at for prompts
_PERCENTILES = (5, 50, 95, 100)
_MANY = 0.05  # share of the chats from which on a loss is a warning
_SHAPE = 'Write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
_FORMAT = 4  # of stores; a change makes them anew


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

    def rendered(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> dict[str, bool]:
        """Role -> whether anything of what it says is in the text. Raises ChatError."""
        ...


@dataclass(frozen=True)
class ChatCounts:
    """What is in a set of chats, training and validation together.

    records: chats in the files. left_out: those of them without a target. truncated: others longer than `seq_len`.
    no_target: those left out that would have none at any length. empty: those with an answer that says nothing.
    lengths: percentile -> tokens of a chat before it is cut. unrendered: role -> [chats of whose content in that role
    the template renders nothing, chats with such content], of the first 1,000. tokens, supervised: inputs and targets
    in one pass. rows: of tokens, of one chat or several. fill: tokens over places in batches, the rest of which is
    padding, in the first pass over the training rows; with `mesh.cp=1`.
    """

    files: int
    skipped: int
    records: int
    left_out: int
    truncated: int
    no_target: int
    empty: int
    lengths: dict[str, int]
    unrendered: dict[str, list[int]]
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

    def typical(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens of a chat whose length is closest to the median, uncut, and which of them are targets."""
        lengths = self.store.lengths()[self._chats]
        start, end = self.store.bounds(int(self._chats[np.argmin(np.abs(lengths - np.median(lengths)))]))
        return self.store.tokens(start, end), self.store.targets(start, end)

    def prompts(self, count: int, room: int, tokenizer: Tokenizer) -> dict[str, Tensor]:
        """The first chats, as far as the assistant's first token, with places for an answer.

        Those come first whose answer has `room` tokens within `seq_len`.

        Returns:
            `input_ids` and `labels` (B, S), of which no label is a target; `starts` (B,): the first place of the
            answer; `ends` (B,): the token that ends a turn, -1 if no special one does.
        """
        chats = [int(chat) for chat in self._chats[:_TRIED]]
        found = [(*self._turn(chat), chat) for chat in chats]
        chosen = sorted(found, key=lambda turn: max(0, turn[0] + room - self.seq_len))[:count]
        starts = [start for start, _, _ in chosen]
        longest = max(starts) + max(1, min(room, self.seq_len - max(starts)))
        special = tokenizer.get_added_tokens_decoder()
        ids = torch.full((len(chosen), longest), self.pad_id)
        for row, (start, _, chat) in enumerate(chosen):
            first, _ = self.store.bounds(chat)
            ids[row, :start] = torch.from_numpy(self.store.tokens(first, first + start))
        return {
            "input_ids": ids,
            "labels": torch.full_like(ids, IGNORED),
            "starts": torch.tensor(starts),
            "ends": torch.tensor([end if end in special else -1 for _, end, _ in chosen]),
        }

    def _turn(self, chat: int) -> tuple[int, int]:
        """Place of the first target of a chat, and the last token of the targets that begin there."""
        first, last = self.store.bounds(chat)
        targets = self.store.targets(first, last)
        start = int(np.argmax(targets[1:])) + 1  # the first token is no target
        others = np.flatnonzero(~targets[start:])
        end = start + int(others[0]) if len(others) else last - first
        return start, int(self.store.tokens(first + end - 1, first + end)[0])

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
    if len(used) < 2 and targets.num_cut_out:
        raise ConfigError(
            "data.seq_len", data.seq_len,
            f"leaves no target in {targets.num_cut_out:,} of {store.num_documents:,} chats, and two are needed",
            f"Raise it: half of the chats have at most {targets.percentiles['50%']:,} tokens, the longest "
            f"{targets.percentiles['100%']:,}",
        )  # fmt: skip
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
        no_target=store.num_documents - len(used) - targets.num_cut_out, empty=store.counts["empty"],
        lengths=targets.percentiles, unrendered=store.counts["unrendered"],
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
    contents = [[content_of(path, cache), reader_code(path)] for path in found.files]
    key = key_of("chats", _FORMAT, contents, renderer.tokenizer.to_str(), renderer.template)
    return TokenStore(made(cache, key, partial(_render, found, renderer)))


def warnings_of(counts: ChatCounts, seq_len: int) -> list[str]:
    """What a user should know of a set of chats before a model is trained on it; a sentence each, without full stop."""
    found, lost = [], counts.left_out - counts.no_target
    if counts.truncated + lost > _MANY * counts.records:
        what = [f"{counts.truncated:,} cut off"] * bool(counts.truncated)
        what += [f"{lost:,} left out, as no target is left"] * bool(lost)
        found.append(
            f"{_share(counts.truncated + lost, counts.records)} are longer than data.seq_len={seq_len}: "
            f"{', '.join(what)}; 95% of the chats have at most {counts.lengths['95%']:,} tokens"
        )
    if counts.no_target:
        found.append(f"{_share(counts.no_target, counts.records)} have no token that the assistant wrote: left out")
    if counts.empty:
        found.append(f"{_share(counts.empty, counts.records)} have an empty answer: they teach to say nothing")
    for role, (missing, total) in counts.unrendered.items():
        if missing > _MANY * total:
            rule = f"the chat template renders nothing of what the role {role} says"
            found.append(f"{rule}, in {missing:,} of {total:,} chats where it was tried")
    return found


def marked(rows: ChatRows, tokenizer: Tokenizer) -> tuple[str, int]:
    """A typical chat as text, with its targets in brackets, as far as it is used; and its tokens."""
    tokens, targets = rows.typical()
    used, text, plain = min(len(tokens), rows.seq_len + 1), "", ""
    flips = np.flatnonzero(np.diff(targets[:used].astype(np.int8))) + 1
    for start, end in pairwise([0, *flips.tolist(), used]):
        before, plain = plain, tokenizer.decode(tokens[:end].tolist(), skip_special_tokens=False)
        part = plain[len(before) :]  # some tokenizers write a space between parts only
        text += f"{OPEN}{part}{CLOSE}" if targets[start] else part
    left = len(tokens) - used
    return text + (f" ... and {left:,} tokens that are cut off" if left else ""), len(tokens) - 1


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} chats ({count / total:.1%})"


class _Targets:
    """Of every chat: used length in tokens, and whether there is a target within it (step 2).

    num_truncated, num_cut_out: longer chats with a target within `seq_len`, and those that have targets only beyond it.
    """

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        full = store.lengths() - 1
        self.lengths = np.minimum(full, seq_len)
        first, count = (np.fromfile(store.folder / name, dtype=np.int32) for name in ("first.bin", "count.bin"))
        has_target = (count > 0) & (first <= self.lengths)
        self.used = np.flatnonzero(has_target)
        cut = np.flatnonzero(has_target & (full > seq_len))
        self.num_truncated, self.num_cut_out = len(cut), int((count > 0).sum()) - len(self.used)
        marks = np.percentile(full, _PERCENTILES, method="inverted_cdf").astype(int).tolist() if len(full) else []
        self.percentiles = {f"{percent}%": length for percent, length in zip(_PERCENTILES, marks, strict=False)}
        self.total = int(count[self.used].astype(np.int64).sum())
        for chat in cut.tolist():  # their targets beyond `seq_len` do not count
            start, end = store.bounds(chat)
            self.total -= int(store.targets(start + seq_len + 1, end).sum())


def _render(found: Found, renderer: ChatRenderer, folder: Path) -> None:
    """Step 1. first.bin, count.bin: position of the first target of each chat, from 1, and number of targets; int32."""
    progress, said = Progress("rendering chats", "of them"), _Said()
    with (
        StoreWriter(folder, num_ids(renderer.tokenizer), has_targets=True) as writer,
        (folder / "first.bin").open("wb") as first_file,
        (folder / "count.bin").open("wb") as count_file,
    ):
        for path in found.files:
            for record in records(path):
                tokens, targets = _encoded(record, renderer, said)
                writer.add(tokens, targets)
                places = np.flatnonzero(targets[1:]) + 1  # nothing is before the first token to predict it from
                first_file.write(np.int32(places[0] if len(places) else 0).tobytes())
                count_file.write(np.int32(len(places)).tobytes())
                progress.show(writer.num_documents)
        said.check()
        writer.end({"empty": said.empty, "unrendered": said.unrendered})


class _Said:
    """What chats say, and whether the template renders it.

    empty: chats with an empty answer. unrendered: see `ChatCounts`.
    """

    def __init__(self) -> None:
        self.empty, self.unrendered = 0, dict[str, list[int]]()
        self._room = _LOOKED_AT

    def add(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, renderer: ChatRenderer) -> None:
        """Counts a chat that can be rendered."""
        self.empty += any(
            message["role"] == "assistant" and not (message["content"] or "").strip() and not message.get("tool_calls")
            for message in messages
        )
        if self._room:
            self._room -= 1
            for role, is_rendered in renderer.rendered(messages, tools).items():
                count = self.unrendered.setdefault(role, [0, 0])
                count[0], count[1] = count[0] + (not is_rendered), count[1] + 1
            if not self._room:
                self.check()

    def check(self) -> None:
        """Checks that there is something to learn.

        Raises:
            ConfigError: no answer of the assistant is rendered.
        """
        missing, total = self.unrendered.get("assistant", (0, 0))
        if total and missing == total:
            what = "any message" if all(gone == of for gone, of in self.unrendered.values()) else "any answer"
            raise ConfigError(
                "data.kind", "sft",
                f"the chat template beside the model renders nothing of {what}, in all {total:,} chats that were tried",
                "Correct the template: it must write message.content of each message",
            )  # fmt: skip


def _encoded(record: Record, renderer: ChatRenderer, said: _Said) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    messages, tools = messages_of(record), record.value.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise bad(record.where, "tools is not a list", "Write a list of JSON schemas of functions")
    check_characters(record, [messages, tools])
    try:
        tokens, targets = renderer.encode(messages, tools or None)
        said.add(messages, tools or None, renderer)
    except ChatError as error:
        raise bad(record.where, str(error), "Correct the record, or the chat template beside the model") from error
    if len(tokens) < 2:
        rule = f"the template makes {len(tokens)} tokens of it"
        raise bad(record.where, rule, "Correct the record, or the chat template beside the model")
    return np.array(tokens, dtype=np.int64), np.array(targets, dtype=np.bool_)


def messages_of(record: Record) -> list[dict[str, Any]]:
    """The messages of a record, which may have one of four shapes: see `_SHAPES`.

    Raises:
        ConfigError: it has none of them, or a message is wrong.
    """
    value = record.value
    shape = next((fields for fields in _SHAPES if all(value.get(field) is not None for field in fields)), None)
    if shape is None:  # a field of it may be null
        shape = next((fields for fields in _SHAPES if fields <= value.keys()), frozenset())
    key = "conversations" if "conversations" in shape else "messages"
    messages = _SHAPES[shape](record) if shape else None
    if not isinstance(messages, list) or not messages:
        fields = ", ".join(map(str, value)) or "none"
        rule = f"has no list of messages, nor {_OTHERS} (fields: {fields[:200]})"
        raise bad(record.where, rule, _SHAPE)
    checked = [_message(message, f"{key}[{i}]", record.where) for i, message in enumerate(messages)]
    if not any(message["role"] == "assistant" for message in checked):
        raise bad(record.where, "has no message of the assistant, so there is nothing to learn", "Remove the record")
    return checked


def _strings(record: Record, *names: str) -> list[str]:
    """Fields that must be strings."""
    for name in names:
        if not isinstance(record.value[name], str):
            rule = f"{name} is {type(record.value[name]).__name__}, not a string"
            raise bad(record.where, rule, f"Write strings, or join lists of messages: {_SHAPE[6:]}")
    return [record.value[name] for name in names]


def _completion(record: Record) -> list[Any]:
    prompt, completion = _strings(record, "prompt", "completion")
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return _with_system(record, turns)


def _instruction(record: Record) -> list[Any]:
    """Alpaca: the input, if there is one, follows the instruction after an empty line; `history` has earlier turns."""
    instruction, output = _strings(record, "instruction", "output")
    given = record.value.get("input")
    prompt = f"{instruction}\n\n{_strings(record, 'input')[0]}" if given else instruction
    turns = [*(record.value.get("history") or []), (prompt, output)]
    roles = ("user", "assistant")
    messages = []
    for turn in turns:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise bad(record.where, "history is not a list of pairs", "Write [[instruction, output], ...]")
        messages += [{"role": role, "content": content} for role, content in zip(roles, turn, strict=True)]
    return _with_system(record, messages)


def _conversations(record: Record) -> Any:
    """ShareGPT: `from` and `value`, which some files call `role` and `content`."""
    turns = record.value["conversations"]
    if not isinstance(turns, list):
        return None
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or "from" not in turn:
            messages.append(turn)
            continue
        name, said = turn["from"], turn.get("value")
        role = next((role for role, names in _SPEAKERS.items() if name in names), None)
        if role is None:
            known = ", ".join(name for names in _SPEAKERS.values() for name in names)
            raise bad(record.where, f"conversations[{i}].from is {name!r}, not one of {known}", "Rename it")
        if not isinstance(said, str):
            rule = f"conversations[{i}].value is {type(said).__name__}, not a string"
            raise bad(record.where, rule, "Write the text of the message")
        messages.append({"role": role, "content": said})
    return _with_system(record, messages)


def _with_system(record: Record, messages: list[Any]) -> list[Any]:
    """The messages after the field `system`, if there is one and they do not begin with it."""
    if not record.value.get("system") or not messages:
        return messages
    first = {"role": "system", "content": _strings(record, "system")[0]}
    begins = isinstance(messages[0], dict) and messages[0].get("role") == "system"
    if begins and messages[0].get("content") != first["content"]:
        raise bad(record.where, "has a system message, and another one in the field system", "Remove one of them")
    return messages if begins else [first, *messages]


def _messages(record: Record) -> Any:
    messages = record.value["messages"]
    return _with_system(record, messages) if isinstance(messages, list) else None


_SHAPES: dict[frozenset[str], Callable[[Record], Any]] = {
    frozenset({"messages"}): _messages,
    frozenset({"conversations"}): _conversations,
    frozenset({"prompt", "completion"}): _completion,
    frozenset({"instruction", "output"}): _instruction,
}
"""The fields that tell how a record is written -> its messages. The first that has all of them counts."""
_OTHERS = "conversations, prompt and completion, or instruction and output"
_SPEAKERS = {
    "system": ("system",),
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"),
    "tool": ("tool", "observation", "function_response"),
}
"""Role -> what ShareGPT calls it."""


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
