"""A corpus: its windows are its text, in an order of seeds and not of ranks; memory does not grow with it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from moecompile.errors import ConfigError
from moecompile.runtime.data import CorpusWindows, SpanCorruption, TextData, load_data, train_loader
from moecompile.runtime.data.corpus import num_held_out
from moecompile.runtime.data.tokens import END_OF_TEXT, num_ids, train_tokenizer
from moecompile.runtime.text import load_text
from moecompile.schema import DataConfig, DataKind, TokenizerSource
from tests.chat_models import save_mixtral, write_lines

PROSE = "".join(f"Line {i}: the whale {i * i} swam on, and the sea was calm.\n" for i in range(2000))


def settings(path: Path, cache: Path, **changes: Any) -> DataConfig:
    values = {"vocab_size": 300, "seq_len": 32, "global_batch_size": 8, "micro_batch_size": 2, "val_fraction": 0.2}
    return DataConfig(kind=DataKind.corpus, path=str(path), cache=str(cache), **{**values, **changes})


def load(data: DataConfig, run_dir: Path, seed: int = 0, folder: Path | None = None) -> TextData:
    return load_data(data, run_dir, rank=0, barrier=lambda: None, seed=seed, model_folder=folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of several pieces, lines and a table's worth of short documents."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text(PROSE, encoding="utf-8")
    write_lines(
        folder / "b.jsonl", [{"text": f"Document {i} of a whale.", "id": i} for i in range(40)] + [{"text": ""}]
    )
    (folder / "notes.rst").write_text("not read")
    return folder


def stream(windows: CorpusWindows) -> list[int]:
    """All tokens that the windows show, in order; their labels are the same tokens one place earlier."""
    items = [windows[i] for i in range(len(windows))]
    for item, following in itertools.pairwise(items):
        assert item["labels"][-1] == following["input_ids"][0]
        assert torch.equal(item["input_ids"][1:], item["labels"][:-1])
    return [token for item in items for token in item["input_ids"].tolist()] + [int(items[-1]["labels"][-1])]


def test_the_windows_are_the_whole_text_shuffled_by_the_seed(files: Path, tmp_path: Path) -> None:
    """Decoded and put together again by hand, against the files themselves."""
    expected = sorted([f"Document {i} of a whale." for i in range(40)])
    orders, held_out = [], []
    for seed in (0, 1):
        data = load(settings(files, tmp_path), tmp_path, seed)
        assert isinstance(data.train, CorpusWindows) and isinstance(data.val, CorpusWindows)
        parts = [stream(split) for split in (data.train, data.val)]
        lost = sum(split.num_tokens - len(tokens) for split, tokens in zip((data.train, data.val), parts, strict=True))
        assert 0 <= lost < 2 * 32  # the rest of a window
        text = data.tokenizer.decode(parts[0] + parts[1], skip_special_tokens=False)
        documents = text.split(END_OF_TEXT)
        short = sorted(document.split("\n")[-1] for document in documents if "of a whale." in document)
        assert len(set(short) & set(expected)) >= 34
        lines = {line for line in text.replace(END_OF_TEXT, "\n").split("\n") if line.startswith("Line ")}
        assert len(lines & set(PROSE.split("\n"))) >= 1990
        orders.append(parts[0])
        held_out.append(parts[1])
    assert orders[0] != orders[1] and held_out[0] == held_out[1]
    assert data.counts is not None
    assert (data.counts.files, data.counts.skipped) == (2, 1)
    assert data.counts.documents == 41  # one text, and the records that are not empty
    assert (tmp_path / "tokenizer.json").is_file()


def test_it_is_tokenized_once_and_the_cache_follows_the_content(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(settings(files, tmp_path), tmp_path)
    copied = tmp_path / "copy"
    copied.mkdir()
    for name in ("a.txt", "b.jsonl"):
        (copied / name).write_bytes((files / name).read_bytes())
    with monkeypatch.context() as patched:
        patched.setattr("moecompile.runtime.data.corpus._tokenize", lambda *args: pytest.fail("tokenized again"))
        again = load(settings(copied, tmp_path, seq_len=16), tmp_path, seed=3)
        assert again.text_hash == first.text_hash
        with pytest.raises(pytest.fail.Exception, match="tokenized again"):
            load(settings(copied, tmp_path, vocab_size=301), tmp_path)
    (copied / "b.jsonl").write_text('{"text": "another document of a whale"}\n' * 60)
    assert load(settings(copied, tmp_path), tmp_path).text_hash != first.text_hash


def test_a_tokenizer_of_lines_that_were_read_as_text_is_not_that_of_their_records(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": line, "source": "whales"} for line in PROSE.splitlines()])
    (tmp_path / "a.jsonl").rename(tmp_path / "a.txt")
    as_text = load(settings(tmp_path / "a.txt", tmp_path / "cache"), tmp_path).tokenizer
    (tmp_path / "a.txt").rename(tmp_path / "a.jsonl")
    again, fresh = (load(settings(tmp_path / "a.jsonl", tmp_path / name), tmp_path) for name in ("cache", "fresh"))
    assert again.tokenizer.to_str() == fresh.tokenizer.to_str() != as_text.to_str()


def test_the_order_does_not_depend_on_ranks(files: Path, tmp_path: Path) -> None:
    data = settings(files, tmp_path)
    train = load(data, tmp_path).train
    one = [batch["input_ids"] for batch in train_loader(train, data, seed=0, rank=0, world_size=1, num_steps=3)]
    for start in (0, 2):
        ranks = [
            [batch["input_ids"] for batch in train_loader(train, data, seed=0, rank=r, world_size=2, start_step=start, num_steps=3 - start)]
            for r in range(2)
        ]  # fmt: skip
        both = [batch for step in range(3 - start) for rank in ranks for batch in rank[2 * step : 2 * step + 2]]
        assert all(torch.equal(a, b) for a, b in zip(both, one[4 * start :], strict=True))


def test_the_models_own_tokens_and_end_of_text(files: Path, tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path / "model", None)
    data = settings(files, tmp_path, tokenizer=TokenizerSource.model, vocab_size=None)
    loaded = load(data, tmp_path, folder=folder)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert loaded.tokenizer.to_str() == own.to_str()
    assert isinstance(loaded.train, CorpusWindows)
    assert stream(loaded.train).count(own.token_to_id("<|endoftext|>")) > 20
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": {"content": "</s>"}}))
    assert stream(load(data, tmp_path, folder=folder).train).count(own.token_to_id("</s>")) > 20
    (folder / "tokenizer_config.json").unlink()
    model = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**model, "eos_token_id": [7, 8]}))
    assert stream(load(data, tmp_path, folder=folder).train).count(7) > 20
    (folder / "config.json").write_text(json.dumps({**model, "eos_token_id": None}))
    with pytest.raises(
        ConfigError, match=r"^data.tokenizer=model: the tokenizer in .* names no end of text, which parts"
    ):
        load(data, tmp_path, folder=folder)


def test_ids_with_gaps_are_kept(files: Path, tmp_path: Path) -> None:
    """A tokenizer of 259 entries whose last id is 70071: two bytes hold the number of entries, but not the id."""
    body = json.loads(train_tokenizer(PROSE, 257, special=["<|endoftext|>"]).to_str())
    vocab = body["model"]["vocab"]
    del vocab["w"]
    body["model"]["vocab"] = {**vocab, "w": 70_071}
    folder = save_mixtral(tmp_path / "gaps", None)
    (folder / "tokenizer.json").write_text(json.dumps(body))
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert own.get_vocab_size() < 300 and num_ids(own) == 70_072
    data = settings(files, tmp_path / "cache", tokenizer=TokenizerSource.model, vocab_size=None)
    loaded = load(data, tmp_path, folder=folder)
    assert isinstance(loaded.val, CorpusWindows)
    shown = stream(loaded.val)
    assert 70_071 in shown and 70_071 % 2**16 not in shown
    assert "whale" in own.decode(shown[: own.get_vocab_size()])


def test_spans_of_a_corpus_are_masked_too(files: Path, tmp_path: Path) -> None:
    data = load(settings(files, tmp_path), tmp_path)
    spans = SpanCorruption(data.train, 400, 0)
    assert len(spans) == len(data.train) and spans[3]["labels"][0] == 399


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"body": "x"},
            "line 2: has no text in the field 'text' (fields: body). Give data.text_field=FIELD, or correct",
        ),
        ({"text": None}, "line 2: has no text in the field 'text' (fields: text)."),
        ({"text": 3}, "line 2: has no string in the field 'text' (fields: text)."),
        ({"a\ud800": 3}, r"line 2: has no text in the field 'text' (fields: a\ud800)."),
        (
            {"text": "a\ud800"},
            r"line 2: holds \ud800, half of a character without the other half. Write both halves, or",
        ),
    ],
)
def test_a_bad_record_is_named(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": PROSE}, record])
    with pytest.raises(ConfigError) as caught:
        load(settings(path, tmp_path), tmp_path)
    assert str(caught.value).startswith(f"data.path={path} {message}")


def test_too_little_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(PROSE[:9000])
    with pytest.raises(
        ConfigError,
        match=r"^data.val_fraction=0.2: there is one piece of text \(a record, or 64 KiB of a file\), and one is",
    ):
        load(settings(path, tmp_path, vocab_size=280), tmp_path)
    lines = write_lines(tmp_path / "b.jsonl", [{"text": PROSE}, {"text": "short"}, {"text": PROSE}])
    with pytest.raises(ConfigError, match=r"^data.seq_len=900000: a split has \d+ tokens, too few for one sequence"):
        load(settings(lines, tmp_path, seq_len=900_000), tmp_path)
    assert [num_held_out(total, 0.05, "") for total in (2, 10, 100)] == [1, 1, 5]
    assert num_held_out(3, 0.99, "") == 2


MEASURE = """
import sys
from pathlib import Path
from moecompile.runtime.data import cache, corpus
from moecompile.runtime.records import find_files
from moecompile.schema import DataConfig, DataKind
from tests.chat_models import tokenizer

def show(self, amount):
    lines = Path("/proc/self/status").read_text().splitlines()
    print(amount, next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024)

cache.Progress.show = show
data = DataConfig(kind=DataKind.corpus, path=sys.argv[1])
corpus._tokenize(find_files(data), data, tokenizer(None).backend_tokenizer, 0, Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """Peak RSS of tokenizing 12 MB: what the first 3 MB took, though tokens and text of the rest are 12 MB and more."""
    text, path = load_text(DataConfig()), tmp_path / "a.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(4000):
            start = 997 * i % (len(text) - 6000)
            file.write(json.dumps({"text": text[start : start + 200 + 31 * i % 5600]}) + "\n")
    (tmp_path / "store").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "store")], capture_output=True, text=True, check=True,
        timeout=400, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    points = [tuple(map(float, line.split())) for line in run.stdout.splitlines()]
    early = next(peak for amount, peak in points if amount > 3)
    assert points[-1][0] > 10 and points[-1][1] - early < 6, points
