"""Text, tokens and batches. Indices are written by hand."""

from __future__ import annotations

import hashlib
import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from moecompile.errors import ConfigError
from moecompile.runtime import data as room
from moecompile.runtime.data import (
    GlobalBatchSampler,
    TokenWindows,
    ValidationSampler,
    encode,
    load_data,
    load_text,
    shared_tokenizer,
    split_text,
    train_loader,
    train_tokenizer,
    unigram_cross_entropy,
    unigram_entropy,
    val_loader,
)
from moecompile.schema import DataConfig

# -- text ------------------------------------------------------------------------------------------------------------


def test_the_embedded_corpus_is_the_one_that_its_notice_describes() -> None:
    text = load_text(DataConfig())
    assert text.startswith("CHAPTER 1. Loomings.")
    notice = (Path(room.__file__).parent / "NOTICE").read_text()
    assert hashlib.sha256(text.encode()).hexdigest() in notice


def test_a_file_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Größe\n", encoding="utf-8")
    assert load_text(DataConfig(path=str(tmp_path / "text"))) == "Größe\n"


def test_an_unknown_corpus() -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(DataConfig(corpus="ulysses"))
    assert str(caught.value) == "data.corpus=ulysses: must be one of moby_dick. Use one of these, or give data.path."


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^data.path=.*/none: there is no such file, and one text file is read\. Give"
    ):
        load_text(DataConfig(path=str(tmp_path / "none")))
    (tmp_path / "latin").write_bytes("Gr\xf6\xdfe".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin: is not UTF-8 text \(byte 2\)"):
        load_text(DataConfig(path=str(tmp_path / "latin")))


def test_the_tail_is_held_out_from_a_line_start_on() -> None:
    text = "one\ntwo\nthree\nfour\n"  # 19 characters, lines start at 0, 4, 8, 14
    assert split_text(text, 0.5) == ("one\ntwo\n", "three\nfour\n")  # 9.5 -> 10, back to 8
    assert split_text(text, 0.1) == ("one\ntwo\nthree\n", "four\n")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "leaves no whole line"),
        ("no line break at all", "cuts after a line, and .* data=corpus"),
        ("\n", "leaves no"),
    ],
)
def test_a_text_that_cannot_be_split(text: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rf"data.val_fraction=0.5: {rule}"):
        split_text(text, 0.5)


# -- tokens ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text() -> str:
    return load_text(DataConfig())[:60_000]


def test_the_tokenizer_is_deterministic_and_loses_nothing(text: str) -> None:
    tokenizer = train_tokenizer(text, 512)
    assert tokenizer.get_vocab_size() == 512
    assert tokenizer.to_str() == train_tokenizer(text, 512).to_str()
    unseen = "  Größe \u2014 \U0001f40b\n\n\tx"
    tokens = encode(tokenizer, unseen)
    assert (tokens.dtype, tokens.dim()) == (torch.int64, 1)
    assert tokenizer.decode(tokens.tolist()) == unseen


def test_a_text_that_is_too_short_for_the_vocabulary() -> None:
    with pytest.raises(ConfigError) as caught:
        train_tokenizer("abc" * 5, 300)
    assert str(caught.value) == (
        "data.vocab_size=300: the training text (15 characters) yields 261 entries only. Use 261, or a longer text."
    )


def test_rank_0_writes_the_tokenizer_and_the_others_wait_for_it(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("left from another run")
    read: list[Tokenizer] = []

    def barrier() -> None:
        """Rank 0 has arrived, so rank 1 may read; it must not write."""
        written = path.stat().st_mtime_ns
        read.append(shared_tokenizer(path, text, 300, rank=1, barrier=lambda: None))
        assert path.stat().st_mtime_ns == written

    ours = shared_tokenizer(path, text, 300, rank=0, barrier=barrier)
    assert ours.to_str() == read[0].to_str()
    assert list(tmp_path.iterdir()) == [path]


def test_entropies_by_hand() -> None:
    tokens = torch.tensor([0, 0, 1, 2])  # frequencies 1/2, 1/4, 1/4
    assert unigram_entropy(tokens, 5) == pytest.approx(1.5 * math.log(2))
    # Counts plus one: 3, 2, 2, 1 of 8.
    expected = (math.log(8 / 3) + math.log(8 / 1)) / 2
    assert unigram_cross_entropy(tokens, torch.tensor([0, 3]), 4) == pytest.approx(expected)


# -- batches ---------------------------------------------------------------------------------------------------------


def test_windows_lie_side_by_side_and_labels_are_shifted() -> None:
    windows = TokenWindows(torch.arange(10, 21), seq_len=5)  # 11 tokens: the last one is a label only
    assert len(windows) == 2
    assert windows[0]["input_ids"].tolist() == [10, 11, 12, 13, 14]
    assert windows[0]["labels"].tolist() == [11, 12, 13, 14, 15]
    assert windows[1]["input_ids"].tolist() == [15, 16, 17, 18, 19]
    assert windows[1]["labels"].tolist() == [16, 17, 18, 19, 20]
    assert windows[TokenWindows.PADDING]["labels"].tolist() == [-100] * 5
    for outside in (2, -2):
        with pytest.raises(IndexError):
            windows[outside]
    assert [len(TokenWindows(torch.arange(n), 5)) for n in (0, 5, 6, 10)] == [0, 0, 1, 1]


def _sampler(rank: int, world_size: int, *, windows: int = 5, micro: int = 2, **kwargs: int) -> GlobalBatchSampler:
    return GlobalBatchSampler(
        windows, global_batch_size=8, micro_batch_size=micro, rank=rank, world_size=world_size, seed=3, **kwargs
    )


def _identity(num_windows: int, seed: int, epoch: int) -> list[int]:
    return list(range(num_windows))


def test_micro_batches_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecompile.runtime.data.batches.permutation", _identity)
    # Positions 0..15 of 5 windows: 0 1 2 3 4 | 0 1 2 3 4 | 0 1 2 3 4 | 0; a step has 8.
    assert list(_sampler(0, 1, num_steps=2)) == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4], [0, 1], [2, 3], [4, 0]]
    assert list(_sampler(0, 2, num_steps=2)) == [[0, 1], [2, 3], [3, 4], [0, 1]]
    assert list(_sampler(1, 2, num_steps=2)) == [[4, 0], [1, 2], [2, 3], [4, 0]]
    assert list(_sampler(3, 4, num_steps=2)) == [[1, 2], [4, 0]]
    assert list(_sampler(0, 1, micro=8, num_steps=1)) == [[0, 1, 2, 3, 4, 0, 1, 2]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_micro_batches_in_order_are_those_of_one_process(world_size: int) -> None:
    steps, per_step = 7, 4  # micro-batches of 2 in a global batch of 8
    alone = list(_sampler(0, 1, num_steps=steps))
    ranks = [list(_sampler(rank, world_size, num_steps=steps)) for rank in range(world_size)]
    each = per_step // world_size
    together = [
        batch for step in range(steps) for of_rank in ranks for batch in of_rank[step * each : (step + 1) * each]
    ]
    assert together == alone


def test_resuming_on_another_mesh_continues_exactly() -> None:
    alone = list(_sampler(0, 1, num_steps=6))
    resumed = [list(_sampler(rank, 2, start_step=4, num_steps=2)) for rank in range(2)]
    assert [*resumed[0][:2], *resumed[1][:2], *resumed[0][2:], *resumed[1][2:]] == alone[16:]


def test_each_epoch_has_each_window_once_in_another_order() -> None:
    batches = list(_sampler(0, 1, windows=16, num_steps=4))
    flat = [window for batch in batches for window in batch]
    assert sorted(flat[:16]) == sorted(flat[16:]) == list(range(16))
    assert flat[:16] != flat[16:]
    other = GlobalBatchSampler(16, global_batch_size=8, micro_batch_size=2, rank=0, world_size=1, seed=4, num_steps=4)
    assert [window for batch in other for window in batch] != flat
    assert list(_sampler(0, 1, windows=16, num_steps=4)) == batches


def test_without_num_steps_there_is_no_end() -> None:
    endless = _sampler(0, 2)
    assert len(list(islice(endless, 1000))) == 1000
    with pytest.raises(TypeError):
        len(endless)
    assert len(_sampler(0, 2, num_steps=3)) == 6


def test_a_global_batch_that_is_not_whole() -> None:
    with pytest.raises(ValueError, match="must leave no rest"):
        _sampler(0, 3)


def test_validation_batches_by_hand() -> None:
    # 7 windows, 2 ranks, micro-batches of 2: the second round lacks one window.
    ranks = [ValidationSampler(7, micro_batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert [list(rank) for rank in ranks] == [[[0, 1], [4, 5]], [[2, 3], [6, -1]]]
    # Even a rank without any window goes along.
    lone = [list(ValidationSampler(1, micro_batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert lone == [[[0, -1]], [[-1, -1]]]
    # val_batches=1: the first 1 * 2 * 2 windows.
    first = [ValidationSampler(7, micro_batch_size=2, rank=rank, world_size=2, max_batches=1) for rank in range(2)]
    assert [list(rank) for rank in first] == [[[0, 1]], [[2, 3]]]
    assert [len(rank) for rank in (*ranks, *first)] == [2, 2, 1, 1]
    assert len(ValidationSampler(7, micro_batch_size=2, rank=0, world_size=2, max_batches=9)) == 2


def test_from_config_to_batches(text: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(text)
    config = DataConfig(path=str(tmp_path / "text"), vocab_size=400, seq_len=64, global_batch_size=8)
    loaded = load_data(config, tmp_path, rank=0, barrier=lambda: None)
    assert len(loaded.train) > 10 * len(loaded.val) > 0
    assert loaded.train.tokens.max() < 400
    batch = next(iter(train_loader(loaded.train, config, seed=0, rank=1, world_size=2)))
    assert {name: tuple(value.shape) for name, value in batch.items()} == {"input_ids": (4, 64), "labels": (4, 64)}
    targets = sum(
        int((batch["labels"] != -100).sum())
        for rank in range(2)
        for batch in val_loader(loaded.val, config, rank=rank, world_size=2)
    )
    assert targets == 64 * len(loaded.val)


def test_a_split_that_is_shorter_than_one_sequence(text: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(text)
    config = DataConfig(path=str(tmp_path / "text"), vocab_size=400, seq_len=5000)
    with pytest.raises(ConfigError, match=r"data.seq_len=5000: a split of the text has \d+ tokens, too few"):
        load_data(config, tmp_path, rank=0, barrier=lambda: None)
