"""Tokenizers: a byte-level BPE trained on the text or the model's own, and the entropy of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from moecompile.atomic import replacing
from moecompile.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
"""The token after each document, in a tokenizer that is trained on a corpus."""


def train_tokenizer(text: str | Iterable[str], vocab_size: int, *, special: Sequence[str] = ()) -> Tokenizer:
    """Trains a byte-level BPE with `vocab_size` entries; deterministic, and able to encode any text.

    Args:
        text: one, or several, of which one is in memory at a time. special: tokens that no text has, among the entries.

    Raises:
        ConfigError: the text is too short for that many entries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False, special_tokens=list(special)
    )
    lengths: list[int] = []
    tokenizer.train_from_iterator(_counted([text] if isinstance(text, str) else text, lengths), trainer)
    entries = tokenizer.get_vocab_size()
    if entries != vocab_size:
        characters = sum(lengths)
        raise ConfigError(
            "data.vocab_size", vocab_size, f"the training text ({characters} characters) yields {entries} entries only",
            f"Use {entries}, or a longer text",
        )  # fmt: skip
    return tokenizer


def _counted(texts: Iterable[str], lengths: list[int]) -> Iterator[str]:
    for text in texts:
        lengths.append(len(text))
        yield text


def shared_tokenizer(path: Path, text: str, vocab_size: int, *, rank: int, barrier: Callable[[], object]) -> Tokenizer:
    """The tokenizer of `text`: rank 0 trains it and writes it to `path`, and all ranks read it after `barrier`.

    Rank 0 trains it in every run, so that a file from other data is never used.
    """
    if rank == 0:
        save_tokenizer(train_tokenizer(text, vocab_size), path)
    barrier()
    return Tokenizer.from_file(str(path))


def model_tokenizer(source: Path, path: Path, *, rank: int, barrier: Callable[[], object]) -> Tokenizer:
    """The tokenizer in the file `source`, without truncation and padding; rank 0 writes a copy to `path`.

    Raises:
        ConfigError: there is no such file, or `tokenizers` cannot read it.
    """
    tokenizer = plain_tokenizer(source)
    if rank == 0:
        save_tokenizer(tokenizer, path)
    barrier()
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes the file `path` atomically."""
    with replacing(path) as partial:
        tokenizer.save(str(partial))


def plain_tokenizer(source: Path) -> Tokenizer:
    """The tokenizer in the file `source`, without truncation and padding.

    Raises:
        ConfigError: there is no such file, or `tokenizers` cannot read it.
    """
    try:
        tokenizer = Tokenizer.from_file(str(source))
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ConfigError(
            "data.tokenizer", "model", f"{source} is not there or cannot be read: {error}",
            "Save the tokenizer beside the model, or use data=moby_dick",
        ) from None  # fmt: skip
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def num_ids(tokenizer: Tokenizer) -> int:
    """The largest token id plus one: ids may have gaps, so it is more than the number of entries."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def encode(tokenizer: Tokenizer, text: str) -> Tensor:
    """The tokens of `text`, int64 (N,), without special tokens such as a start and an end."""
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)  # without offsets: half of the time
    return torch.tensor(encoding.ids, dtype=torch.int64)


def unigram_entropy(tokens: Tensor, vocab_size: int) -> float:
    """The unigram entropy of a text in nats per token: the entropy of its whole token stream's frequencies.

    A model that has learned how often each token occurs, and nothing else, has this loss.
    """
    counts = torch.bincount(tokens, minlength=vocab_size).double()
    frequencies = counts / counts.sum()
    return float(torch.special.entr(frequencies).sum())


def unigram_cross_entropy(train_tokens: Tensor, val_tokens: Tensor, vocab_size: int) -> float:
    """The loss, in nats per token, of the training text's token frequencies on the validation text.

    All counts are increased by one, so that tokens that are not in the training text have a finite loss.
    """
    counts = torch.bincount(train_tokens, minlength=vocab_size).double() + 1
    return float(-(counts / counts.sum()).log()[val_tokens].mean())
