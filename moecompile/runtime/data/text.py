"""Where the text comes from and which part of it is held out."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from moecompile.errors import ConfigError
from moecompile.schema import DataConfig

CORPORA = {"moby_dick": "moby_dick.txt"}
"""Embedded texts and the files beside this one that hold them; NOTICE says where they are from."""


def load_text(data: DataConfig) -> str:
    """The text at `data.path`, or else the embedded `data.corpus`.

    Raises:
        ConfigError: an unknown corpus, or a file that is not UTF-8 text.
    """
    if data.path is not None:
        return _read(Path(data.path))
    if data.corpus not in CORPORA:
        raise ConfigError(
            "data.corpus", data.corpus, f"must be one of {', '.join(CORPORA)}", "Use one of these, or give data.path"
        )
    return (files(__package__) / CORPORA[data.corpus]).read_text(encoding="utf-8")


def split_text(text: str, val_fraction: float) -> tuple[str, str]:
    """(training, validation): the last `val_fraction` of the characters, from the start of a line on, is held out.

    Raises:
        ConfigError: one of the two would be empty.
    """
    cut = text.rfind("\n", 0, round(len(text) * (1 - val_fraction))) + 1
    if not text[:cut] or not text[cut:]:
        raise ConfigError(
            "data.val_fraction", val_fraction, f"leaves no whole line of {len(text)} characters for one of the splits",
            "Give a longer text, or another fraction",
        )  # fmt: skip
    return text[:cut], text[cut:]


def _read(path: Path) -> str:
    fix = "Give a UTF-8 text file, or data.path=null for the embedded corpus"
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError("data.path", path, f"is not UTF-8 text (byte {error.start})", fix) from None
    except OSError as error:
        raise ConfigError("data.path", path, f"cannot be read: {error.strerror}", fix) from None
