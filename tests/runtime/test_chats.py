"""Chats as rows: labels, masks and positions by hand, counts, packing, and an order without ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from moecompile.errors import ChatError, ConfigError
from moecompile.runtime.data import IGNORED, ChatCounts, ChatRows, TokenWindows, train_loader, val_loader
from moecompile.runtime.data.chats import load_chats, marked, messages_of, pack, warnings_of
from moecompile.runtime.records import Record, find_files
from moecompile.schema import DataConfig, DataKind, RowLayout
from moecompile.tasks.data import steps_of
from tests.chat_models import write_lines

PAD = 99


class Numbers:
    """A renderer whose contents are token ids: "5 6" of the assistant is targets 5 and 6; a message begins with 1 or 2."""

    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(100)}, unk_token="0"))
    pad_id, template = PAD, "numbers"
    silent: frozenset[str] = frozenset()  # roles of which nothing is rendered

    def encode(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
    ) -> tuple[list[int], list[bool]]:
        tokens: list[int] = []
        targets: list[bool] = []
        for message in messages:
            if message["content"] == "refuse":
                raise ChatError("the chat template refuses it: no")
            own = [int(word) for word in message["content"].split()]
            mine = message["role"] == "assistant"
            tokens += [2 if mine else 1, *own]
            targets += [False, *[mine for _ in own]]
        return tokens, targets

    def rendered(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> dict[str, bool]:
        return {m["role"]: m["role"] not in self.silent for m in messages if (m["content"] or "").strip()}


class Digits:
    """A tokenizer that writes token ids."""

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return " ".join(map(str, tokens))


def chat(*contents: str) -> dict[str, Any]:
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": next(roles), "content": content} for content in contents]}


def loaded(
    folder: Path, rows: Sequence[Mapping[str, Any]], **settings: Any
) -> tuple[ChatRows, ChatRows, ChatCounts, str]:
    path = write_lines(folder / "chats.jsonl", rows)
    data = DataConfig(kind=DataKind.sft, path=str(path), **{"seq_len": 16, "val_fraction": 0.01, **settings})
    return load_chats(find_files(data), data, Numbers(), folder, seed=settings.pop("seed", 0))


def items(rows: ChatRows) -> list[dict[str, list[int]]]:
    return [{name: values.tolist() for name, values in rows[i].items()} for i in range(len(rows))]


def test_labels_are_the_assistants_tokens_one_place_earlier(tmp_path: Path) -> None:
    train, val, counts, _ = loaded(tmp_path, [chat("10 11", "20 21", "12", "22")] * 2, layout=RowLayout.pad)
    expected = {
        "input_ids": [1, 10, 11, 2, 20, 21, 1, 12, 2], "labels": [IGNORED] * 3 + [20, 21] + [IGNORED] * 3 + [22],
        "position_ids": list(range(9)),
    }  # fmt: skip
    assert items(train) == items(val) == [expected]
    assert counts == ChatCounts(
        files=1, skipped=0, records=2, left_out=0, truncated=0, no_target=0, empty=0,
        lengths={"5%": 9, "50%": 9, "95%": 9, "100%": 9}, unrendered={"user": [0, 2], "assistant": [0, 2]}, tokens=18,
        supervised=6, rows=2, fill=1.0,
    )  # fmt: skip
    assert warnings_of(counts, 16) == [] and marked(train, Digits()) == (
        "1 10 11 2\u27e6 20 21\u27e7 1 12 2\u27e6 22\u27e7",
        9,
    )


def test_long_chats_are_cut_and_those_without_a_target_left_out(tmp_path: Path) -> None:
    rows = [
        chat("10", "20 21"),  # 4 inputs: fits
        chat("10 11", "20 21 22"),  # 6 inputs: cut to 4, one target of three remains
        chat("10 11 12", "20"),  # 5 inputs: cut to 4, its only target is gone
        chat("10", ""),  # no target at all
        chat("10", "20 21"),
    ]
    train, val, counts, _ = loaded(tmp_path, rows, seq_len=4, layout=RowLayout.pad)
    assert (counts.records, counts.left_out, counts.truncated) == (5, 2, 1)
    assert (counts.no_target, counts.empty, counts.lengths) == (1, 1, {"5%": 2, "50%": 4, "95%": 6, "100%": 6})
    assert warnings_of(counts, 4) == [
        "2 of 5 chats (40.0%) are longer than data.seq_len=4: 1 cut off, 1 left out, as no target is left; 95% of the chats have at most 6 tokens",
        "1 of 5 chats (20.0%) have no token that the assistant wrote: left out",
        "1 of 5 chats (20.0%) have an empty answer: they teach to say nothing",
    ]
    assert (counts.tokens, counts.supervised, counts.rows) == (12, 5, 3)
    found = sorted(map(str, [*items(train), *items(val)]))
    whole = {"input_ids": [1, 10, 2, 20], "labels": [IGNORED, IGNORED, 20, 21], "position_ids": [0, 1, 2, 3]}
    cut = {"input_ids": [1, 10, 11, 2], "labels": [IGNORED] * 3 + [20], "position_ids": [0, 1, 2, 3]}
    assert found == sorted(map(str, [whole, whole, cut]))


def test_prompts_end_before_the_first_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With places for an answer, and the token that ends it if it is a special one; long prompts come last."""
    rows = [chat("10 11 12 13", "20 21"), chat("10", "22 23", "14", "24"), chat("", "25 26")]
    train, _, _, _ = loaded(tmp_path, [row for row in rows for _ in range(2)], seq_len=8, layout=RowLayout.pack)
    special = Tokenizer(WordLevel({str(i): i for i in range(100)}, unk_token="0"))
    special.add_special_tokens(["23"])
    found = train.prompts(9, 4, special)
    by_prompt = {tuple(ids[:start]): (ids[start:], end) for ids, start, end in zip(
        found["input_ids"].tolist(), found["starts"].tolist(), found["ends"].tolist(), strict=True)}  # fmt: skip
    assert by_prompt == {
        (1, 10, 2): ([PAD] * 5, 23), (1, 2): ([PAD] * 6, -1), (1, 10, 11, 12, 13, 2): ([PAD] * 2, -1),
    }  # fmt: skip
    assert found["starts"].tolist()[-1] == 6 and (found["labels"] == IGNORED).all()
    assert train.prompts(2, 4, special)["input_ids"].shape[0] == 2


def test_five_in_a_hundred_may_be_long(tmp_path: Path) -> None:
    _, _, counts, _ = loaded(tmp_path, [chat("10", "20 21")] * 19 + [chat("10 11", "20 21")], seq_len=4)
    assert counts.truncated == 1 and warnings_of(counts, 4) == []
    assert len(warnings_of(replace(counts, records=19), 4)) == 1


def test_the_end_of_a_chat_that_is_cut_off_is_not_shown(tmp_path: Path) -> None:
    train, _, _, _ = loaded(tmp_path, [chat("10", "20 21 22 23")] * 2, seq_len=4)
    assert marked(train, Digits()) == ("1 10 2\u27e6 20 21\u27e7 ... and 2 tokens that are cut off", 6)


def test_no_chat_has_a_target_left(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, [chat("10 11 12", "20"), chat("10 11 12 13", "20")] * 2, seq_len=3)
    assert str(caught.value) == (
        "data.seq_len=3: leaves no target in 4 of 4 chats, and two are needed. Raise it: half of the chats have at most 5 "
        "tokens, the longest 6."
    )


def test_a_template_that_renders_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        chat("10", "20"),
        chat("10", "20"),
        {"messages": [{"role": "system", "content": "9"}, *chat("1", "2")["messages"]]},
    ]
    monkeypatch.setattr(Numbers, "silent", frozenset({"system"}))
    _, _, counts, _ = loaded(tmp_path, rows)
    assert counts.unrendered == {"user": [0, 3], "assistant": [0, 3], "system": [1, 1]}
    assert warnings_of(counts, 16) == [
        "the chat template renders nothing of what the role system says, in 1 of 1 chats where it was tried"
    ]
    for silent, what in (({"assistant"}, "answer"), ({"system", "user", "assistant"}, "message")):
        monkeypatch.setattr(Numbers, "silent", frozenset(silent))
        monkeypatch.setattr(Numbers, "template", what)  # else it is in the cache
        with pytest.raises(ConfigError) as caught:
            loaded(tmp_path, rows)
        assert str(caught.value) == (
            f"data.kind=sft: the chat template beside the model renders nothing of any {what}, in all 3 chats that were "
            "tried. Correct the template: it must write message.content of each message."
        )


@pytest.mark.parametrize("layout", RowLayout)
def test_an_epoch_has_every_row_once(layout: RowLayout, tmp_path: Path) -> None:
    """On several ranks with accumulation; what is left of the last step is of the next pass."""
    train, _, _, _ = loaded(tmp_path, many(), layout=layout)
    data = DataConfig(kind=DataKind.sft, layout=layout, global_batch_size=8, micro_batch_size=2)
    for epochs in (0.5, 1, 3):
        steps = steps_of(epochs, len(train), 8)
        seen: Counter[int] = Counter()
        for rank in range(2):
            loader = train_loader(train, data, seed=0, rank=rank, world_size=2, num_steps=steps)
            assert loader.batch_sampler is not None
            seen += Counter(row for batch in loader.batch_sampler for row in batch)
        assert epochs * len(train) <= seen.total() < epochs * len(train) + 8
        assert max(seen.values()) - min(seen[row] for row in range(len(train))) <= 1
    assert (steps_of(2, 88, 8), steps_of(0.1, 30, 3), steps_of(0.001, 10, 8)) == (22, 1, 1)


def test_ids_with_gaps_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Numbers, "tokenizer", Tokenizer(WordLevel({"0": 0, "70071": 70_071}, unk_token="0")))
    train, _, _, _ = loaded(tmp_path, [chat("10", "70071 21")] * 2, layout=RowLayout.pad)
    assert items(train)[0]["labels"] == [IGNORED, IGNORED, 70_071, 21]


def test_a_batch_is_filled_up(tmp_path: Path) -> None:
    rows = ChatRows.__new__(ChatRows)
    rows.pad_id, rows.packed = PAD, True
    long = {
        "input_ids": torch.tensor([1, 7, 1]),
        "labels": torch.tensor([7, -100, 8]),
        "position_ids": torch.tensor([0, 1, 0]),
    }
    short = {"input_ids": torch.tensor([5]), "labels": torch.tensor([6]), "position_ids": torch.tensor([0])}
    nothing = {name: torch.zeros(0, dtype=torch.int64) for name in long}
    batch = {name: values.tolist() for name, values in rows.collate([long, short, nothing]).items()}
    assert batch == {
        "input_ids": [[1, 7, 1], [5, PAD, PAD], [PAD, PAD, PAD]],
        "labels": [[7, -100, 8], [6, -100, -100], [-100, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0], [0, 0, 0]],
        "position_ids": [[0, 1, 0], [0, 0, 1], [0, 1, 2]],  # padding is a chat of its own
    }
    rows.packed = False
    assert set(rows.collate([short])) == {"input_ids", "labels", "attention_mask"}


def many(count: int = 60) -> list[dict[str, Any]]:
    return [chat(" ".join(["10"] * (1 + i % 7)), " ".join([str(20 + i % 70)] * (1 + i % 4))) for i in range(count)]


def tokens_of(loader: Any, steps: int) -> list[Tensor]:
    return [batch["input_ids"] for batch in itertools.islice(loader, steps)]


@pytest.mark.parametrize("layout", RowLayout)
def test_the_order_does_not_depend_on_ranks_and_goes_on_anywhere(layout: RowLayout, tmp_path: Path) -> None:
    train, val, _, _ = loaded(tmp_path, many(), layout=layout)
    data = DataConfig(kind=DataKind.sft, layout=layout, global_batch_size=8, micro_batch_size=2)
    one = tokens_of(train_loader(train, data, seed=0, rank=0, world_size=1, num_steps=4), 99)
    assert len(one) == 16
    for world, start in itertools.product((1, 2, 4), (0, 3)):
        ranks = [
            tokens_of(
                train_loader(train, data, seed=0, rank=r, world_size=world, start_step=start, num_steps=4 - start), 99
            )
            for r in range(world)
        ]
        per_rank = 4 // world
        in_order = [
            batch for step in range(4 - start) for rank in ranks for batch in rank[step * per_rank : (step + 1) * per_rank]
        ]  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(in_order, one[4 * start :], strict=True))
    batches = [list(val_loader(val, data, rank=rank, world_size=4)) for rank in range(4)]
    targets = sum(int((batch["labels"] != IGNORED).sum()) for rank in batches for batch in rank)
    assert targets == sum(int((val[i]["labels"] != IGNORED).sum()) for i in range(len(val)))
    assert len({len(rank) for rank in batches}) == 1


def test_every_chat_is_in_one_row_whole(tmp_path: Path) -> None:
    """Rows are taken apart where positions start again: the chats are those of the unpacked data."""
    packed, _, counts, _ = loaded(tmp_path, many(), layout=RowLayout.pack)
    padded, _, of_padded, _ = loaded(tmp_path, many(), layout=RowLayout.pad)
    seen: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for i in range(len(packed)):
        item = packed[i]
        assert len(item["input_ids"]) <= 16 and len(item["input_ids"]) == packed.lengths[i]
        starts = [*torch.nonzero(item["position_ids"] == 0)[:, 0].tolist(), len(item["input_ids"])]
        for start, end in itertools.pairwise(starts):
            assert item["position_ids"][start:end].tolist() == list(range(end - start))
            seen[tuple(item["input_ids"][start:end].tolist()), tuple(item["labels"][start:end].tolist())] += 1
    alone = Counter(
        (tuple(padded[i]["input_ids"].tolist()), tuple(padded[i]["labels"].tolist())) for i in range(len(padded))
    )
    assert seen == alone
    assert counts.rows < of_padded.rows / 1.5 and (counts.tokens, counts.supervised) == (
        of_padded.tokens,
        of_padded.supervised,
    )


@pytest.mark.parametrize("layout", RowLayout)
def test_the_share_of_padding_is_that_of_the_batches(layout: RowLayout, tmp_path: Path) -> None:
    train, _, counts, _ = loaded(tmp_path, many(57), layout=layout, micro_batch_size=1)
    data = DataConfig(kind=DataKind.sft, layout=layout, global_batch_size=len(train), micro_batch_size=1)
    masks = [batch["attention_mask"] for batch in train_loader(train, data, seed=0, rank=0, world_size=1, num_steps=1)]
    assert counts.fill == pytest.approx(sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks))


def test_the_seed_shuffles_but_does_not_change_what_is_held_out(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "chats.jsonl", many())
    data = DataConfig(kind=DataKind.sft, path=str(path), seq_len=16, val_fraction=0.2, layout=RowLayout.pad)
    runs = [load_chats(find_files(data), data, Numbers(), tmp_path, seed) for seed in (0, 1)]
    assert items(runs[0][1]) == items(runs[1][1]) and len(runs[0][1]) == 12
    assert items(runs[0][0]) != items(runs[1][0])
    assert sorted(map(str, items(runs[0][0]))) == sorted(map(str, items(runs[1][0])))
    assert runs[0][3] == runs[1][3]
    stores = [path for path in tmp_path.iterdir() if (path / "meta.json").is_file()]
    assert len(stores) == 1  # rendered once
    write_lines(tmp_path / "chats.jsonl", many(61))
    assert load_chats(find_files(data), data, Numbers(), tmp_path, 0)[3] != runs[0][3]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "has no list of messages, nor conversations, prompt and completion, or instruction and output (fields: text). Write {\"messages\": [{"),
        ({"conversations": [{"from": "you", "value": "5"}]}, "conversations[0].from is 'you', not one of system, human, user, gpt, assistant, "),
        ({"conversations": [{"from": "gpt", "value": None}]}, "conversations[0].value is NoneType, not a string. Write the text"),
        ({"conversations": [{"role": "bot", "content": "5"}]}, "conversations[0].role is 'bot', not one of system, developer"),
        ({"conversations": "5"}, "has no list of messages, nor conversations"),
        ({"instruction": "5", "output": None}, "output is NoneType, not a string. Write strings"),
        ({"instruction": "5", "output": "6", "history": ["5"]}, "history is not a list of pairs. Write [[instruction, output]"),
        ({"messages": []}, "has no list of messages"),
        ({"messages": [], "system": "5"}, "has no list of messages"),
        ({**chat("5", "6"), "system": ["5"]}, "system is list, not a string. Write strings"),
        ({"messages": [{"role": "system", "content": "5"}], "system": "6"}, "has a system message, and another one in the field system. Remove"),
        ({"messages": ["hi"]}, "messages[0] is str, not an object."),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role is 'bot', not one of system, developer, user, assistant, tool. Rename the role."),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]}, "messages[1].content is NoneType, not a string."),
        ({"messages": [{"role": "user", "content": "x"}]}, "has no message of the assistant, so there is nothing to learn. Remove the record."),
        ({"prompt": "x", "completion": 3}, "completion is int, not a string."),
        ({"messages": [{"role": "assistant", "content": "5 6"}], "tools": {"a": 1}}, "tools is not a list. Write a list"),
        (chat("10", "\udfff"), "holds \\udfff, half of a character without the other half. Write both halves, or leave"),
        (chat("refuse", "5"), "the chat template refuses it: no. Correct the record, or the chat template beside the model."),
        ({"messages": [{"role": "assistant", "content": ""}]}, "the template makes 1 tokens of it."),
    ],
)  # fmt: skip
def test_a_bad_record_is_named(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, [chat("10", "20"), record, chat("10", "20")])
    assert str(caught.value).startswith(f"data.path={tmp_path}/chats.jsonl line 2: {message}")


def test_prompt_and_completion_are_a_chat_and_null_fields_are_none(tmp_path: Path) -> None:
    expected = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert messages_of(Record("f", {"prompt": "Q", "completion": "A", "messages": None})) == expected
    rows = [{**message, "name": None, "tool_calls": None} for message in expected]  # a table has every column
    assert messages_of(Record("f", {"messages": rows})) == expected
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert messages_of(Record("f", {"messages": [call]})) == [call]


def test_the_shapes_of_other_tools_are_read() -> None:
    """ShareGPT and Alpaca, with their fields for earlier turns; in all shapes a field for a system prompt."""
    system, question, answer = (
        {"role": role, "content": text} for role, text in (("system", "S"), ("user", "Q"), ("assistant", "A"))
    )
    said = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    for value, expected in (
        ({"conversations": said, "id": 3}, [question, answer]),
        ({"conversations": said, "system": "S"}, [system, question, answer]),
        ({"prompt": "Q", "completion": "A", "system": "S"}, [system, question, answer]),
        ({"messages": [question, answer], "system": "S"}, [system, question, answer]),
        ({"messages": [system, question, answer], "system": "S"}, [system, question, answer]),
        ({"messages": [question, answer], "system": None}, [question, answer]),
        ({"conversations": [{"from": "system", "value": "S"}, *said], "messages": None}, [system, question, answer]),
        ({"conversations": [question, answer]}, [question, answer]),
        (
            {"conversations": [*said, {"from": "observation", "value": "T"}]},
            [question, answer, {"role": "tool", "content": "T"}],
        ),
        ({"instruction": "Q", "input": "", "output": "A"}, [question, answer]),
        ({"instruction": "Q", "output": "A", "text": "Below is"}, [question, answer]),
        ({"instruction": "Q", "input": "I", "output": "A"}, [{"role": "user", "content": "Q\n\nI"}, answer]),
        (
            {"instruction": "Q", "input": None, "output": "A", "system": "S", "history": [["Q", "A"]]},
            [system, question, answer, question, answer],
        ),
    ):
        assert messages_of(Record("f", value)) == expected, value


def test_too_few_chats(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, [chat("10", "20"), chat("10", "")])
    assert str(caught.value).startswith(
        "data.val_fraction=0.01: there is one chat with a target within data.seq_len, and one is held out. Give more data."
    )


# -- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("longest", "count"), [(1, 5), (16, 40), (10, 200), (3, 7)])
def test_rows_hold_every_chat_once_and_no_more_than_fits(longest: int, count: int) -> None:
    lengths = np.random.default_rng(0).integers(1, longest + 1, count)
    rows = pack(lengths, 16)
    assert sorted(index for row in rows for index in row) == list(range(count))
    sums = [int(lengths[row].sum()) for row in rows]
    assert max(sums) <= 16
    assert sorted(sums)[:2] == sorted(sums)[:1] or sum(sorted(sums)[:2]) > 16  # two rows that could be one are none
    assert len(rows) <= np.ceil(11 / 9 * lengths.sum() / 16) + 1


def test_a_chat_goes_where_it_fits_best() -> None:
    # 7 and 6 open rows with room 3 and 4; 4 fits the second exactly; 3 fits the first exactly; 1 needs a third.
    assert pack(np.array([1, 3, 7, 4, 6]), 10) == [[2, 1], [4, 3], [0]]
    assert pack(np.zeros(0, dtype=np.int64), 10) == []


def test_a_row_of_padding_has_no_targets(tmp_path: Path) -> None:
    train, _, _, _ = loaded(tmp_path, many())
    batch = train.collate([train[TokenWindows.PADDING]])
    assert (
        batch["input_ids"].shape == (1, 2) and (batch["labels"] == IGNORED).all() and batch["attention_mask"].sum() == 0
    )
    with pytest.raises(IndexError, match="row 99 of"):
        train[99]
