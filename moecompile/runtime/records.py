"""Files of a corpus or of chats, and the records in them, one at a time. Needs no torch.

    suffix               read as
    .jsonl, .ndjson      JSON lines: a record a line
    .json                a list of records, read whole, or JSON lines; only if it is named, because folders have others
    .csv, .tsv           a record a row, under the names in the first row; columns of `_LISTS` hold JSON
    .parquet             a table: a record a row, by the library `datasets`, a group of rows at a time
    a saved `datasets`   a folder that `save_to_disk` wrote, memory-mapped
    .txt, .text, .md     plain UTF-8 text, in pieces; in a corpus alone. A file that is named may have any suffix.
    `register_reader`    others, by a function of the caller's

Every error names the file, the line or row, and what is wrong there.
"""

from __future__ import annotations

import codecs
import csv
import glob
import hashlib
import importlib.util
import inspect
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecompile.errors import ConfigError
from moecompile.schema import DataConfig, DataKind

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

PIECE = 2**16
"""Length of a piece of a document: bytes of a file, characters of a field. A piece ends at the end of a line."""

_LINES, _TABLES, _TEXTS = (".jsonl", ".ndjson"), (".parquet",), (".txt", ".text", ".md")
_SHEETS, _DOCUMENTS = {".csv": ",", ".tsv": "\t"}, (".json",)
_LISTS = ("messages", "conversations", "history", "tools")
_SAVED, _SPLITS = "dataset_info.json", "dataset_dict.json"  # what `save_to_disk` writes: one dataset, several splits
_HEADS = {
    b"\x1f\x8b": "compressed", b"BZh": "compressed", b"\xfd7zXZ": "compressed", b"\x28\xb5\x2f\xfd": "compressed",
    b"PK\x03\x04": "compressed", b"PAR1": "a table", b"ARROW1": "a table",
}  # fmt: skip
_GIVE = (
    "Give files that end in .jsonl, .csv, .parquet or .txt, a folder of them, or a folder that datasets' save_to_disk "
    "wrote"
)


@dataclass(frozen=True)
class Record:
    """One record. where: its file, and its line or row. value: what the line or row holds, unchecked."""

    where: str
    value: Any


@dataclass(frozen=True)
class _Reader:
    """What reads files of the caller's. code: hash of the file that the function stands in."""

    read: Callable[[Path], Iterable[Mapping[str, Any]]]
    code: str


_readers: OrderedDict[str, _Reader] = OrderedDict()  # suffix -> what reads it, beside the kinds above


def register_reader(suffix: str, read: Callable[[Path], Iterable[Mapping[str, Any]]]) -> RemovableHandle:
    """Makes files with a suffix of `data.path` known to `data=corpus` and `data=sft` in this process.

    What was tokenized is kept in the cache until the file that `read` stands in changes; what it calls elsewhere is not
    seen.

    Args:
        suffix: `.xml`, in lower case. read: path -> records in order, one at a time: mappings with the fields that
            records of JSON lines have.

    Returns:
        A handle, as from `register_pattern`.

    Raises:
        ConfigError: the suffix is read already, or the function has no file.
    """
    from torch.utils.hooks import RemovableHandle

    if suffix in (*_readers, *_LINES, *_TABLES, *_TEXTS, *_SHEETS, *_DOCUMENTS):
        raise ConfigError("suffix", suffix, "is read already", "Give another suffix")
    if not re.fullmatch(r"\.[a-z0-9_-]+", suffix):
        raise ConfigError("suffix", suffix, "must be a dot and letters in lower case", "Give one such as .xml")
    try:
        code = Path(inspect.getfile(inspect.unwrap(read))).read_bytes()
    except (TypeError, OSError):
        rule = "must be a function that stands in a file: what was read is kept until the file changes"
        raise ConfigError("read", read, rule, "Write it into a .py file, and name that in plugins") from None
    _readers[suffix] = _Reader(read, hashlib.blake2b(code, digest_size=16).hexdigest())
    handle = RemovableHandle(_readers)
    handle.id = suffix  # type: ignore[assignment]  # the table is by suffix
    return handle


def reader_code(path: Path) -> str:
    """What a cache must depend on beside the file's content: the code of a registered reader, else nothing."""
    reader = None if path.is_dir() else _readers.get(path.suffix.lower())
    return "" if reader is None else reader.code


def _registered(path: Path, read: Callable[[Path], Iterable[Mapping[str, Any]]]) -> Iterator[Record]:
    number = 0
    try:
        for number, value in enumerate(read(path), start=1):
            where = f"{path} record {number}"
            if not isinstance(value, Mapping):
                raise bad(where, f"is {_kind(value)}, not an object with fields", "Let its reader yield mappings")
            yield Record(where, dict(value))
    except ConfigError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200].removesuffix(".")
        rule = f"cannot be read after record {number} by its registered reader: {reason}"
        raise bad(str(path), rule, "Correct the reader, or the file") from error


@dataclass(frozen=True)
class Found:
    """The files that are read, in order, and those of the folder that are not, because of their suffix."""

    files: tuple[Path, ...]
    skipped: tuple[Path, ...] = ()


def find_files(data: DataConfig) -> Found:
    """The files at `data.path`, sorted by path. Hidden files are no part of a folder; what links to folders lead to is.

    Raises:
        ConfigError: there is none, or one is of a kind that is not read.
    """
    path = Path(str(data.path))
    if path.is_dir() and not _is_saved(path):
        inside = sorted(_inside(path))
        saved = [folder for folder in inside if folder.is_dir() and _is_saved(folder)]
        files = [file for file in inside if file.is_file() and not set(saved) & set(file.parents)]
        found = Found(
            tuple(sorted([*saved, *(file for file in files if _is_read(file, data.kind))])),
            tuple(file for file in files if not _is_read(file, data.kind)),
        )
    elif path.exists():
        found = Found((path,))
    else:
        found = Found(tuple(Path(name) for name in sorted(glob.glob(str(path), recursive=True))))
    if not found.files:
        rule = "no file in it can be read" if path.is_dir() else "there is no such file or folder"
        raise ConfigError("data.path", path, rule, _GIVE)
    for file in found.files:
        _check_file(file, data.kind)
    return found


def records(path: Path) -> Iterator[Record]:
    """The records of JSON, a table or a saved dataset, in order.

    Raises:
        ConfigError: a line is no JSON object, or the file cannot be read.
    """
    if _is_table(path):
        return _rows(path)
    suffix = path.suffix.lower()
    if suffix in _readers:
        return _registered(path, _readers[suffix].read)
    if suffix in _SHEETS:
        return _sheet(path, _SHEETS[suffix])
    return _document(path) if suffix in _DOCUMENTS else _json_lines(path)


def is_text(path: Path) -> bool:
    """Whether a file is read as plain text."""
    return not path.is_dir() and path.suffix.lower() not in (*_LINES, *_TABLES, *_SHEETS, *_DOCUMENTS, *_readers)


def text_pieces(path: Path) -> Iterator[tuple[str, bool]]:
    """(piece, whether it is the last one) of a text file, of which one piece at a time is in memory.

    Raises:
        ConfigError: a line is not UTF-8.
    """
    line, decoder, waiting = 1, codecs.getincrementaldecoder("utf-8")(), ""
    with _opened(path) as file:
        while chunk := file.read(PIECE) + file.readline(PIECE):
            try:
                piece = decoder.decode(chunk)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise bad(f"{path} line {line}", "is not UTF-8 text", "Convert the file to UTF-8") from None
            piece = piece.removeprefix("\ufeff") if line == 1 else piece
            line += chunk.count(b"\n")
            if waiting:
                yield waiting, False
            waiting = piece
    if decoder.getstate()[0]:
        raise bad(f"{path} line {line}", "ends within a character", "Copy the file again")
    yield waiting, True


def field_pieces(text: str) -> Iterator[tuple[str, bool]]:
    """(piece, whether it is the last one) of a text in memory, cut after lines."""
    start = 0
    while len(text) - start > PIECE:
        cut = text.find("\n", start + PIECE, start + 2 * PIECE) + 1 or min(start + 2 * PIECE, len(text))
        if cut == len(text):
            break
        yield text[start:cut], False
        start = cut
    yield text[start:], True


def check_characters(record: Record, value: Any) -> None:
    """Checks that the strings in a part of a record are whole characters, which JSON's escapes need not be.

    Raises:
        ConfigError: half of a character (a surrogate) is alone, which no tokenizer reads.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        rule = f"holds {half}, half of a character without the other half"
        raise bad(record.where, rule, "Write both halves, or leave it out") from None
    except RecursionError:
        raise _too_deep(record.where) from None


def bad(where: str, rule: str, fix: str) -> ConfigError:
    """The error for one record. What it quotes of the record may have halves of characters, which no file takes."""
    return ConfigError("data.path", where, rule.encode("utf-8", "backslashreplace").decode(), fix)


def _too_deep(where: str) -> ConfigError:
    return bad(where, "has too many brackets within each other", "Write fewer levels")


def _json_lines(path: Path) -> Iterator[Record]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path} line {number}"
            if not line.strip():
                continue
            try:
                value = json.loads(line.removeprefix(codecs.BOM_UTF8))
            except UnicodeDecodeError:
                raise bad(where, "is not UTF-8 text", "Convert the file to UTF-8") from None
            except ValueError as error:
                rule = f"is not JSON: {str(error).removesuffix('.')}"
                raise bad(where, rule, "Write one JSON object a line, and escape line ends in it as \\n") from None
            except RecursionError:
                raise _too_deep(where) from None
            if not isinstance(value, dict):
                raise bad(where, f"is {_kind(value)}, not an object with fields", "Write one JSON object a line")
            yield Record(where, value)


def _document(path: Path) -> Iterator[Record]:
    """The records of a list in JSON, from 1; or JSON lines."""
    with _opened(path) as file:
        content = file.read().removeprefix(codecs.BOM_UTF8)
    if not content.lstrip().startswith(b"["):
        yield from _json_lines(path)
        return
    try:
        values = json.loads(content)
    except UnicodeDecodeError:
        raise bad(str(path), "is not UTF-8 text", "Convert the file to UTF-8") from None
    except ValueError as error:
        raise bad(str(path), f"is not JSON: {str(error).removesuffix('.')}", "Correct it there") from None
    except RecursionError:
        raise _too_deep(str(path)) from None
    for number, value in enumerate(values, start=1):
        where = f"{path} record {number}"
        if not isinstance(value, dict):
            raise bad(where, f"is {_kind(value)}, not an object with fields", "Write a list of JSON objects")
        yield Record(where, value)


def _sheet(path: Path, delimiter: str) -> Iterator[Record]:
    """The rows of a table in text, from 1, without the row of names. Fields may have line ends within quotes."""
    csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows: Any = csv.DictReader(file, delimiter=delimiter, strict=True)
            for number, row in enumerate(rows, start=1):
                where = f"{path} row {number}"
                if None in row or None in row.values():
                    rule = f"has {'more' if None in row else 'fewer'} fields than the first row has names"
                    raise bad(where, rule, "Write text with commas, quotes or line ends within quotes")
                yield Record(where, {name: _cell(name, text, where) for name, text in row.items()})
    except UnicodeDecodeError:
        raise bad(str(path), "is not UTF-8 text", "Convert the file to UTF-8") from None
    except csv.Error as error:
        raise bad(
            f"{path} line {rows.reader.line_num}", f"cannot be read as a table: {error}", "Correct it there"
        ) from None
    except OSError as error:
        raise ConfigError("data.path", path, f"cannot be read: {error.strerror}", "Change that") from None


def _cell(name: str, text: str, where: str) -> Any:
    if name not in _LISTS:
        return text
    try:
        return json.loads(text) if text.strip() else None
    except ValueError as error:
        rule = f"holds no JSON in the column {name}: {str(error).removesuffix('.')}"
        raise bad(where, rule, f"Write {name} as JSON, or use another name") from None
    except RecursionError:
        raise _too_deep(where) from None


def _rows(path: Path) -> Iterator[Record]:
    """The rows of a table, from 1."""
    from datasets import IterableDataset, load_from_disk

    try:
        rows = load_from_disk(str(path)) if path.is_dir() else IterableDataset.from_parquet(str(path))
        for number, row in enumerate(rows, start=1):
            yield Record(f"{path} row {number}", row)
    except ConfigError:
        raise
    except Exception as error:  # pyarrow and datasets raise many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise bad(str(path), f"cannot be read as a table: {reason}", "Copy it again") from error


def _check_file(path: Path, kind: DataKind) -> None:
    if path.is_dir() and not _is_saved(path):
        raise ConfigError("data.path", path, "is a folder within the pattern", "Give a pattern of files")
    if (path / _SPLITS).is_file():
        raise ConfigError("data.path", path, "holds several splits", f"Give one of them, such as {path / 'train'}")
    if _is_table(path) and importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            "data.path", path, "tables are read by the library datasets, which is not installed",
            "Run pip install 'moecompile[data]', or give JSON lines",
        )  # fmt: skip
    if path.is_dir():
        return
    with _opened(path) as file:
        head = file.read(2**12)
    if not head:
        raise ConfigError("data.path", path, "is empty", "Remove it, or give another file")
    if path.suffix.lower() in _readers:
        return
    what = next((what for magic, what in _HEADS.items() if head.startswith(magic)), "binary" if b"\0" in head else None)
    if what is not None and not (what == "a table" and _is_table(path)):
        raise ConfigError(
            "data.path", path, f"is {what}", "Unpack it, or give it the suffix .parquet" if what != "binary" else _GIVE
        )
    if kind is DataKind.sft and is_text(path):
        raise ConfigError(
            "data.path", path, "is text, and chats are records with fields", "Write them as JSON lines, .jsonl"
        )


def _is_read(path: Path, kind: DataKind) -> bool:
    suffixes = (*_LINES, *_TABLES, *_SHEETS, *_readers) + (_TEXTS if kind is DataKind.corpus else ())
    return path.suffix.lower() in suffixes


def _is_table(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in _TABLES


def _is_saved(folder: Path) -> bool:
    return (folder / _SAVED).is_file() or (folder / _SPLITS).is_file()


def _inside(folder: Path) -> Iterator[Path]:
    """What is in a folder and its folders, and in those that links lead to, once each: `latest` may be one of them."""
    links, seen = [folder], set[Path]()
    while links:
        found = [path for path in links.pop(0).rglob("*") if not _is_hidden(path.relative_to(folder))]
        yield from found
        seen |= {folder.resolve(), *(path.resolve() for path in found if path.is_dir() and not path.is_symlink())}
        for link in sorted(path for path in found if path.is_symlink() and path.is_dir()):
            if (real := link.resolve()) in seen:
                continue
            if real in folder.resolve().parents:
                raise ConfigError("data.path", link, f"is a link to {real}, which this folder is in", "Remove the link")
            seen.add(real)
            links.append(link)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError("data.path", path, f"cannot be read: {error.strerror}", "Change that") from None


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null")
