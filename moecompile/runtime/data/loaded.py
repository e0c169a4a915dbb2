"""The data of a run: both splits, their tokenizer, and what is in them."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer

from moecompile.runtime.data.batches import TokenWindows
from moecompile.runtime.data.chats import ChatCounts, ChatRows
from moecompile.runtime.data.corpus import CorpusCounts, CorpusWindows
from moecompile.runtime.data.spans import SpanCorruption

Split = TokenWindows | CorpusWindows | SpanCorruption | ChatRows
"""Training or validation data: items by index, and item `TokenWindows.PADDING`, which has no targets."""


@dataclass(frozen=True)
class TextData:
    """Tokenized data, split into windows or rows, as `load_data` returns them or for another objective.

    text_hash: of all the data, for the fingerprint in checkpoints. counts: what is in a corpus or in chats.
    """

    tokenizer: Tokenizer
    train: Split
    val: Split
    text_hash: str = ""
    counts: CorpusCounts | ChatCounts | None = None


def mean_length(split: Split, seq_len: int) -> float:
    """Tokens of a row without padding; all windows have `seq_len`."""
    return float(split.lengths.mean()) if isinstance(split, ChatRows) else float(seq_len)
