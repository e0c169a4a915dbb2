"""Span corruption, T5's objective (Raffel et al. 2020, arXiv 1910.10683, section 3.1.4).

Some spans of a window are removed and each is replaced by a sentinel; the decoder predicts the removed tokens:

    window    a b c d e f g h i j
    inputs    a b <0> e f <1> j          for the encoder
    labels    <0> c d <1> g h i <2>      for the decoder; the sentinel after the last span ends them

Sentinel i is id V - 1 - i of a model with V embeddings. The numbers of removed tokens and spans depend only on the
window's length, so inputs of all windows have the same length, and so do labels; positions of spans are random.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moecompile.runtime.data.batches import IGNORED, TokenWindows
from moecompile.runtime.data.corpus import CorpusWindows

NOISE_DENSITY, MEAN_SPAN = 0.15, 3.0
"""Fraction of the tokens that is removed, and mean length of a span, as in T5."""


@dataclass(frozen=True)
class SpanCounts:
    """The numbers of tokens and spans to remove from a window of `seq_len` >= 2 tokens."""

    seq_len: int

    @property
    def num_noise(self) -> int:
        """Removed tokens."""
        return min(max(round(self.seq_len * NOISE_DENSITY), 1), self.seq_len - 1)

    @property
    def num_spans(self) -> int:
        """Removed spans."""
        return max(round(self.num_noise / MEAN_SPAN), 1)

    @property
    def num_sentinels(self) -> int:
        """One per span, and one that ends the labels."""
        return self.num_spans + 1

    @property
    def input_len(self) -> int:
        """Encoder tokens."""
        return self.seq_len - self.num_noise + self.num_spans

    @property
    def label_len(self) -> int:
        """Decoder tokens."""
        return self.num_noise + self.num_sentinels


class SpanCorruption(Dataset[dict[str, Tensor]]):
    """Corrupted windows: {"input_ids": (input_len,), "labels": (label_len,)}, int64.

    Item `window + epoch * number of windows` depends only on (seed, item); each epoch removes other spans. Item
    `TokenWindows.PADDING` has no targets.

    Args:
        windows: the text. vocab_size: of the model, V. seed: of the spans.
    """

    def __init__(self, windows: TokenWindows | CorpusWindows, vocab_size: int, seed: int) -> None:
        self.windows, self.vocab_size, self.seed = windows, vocab_size, seed
        self.counts = SpanCounts(windows.seq_len)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == TokenWindows.PADDING:
            return {
                "input_ids": torch.zeros(self.counts.input_len, dtype=torch.int64),
                "labels": torch.full((self.counts.label_len,), IGNORED, dtype=torch.int64),
            }
        if index < 0 or not len(self):
            raise IndexError(f"item {index} of {len(self)} windows")
        window = self.windows[index % len(self)]["input_ids"]
        random, num_spans = np.random.default_rng((self.seed % 2**63, index)), self.counts.num_spans
        noise = _random_parts(random, self.counts.num_noise, num_spans)
        # Two spans never touch, but a span may begin or end the window: two tokens too many, then one off at each end.
        kept = _random_parts(random, self.counts.seq_len - self.counts.num_noise + 2, num_spans + 1)
        kept[0], kept[-1] = kept[0] - 1, kept[-1] - 1
        lengths = [length for pair in zip(noise, kept[1:], strict=True) for length in pair]
        first, *pieces = window.split([kept[0], *lengths])
        sentinels = (self.vocab_size - 1 - torch.arange(num_spans + 1)).split(1)
        inputs, labels = [first], []
        for sentinel, span, after in zip(sentinels[:-1], pieces[::2], pieces[1::2], strict=True):
            inputs += [sentinel, after]
            labels += [sentinel, span]
        return {"input_ids": torch.cat(inputs), "labels": torch.cat([*labels, sentinels[-1]])}


def _random_parts(random: np.random.Generator, total: int, num_parts: int) -> list[int]:
    """`total` as a sum of `num_parts` positive numbers, every such sum equally likely."""
    cuts = np.sort(random.choice(total - 1, num_parts - 1, replace=False)) + 1
    parts: list[int] = np.diff(cuts, prepend=0, append=total).tolist()
    return parts
