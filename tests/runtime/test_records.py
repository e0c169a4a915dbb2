"""Files and records: what is read, in which order, and what a bad record is told."""

from __future__ import annotations

import builtins
import csv
import gzip
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moecompile.errors import ConfigError
from moecompile.runtime import records as room
from moecompile.runtime.records import (
    PIECE,
    field_pieces,
    find_files,
    is_text,
    reader_code,
    records,
    register_reader,
    text_pieces,
)
from moecompile.schema import DataConfig, DataKind


def corpus(path: Path | str, kind: DataKind = DataKind.corpus) -> DataConfig:
    return DataConfig(kind=kind, path=str(path))


def refused(path: Path | str, kind: DataKind = DataKind.corpus) -> str:
    with pytest.raises(ConfigError) as caught:
        find_files(corpus(path, kind))
    return str(caught.value)


def test_a_folder_is_read_in_the_order_of_its_paths_and_the_rest_is_counted(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.txt", "b/1.parquet", "README.rst", ".hidden/3.txt", ".git"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("PAR1" if name.endswith("parquet") else "{}")
    found = find_files(corpus(tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in found.files] == ["a/1.txt", "b/1.parquet", "b/2.jsonl"]
    assert [path.name for path in found.skipped] == ["README.rst"]
    chats = find_files(corpus(tmp_path, DataKind.sft))
    assert [path.name for path in chats.files] == ["1.parquet", "2.jsonl"] and len(chats.skipped) == 2
    pattern = find_files(corpus(tmp_path / "b" / "*.jsonl"))
    assert [path.name for path in pattern.files] == ["2.jsonl"]


def test_links_to_folders_are_followed_and_no_file_is_read_twice(tmp_path: Path) -> None:
    for name in ("data/2024/a.txt", "elsewhere/b.txt", "elsewhere/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text\n")
    data = tmp_path / "data"
    for link, target in {"more": tmp_path / "elsewhere", "again": tmp_path / "elsewhere"}.items():
        (data / link).symlink_to(target)
    (data / "latest").symlink_to("2024")
    (tmp_path / "elsewhere" / "back").symlink_to(data)
    names = [str(path.relative_to(data)) for path in find_files(corpus(data)).files]
    assert names == ["2024/a.txt", "again/b.txt", "again/deep/c.txt"]
    (data / "up").symlink_to(tmp_path)
    assert (
        refused(data) == f"data.path={data / 'up'}: is a link to {tmp_path}, which this folder is in. Remove the link."
    )


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    assert refused(tmp_path / "none").startswith(
        f"data.path={tmp_path}/none: there is no such file or folder. Give files"
    )
    assert "no file in it can be read" in refused(tmp_path)
    files = {
        "empty.txt": (b"", "is empty"), "a.txt": (gzip.compress(b"x"), "is compressed. Unpack it"),
        "b.txt": (b"a\0b", "is binary"), "c.bin": (b"PAR1", "is a table. Unpack it, or give it the suffix .parquet"),
    }  # fmt: skip
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        assert message in refused(tmp_path / name), name
    (tmp_path / "d.txt").write_text("chat")
    assert "is text, and chats are records with fields. Write them as JSON lines" in refused(
        tmp_path / "d.txt", DataKind.sft
    )
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "dataset_dict.json").write_text("{}")
    assert f"holds several splits. Give one of them, such as {tmp_path}/split/train." in refused(tmp_path / "split")


def test_a_table_without_the_library_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused(tmp_path / "a.parquet") == (
        f"data.path={tmp_path}/a.parquet: tables are read by the library datasets, which is not installed. "
        "Run pip install 'moecompile[data]', or give JSON lines."
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'a': 1}", "line 3: is not JSON: Expecting property name enclosed in double quotes"),
        (b"[1]", "line 3: is a list, not an object with fields. Write one JSON object a line."),
        (b"null", "line 3: is null, not an object"),
        (b'{"a": "\xff"}', "line 3: is not UTF-8 text. Convert the file to UTF-8."),
        (b"[" * 100_000, "line 3: has too many brackets within each other. Write fewer levels."),
    ],
)
def test_a_bad_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n' + line + b"\n")
    read: list[Any] = []
    with pytest.raises(ConfigError) as caught:
        read.extend(record.value for record in records(path))
    assert f"data.path={path} {message}" in str(caught.value)
    first = next(records(path))
    assert (first.where, first.value) == (f"{path} line 1", {"a": 1})


def test_tables_and_saved_datasets_are_read_by_row(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [{"text": f"row {i}", "n": i} for i in range(5)]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        assert find_files(corpus(path)).files == (path,)
        assert [(r.where, r.value) for r in records(path)] == [(f"{path} row {i + 1}", rows[i]) for i in range(5)]
    assert [path.name for path in find_files(corpus(tmp_path)).files] == ["a.parquet", "saved"]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match=r"a\.parquet: cannot be read as a table: .*Copy it again"):
        list(records(tmp_path / "a.parquet"))


def test_tables_in_text_and_lists_in_json_are_read(tmp_path: Path) -> None:
    """As spreadsheets and Python write them; a folder's .json files are its own, and only counted."""
    rows = [
        {"prompt": 'a, "b"\nc', "completion": "1", "messages": [{"role": "user", "content": "\u00e9"}]},
        {"prompt": "", "completion": "2", "messages": None},
    ]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(
                {**row, "messages": json.dumps(row["messages"]) if row["messages"] else ""} for row in rows
            )
        assert [(r.where, r.value) for r in records(tmp_path / name)] == [
            (f"{tmp_path / name} row {i + 1}", row) for i, row in enumerate(rows)
        ]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2), encoding="utf-8-sig")
    (tmp_path / "b.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, where in (("a.json", "record 2"), ("b.json", "line 2")):
        assert find_files(corpus(tmp_path / name, DataKind.sft)).files == (tmp_path / name,)
        read = list(records(tmp_path / name))
        assert [record.value for record in read] == rows and read[1].where == f"{tmp_path / name} {where}"
    for kind in (DataKind.corpus, DataKind.sft):
        found = find_files(corpus(tmp_path, kind))
        assert [path.name for path in found.files] == ["a.csv", "a.tsv"] and len(found.skipped) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b\n1,2\n1,2,3\n", " row 2: has more fields than the first row has names. Write text with commas"),
        ("a.csv", b"a,b\n1\n", " row 1: has fewer fields than the first row has names."),
        ("a.csv", b'a,b\n1,"2\n', " line 2: cannot be read as a table: unexpected end of data. Correct"),
        ("a.csv", b"a,b\n1,\xff\n", ": is not UTF-8 text. Convert the file to UTF-8."),
        ("a.csv", b"messages\nhello\n", " row 1: holds no JSON in the column messages: Expecting value"),
        (
            "a.json",
            b'[{"a": 1}, 2]',
            " record 2: is a number, not an object with fields. Write a list of JSON objects.",
        ),
        ("a.json", b'[{"a": 1}', ": is not JSON: Expecting ',' delimiter"),
        ("a.json", b'["\xff"]', ": is not UTF-8 text."),
        ("a.json", b"[" * 100_000, ": has too many brackets within each other."),
    ],
)
def test_a_bad_row_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        list(records(tmp_path / name))
    assert f"data.path={tmp_path / name}{message}" in str(caught.value)


def test_pieces_of_a_file_are_its_text_and_end_at_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "\ufeff" + "".join(f"Zeile {i} \u00fcber Wale \U0001f40b\n" for i in range(9000)) + "ohne Ende"
    path.write_text(text, encoding="utf-8")
    pieces = list(text_pieces(path))
    assert "".join(piece for piece, _ in pieces) == text[1:]
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True] and len(pieces) > 3
    assert all(piece.endswith("\n") and len(piece.encode()) < PIECE + 60 for piece, _ in pieces[:-1])
    path.write_text("\u00fc" * (2 * PIECE), encoding="utf-8")  # no line at all: cut between characters
    assert "".join(piece for piece, _ in text_pieces(path)) == "\u00fc" * (2 * PIECE)


@pytest.mark.parametrize(
    ("tail", "message"), [(b"a\xff\n", "line 9001: is not UTF-8 text"), (b"\xc3", "line 9001: ends within")]
)
def test_a_line_that_is_not_utf8_is_named(tail: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"A whale of ten tons.\n" * 9000 + tail)
    with pytest.raises(ConfigError, match=message):
        list(text_pieces(path))


@pytest.mark.parametrize("length", [0, 10, PIECE, PIECE + 1, 5 * PIECE])
@pytest.mark.parametrize("line", [30, 10**9])
def test_pieces_of_a_field_are_its_text(length: int, line: int) -> None:
    text = "".join("\n" if i % line == line - 1 else "x" for i in range(length))
    pieces = list(field_pieces(text))
    assert "".join(piece for piece, _ in pieces) == text
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece) <= 2 * PIECE for piece, _ in pieces)


def test_reading_lines_needs_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x"}) + "\n")
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        assert name.split(".", maxsplit=1)[0] not in ("datasets", "pyarrow", "pandas")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert [record.value for record in records(path)] == [{"text": "x"}]
    assert not is_text(path) and room.is_text(tmp_path / "a.txt")


# -- a reader of the caller's ---------------------------------------------------------------------------------------


def _pairs(path: Path) -> Iterator[Any]:
    for line in path.read_bytes().split(b"\0"):
        if line == b"bad":
            raise ValueError("no pair")
        yield {"text": line.decode()} if line else None


def test_a_registered_reader_reads_its_suffix_in_folders_too(tmp_path: Path) -> None:
    for name, content in (("a.pairs", b"one\0two"), ("b.txt", b"text"), ("c.PAIRS", b"one\0bad"), ("d.pairs", b"\0")):
        (tmp_path / name).write_bytes(content)
    assert [path.name for path in find_files(corpus(tmp_path)).files] == ["b.txt"]
    with register_reader(".pairs", _pairs):
        assert [path.name for path in find_files(corpus(tmp_path)).files] == ["a.pairs", "b.txt", "c.PAIRS", "d.pairs"]
        assert [path.name for path in find_files(corpus(tmp_path, DataKind.sft)).files] == [
            "a.pairs",
            "c.PAIRS",
            "d.pairs",
        ]
        assert (
            not is_text(tmp_path / "a.pairs")
            and reader_code(tmp_path / "a.pairs")
            and not reader_code(tmp_path / "b.txt")
        )
        assert [(r.where, r.value) for r in records(tmp_path / "a.pairs")] == [
            (f"{tmp_path}/a.pairs record 1", {"text": "one"}), (f"{tmp_path}/a.pairs record 2", {"text": "two"})
        ]  # fmt: skip
        with pytest.raises(
            ConfigError, match=r"c\.PAIRS: cannot be read after record 1 by its registered reader: ValueError: no"
        ):
            list(records(tmp_path / "c.PAIRS"))
        with pytest.raises(
            ConfigError, match=r"d\.pairs record 1: is null, not an object with fields. Let its reader yield"
        ):
            list(records(tmp_path / "d.pairs"))
        with pytest.raises(ConfigError, match=r"suffix=\.pairs: is read already"):
            register_reader(".pairs", _pairs)
    assert not reader_code(tmp_path / "a.pairs")


@pytest.mark.parametrize(
    ("suffix", "read", "says"),
    [
        (".jsonl", _pairs, "is read already"), ("pairs", _pairs, "must be a dot and letters in lower case"),
        (".pairs", eval("lambda path: []"), "must be a function that stands in a file"),
    ],
)  # fmt: skip
def test_a_reader_that_cannot_be_registered(suffix: str, read: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        register_reader(suffix, read)
