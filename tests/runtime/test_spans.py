"""Span corruption and encoder-decoder models: windows by hand, the decoder's inputs, which model fits which objective."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn

from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.models.build import build_model, example_inputs
from moecompile.runtime.data import (
    IGNORED,
    GlobalBatchSampler,
    SpanCorruption,
    SpanCounts,
    TextData,
    TokenWindows,
    train_loader,
    val_loader,
)
from moecompile.runtime.module import LanguageModule, shifted
from moecompile.runtime.objective import data_for
from moecompile.schema import DataConfig, OptimizerConfig
from tests.tiny import config, tiny_llama

VOCAB, WINDOWS, SEQ = 1000, 20, 40  # sentinel i is 999 - i


def corrupted(seed: int = 0, seq_len: int = SEQ) -> SpanCorruption:
    return SpanCorruption(TokenWindows(torch.arange(WINDOWS * seq_len + 1), seq_len), VOCAB, seed)


def spliced(item: dict[str, torch.Tensor], sentinels: int) -> list[int]:
    """The window again: each sentinel of the inputs gives way to what follows it in the labels."""
    labels, found = item["labels"].tolist(), {}
    for token in labels:
        if token >= VOCAB - sentinels:
            found[token], last = [], token
        else:
            found[last].append(token)
    window = []
    for token in item["input_ids"].tolist():
        window += found.get(token, [token])
    return window


# -- corruption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "inputs"),
    [
        ([4, 5, 1], [10, 11, 12, 999, 14, 15, 16, 17, 18, 998]),  # three kept, one out, five kept, one out
        ([1, 5, 4], [999, 11, 12, 13, 14, 15, 998, 17, 18, 19]),
    ],
)
def test_one_window_by_hand(monkeypatch: pytest.MonkeyPatch, kept: list[int], inputs: list[int]) -> None:
    """10 tokens: 2 are taken out (1.5 rounded to even), here in two spans. The outer parts are one too long."""
    parts = {2: [1, 1], 10: kept}
    monkeypatch.setattr(SpanCounts, "num_spans", 2)
    monkeypatch.setattr(
        "moecompile.runtime.data.spans._random_parts", lambda random, total, num_parts: list(parts[total])
    )
    item = corrupted(seq_len=10)[1]  # window 1 is 10..19
    assert item["input_ids"].tolist() == inputs
    out = [token for token in range(10, 20) if token not in inputs]
    assert item["labels"].tolist() == [999, out[0], 998, out[1], 997]


@pytest.mark.parametrize(
    ("seq_len", "num_noise", "num_spans"), [(2, 1, 1), (7, 1, 1), (40, 6, 2), (128, 19, 6), (512, 77, 26)]
)
def test_counts_follow_from_the_length(seq_len: int, num_noise: int, num_spans: int) -> None:
    """15 % in spans of 3: 0.15 * 128 = 19.2 tokens in 6.3 spans, as in T5's own length computation."""
    counts = SpanCounts(seq_len)
    assert (counts.num_noise, counts.num_spans, counts.num_sentinels) == (num_noise, num_spans, num_spans + 1)
    item = corrupted(seq_len=seq_len)[0]
    assert (len(item["input_ids"]), len(item["labels"])) == (counts.input_len, counts.label_len)
    assert counts.input_len + counts.label_len == seq_len + 2 * num_spans + 1


def test_nothing_is_lost() -> None:
    data = corrupted()
    for i in range(WINDOWS):
        assert spliced(data[i], data.counts.num_sentinels) == list(range(i * SEQ, (i + 1) * SEQ))
        assert data[i]["labels"][0] == 999 and data[i]["labels"][-1] == 997


def test_spans_depend_on_seed_and_item_alone() -> None:
    data, again, other = corrupted(0), corrupted(0), corrupted(1)
    everything = [data[i]["input_ids"].tolist() for i in range(WINDOWS)]
    assert [again[i]["input_ids"].tolist() for i in reversed(range(WINDOWS))] == everything[::-1]
    assert [other[i]["input_ids"].tolist() for i in range(WINDOWS)] != everything
    places = [{i for i, token in enumerate(row) if token > 900} for row in everything]
    assert len({frozenset(place) for place in places}) > WINDOWS // 2
    second_epoch = data[3 + WINDOWS]
    assert spliced(second_epoch, 3) == spliced(data[3], 3)
    assert second_epoch["input_ids"].tolist() != everything[3]


def test_every_position_is_taken_out() -> None:
    """2,000 corruptions of 40 tokens take each token 300 times on average; at the ends a span has less room."""
    data, hits = corrupted(), torch.zeros(SEQ)
    for epoch in range(100):
        for i in range(WINDOWS):
            labels = data[i + epoch * WINDOWS]["labels"]
            hits[labels[labels < 900] - i * SEQ] += 1
    assert hits.mean() == 300
    assert hits.min() > 80 and hits.max() < 400


def test_padding_has_no_targets_and_the_same_shapes() -> None:
    data = corrupted()
    padding = data[TokenWindows.PADDING]
    assert {k: v.shape for k, v in padding.items()} == {k: v.shape for k, v in data[0].items()}
    assert padding["labels"].tolist() == [IGNORED] * data.counts.label_len
    with pytest.raises(IndexError):
        data[-2]


def test_epochs_are_told_apart_only_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecompile.runtime.data.batches.permutation", lambda n, seed, epoch: list(range(n)))
    sampler = GlobalBatchSampler(
        3, global_batch_size=4, micro_batch_size=4, rank=0, world_size=1, seed=0, num_steps=2, distinct_epochs=True
    )
    assert list(sampler) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_loaders_give_rectangles() -> None:
    """Also the last validation batch, which is filled up; every window is a target once."""
    settings, data = DataConfig(seq_len=SEQ, micro_batch_size=3, global_batch_size=12), corrupted()
    shapes = {"input_ids": (3, 36), "labels": (3, 9)}
    batches = list(train_loader(data, settings, seed=0, rank=1, world_size=2, num_steps=5))
    batches += [batch for rank in range(2) for batch in val_loader(data, settings, rank=rank, world_size=2)]
    assert all({name: tuple(value.shape) for name, value in batch.items()} == shapes for batch in batches)
    targets = [batch["labels"] != IGNORED for batch in batches[10:]]
    assert sum(int(target.sum()) for target in targets) == WINDOWS * 9


# -- the module ------------------------------------------------------------------------------------------------------


def test_the_decoder_reads_what_it_has_written() -> None:
    labels = torch.tensor([[5, 6, 7], [8, IGNORED, IGNORED]])
    assert shifted(labels, 1).tolist() == [[1, 5, 6], [1, 8, 1]]


def test_loss_is_that_of_the_model_itself() -> None:
    """transformers' T5 shifts the labels and averages by itself."""
    model, settings = t5(), OptimizerConfig()
    model.config.decoder_start_token_id = model.config.pad_token_id
    data = SpanCorruption(TokenWindows(torch.arange(300) % 300, SEQ), 332, 0)
    batch = {name: torch.stack([data[i][name] for i in range(4)]) for name in ("input_ids", "labels")}
    batch["labels"][2, 4:] = IGNORED
    batch["labels"][3] = IGNORED
    loss, num_tokens = LanguageModule(model, settings, 1).summed_loss(batch)
    assert num_tokens == 9 + 9 + 4
    assert loss.item() / num_tokens == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_a_decoder_that_cannot_start() -> None:
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(is_encoder_decoder=True, pad_token_id=None)
    with pytest.raises(ConfigError, match=r"model.config.pad_token_id=null: the decoder's input has to start"):
        LanguageModule(model, OptimizerConfig(), 1)
    model.config.decoder_start_token_id = 7
    assert LanguageModule(model, OptimizerConfig(), 1).decoder_start == 7


# -- models and objectives -------------------------------------------------------------------------------------------


def t5(*overrides: str) -> nn.Module:
    made = compose_config(["model=t5_nano", "data.vocab_size=300", "model.config.d_model=32", *overrides])
    return build_model(made.model, made.seed)


def test_t5_nano_has_ids_above_those_of_the_text() -> None:
    made = compose_config(["model=t5_nano"])
    model = build_model(made.model, 0)
    assert model.config.vocab_size == made.data.vocab_size + 32
    assert model.config.pad_token_id == made.data.vocab_size
    assert 2.0e6 < sum(p.numel() for p in model.parameters()) < 2.3e6
    assert set(example_inputs(model, 8)) == {"input_ids", "decoder_input_ids"}
    assert set(example_inputs(tiny_llama(), 8)) == {"input_ids"}
    # The padding id, which starts the decoder's input, is never a sentinel.
    assert SpanCounts(made.data.seq_len).num_sentinels <= 31


def windows(seq_len: int = SEQ, num_entries: int = 300) -> TextData:
    one = TokenWindows(torch.arange(200), seq_len)
    words = {str(number): number for number in range(num_entries)}
    return TextData(tokenizer=Tokenizer(WordLevel(words, unk_token="0")), train=one, val=one)


def test_objective_and_model_fit() -> None:
    spans = config("data.objective=span_corruption", "data.vocab_size=300", f"data.seq_len={SEQ}")
    data = data_for(t5(), windows(), spans)
    assert isinstance(data.train, SpanCorruption) and isinstance(data.val, SpanCorruption)
    assert data.train.vocab_size == 332
    causal, text = config("data.vocab_size=61"), windows(num_entries=61)
    assert data_for(tiny_llama(), text, causal) is text


def test_objectives_that_do_not_fit() -> None:
    spans = config("data.objective=span_corruption", "data.vocab_size=300", "model.name=tiny")
    with pytest.raises(ConfigError) as caught:
        data_for(tiny_llama(vocab_size=332), windows(), spans)
    assert str(caught.value) == (
        "data.objective=span_corruption: the model tiny has no encoder and decoder. "
        "Use data.objective=causal, or model=t5_nano."
    )
    with pytest.raises(ConfigError) as caught:
        data_for(t5(), windows(), config("data.vocab_size=300", "model.name=tiny"))
    assert str(caught.value) == (
        "data.objective=causal: the model tiny has an encoder, which would see the tokens to be predicted. "
        "Use data.objective=span_corruption, or a causal model."
    )


def test_too_few_sentinels() -> None:
    """1,000 tokens: 150 are taken out, in 50 spans."""
    spans = config("data.objective=span_corruption", "data.vocab_size=300", "data.seq_len=1000")
    with pytest.raises(ConfigError) as caught:
        data_for(t5(), windows(1000), spans)
    assert str(caught.value) == (
        "model.config.vocab_size=332: data.seq_len=1000 needs 51 sentinels above the 300 tokens of the text. "
        "Use at least 351, or shorter sequences."
    )


def test_a_folder_of_an_encoder_decoder_model(tmp_path: Path) -> None:
    model = t5()
    model.save_pretrained(tmp_path / "t5")
    loaded = build_model(compose_config(["model.architecture=null", f"model.pretrained={tmp_path}/t5"]).model, 0)
    assert type(loaded) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
