"""Loads, splits and checks the text. Needs no torch."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path

from moecompile.errors import ConfigError
from moecompile.schema import DataConfig

CORPORA = {"moby_dick": "moby_dick.txt"}
"""Embedded texts -> their files in runtime/data; NOTICE there has their sources."""

_HEAD, _READ = 2**16, 2**26  # bytes that are checked for their format, and that are decoded, before ranks start
_JSON_LINES = ("JSON lines", "jq -r .text {name} > text.txt")
_TABLE = ("a table", "Write its column of text to a file of its own, a document a line")
_SUFFIXES = {
    ".jsonl": _JSON_LINES,
    ".ndjson": _JSON_LINES,
    ".json": ("JSON", "jq -r '.[].text' {name} > text.txt"),
    ".parquet": _TABLE,
    ".arrow": _TABLE,
    ".csv": _TABLE,
    ".tsv": _TABLE,
    ".gz": ("compressed", "zcat {name} > text.txt"),
    ".bz2": ("compressed", "bzcat {name} > text.txt"),
    ".xz": ("compressed", "xzcat {name} > text.txt"),
    ".zst": ("compressed", "zstdcat {name} > text.txt"),
    ".zip": ("compressed", "unzip -p {name} > text.txt"),
}
"""Suffix of a file -> (its format, how to convert it to text)."""
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst", b"PK\x03\x04": ".zip",
          b"PAR1": ".parquet", b"ARROW1": ".arrow"}  # fmt: skip


def load_text(data: DataConfig) -> str:
    """The text at `data.path`, or else the embedded `data.corpus`.

    Raises:
        ConfigError: the corpus is unknown, or the file is not plain UTF-8 text.
    """
    check_kind(data)
    path = _path(data)
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise _unreadable(path, error) from None


def split_text(text: str, val_fraction: float) -> tuple[str, str]:
    """(training, validation): the last `val_fraction` of the characters, from the start of a line on, is held out.

    Raises:
        ConfigError: one of the two would be empty.
    """
    cut = text.rfind("\n", 0, round(len(text) * (1 - val_fraction))) + 1
    if (inside := text.strip("\n")) and "\n" not in inside:
        raise ConfigError(
            "data.val_fraction", val_fraction, f"cuts after a line, and the text is one of {len(text)} characters",
            "Break it into lines, or use data=corpus for texts of their own",
        )  # fmt: skip
    if not text[:cut] or not text[cut:]:
        raise ConfigError(
            "data.val_fraction", val_fraction, f"leaves no whole line of {len(text)} characters for one of the splits",
            "Give a longer text, or another fraction",
        )  # fmt: skip
    return text[:cut], text[cut:]


def check_text(data: DataConfig) -> tuple[int, int]:
    """Checks that the text exists, is plain text, and has enough bytes.

    Returns:
        bytes of the text, and of its shorter split.

    Raises:
        ConfigError: one of these does not hold.
    """
    check_kind(data)
    path = _path(data)
    size = path.stat().st_size
    shorter = round(min(data.val_fraction, 1 - data.val_fraction) * size)  # a token is a byte or more
    if shorter < data.seq_len + 1:
        raise ConfigError(
            "data.seq_len", data.seq_len,
            f"a split of the text has {shorter} bytes, too few for one sequence",
            "Use shorter sequences, a longer text, or another data.val_fraction",
        )  # fmt: skip
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            decoder.decode(file.read(_READ))
    except (UnicodeDecodeError, OSError) as error:
        raise _unreadable(path, error) from None
    return size, shorter


def check_kind(data: DataConfig) -> None:
    """Checks that the file is plain text; a model would learn the syntax of JSON or CSV, or compressed bytes.

    Raises:
        ConfigError: it has another format.
    """
    path = _path(data)
    if not path.is_file():
        if path.is_dir():
            raise ConfigError("data.path", path, "is a folder, and one text file is read", "Add data=corpus")
        rule = "is not a file" if path.exists() else "there is no such file"
        raise ConfigError("data.path", path, f"{rule}, and one text file is read", "Give a UTF-8 text file")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise _unreadable(path, error) from None
    if not head:
        raise ConfigError("data.path", path, "is empty", "Give a UTF-8 text file")
    suffix = next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), path.suffix.lower())
    kind = _SUFFIXES.get(suffix) or _json(head)
    if kind is not None:
        what, how = kind
        raise ConfigError(
            "data.path", path, f"is {what}, and plain text is read", f"Make text of it: {how.format(name=path)}"
        )
    if b"\0" in head:
        raise ConfigError("data.path", path, "is binary, and plain UTF-8 text is read", "Give a UTF-8 text file")


def _path(data: DataConfig) -> Path:
    if data.path is not None:
        return Path(data.path)
    if data.corpus not in CORPORA:
        raise ConfigError(
            "data.corpus", data.corpus, f"must be one of {', '.join(CORPORA)}", "Use one of these, or give data.path"
        )
    return Path(__file__).with_name("data") / CORPORA[data.corpus]


def _json(head: bytes) -> tuple[str, str] | None:
    """Detects JSON lines or a JSON document from the first lines, for any file name."""
    lines = [line for line in head.split(b"\n")[:-1] if line.strip()][:5]
    try:
        if lines and all(isinstance(json.loads(line), dict) for line in lines):
            return _JSON_LINES
    except (ValueError, RecursionError):
        pass
    return _SUFFIXES[".json"] if re.match(rb'\s*(\[\s*)?\{\s*"', head) else None


def _unreadable(path: Path, error: UnicodeDecodeError | OSError) -> ConfigError:
    fix = "Give a UTF-8 text file, or data.path=null for the embedded corpus"
    if isinstance(error, UnicodeDecodeError):
        return ConfigError("data.path", path, f"is not UTF-8 text (byte {error.start})", fix)
    return ConfigError("data.path", path, f"cannot be read: {error.strerror}", fix)
