"""The text of a domain, fetched by name and version, and cut into parts that share no piece.

Algorithm:
  1. Documents come from the packages that `study.DOMAINS` names, with version and sha256; each has a source.
  2. Every document is cut at line ends into pieces of about 4 KiB. Of all pieces in their order, `NUM_VAL` evenly
     spread ones are held out. A fixed permutation gives the others to `parent` (`PARENT_SHARE`) or `branch`.
  3. A byte-level BPE is trained on `parent`. The tokens of a part are one stream, cut into windows of `SEQ` tokens and
     the one after. Of each piece that is held out, the first window is validated.

No text is stored in the repository: files lie in `FOLDER`, which git ignores.
"""

from __future__ import annotations

import dataclasses
import fcntl
import gzip
import hashlib
import html
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moecompile.atomic import replacing
from moecompile.runtime.data import encode, train_tokenizer
from quality.study import (
    CUT_SEED,
    DOMAINS,
    FOLDER,
    MOBY_DICK,
    NUM_VAL,
    PARENT_SHARE,
    PIECE,
    REPOSITORY,
    SEQ,
    VOCAB,
    Package,
)


@dataclass(frozen=True)
class Texts:
    """A domain. parent, branch: windows (N, SEQ + 1) int64. val: (NUM_VAL, SEQ + 1). val_sources: of each of its rows.
    val_bytes: bytes of all targets of `val`. sha256: of documents and tokens.
    """

    tokenizer: Tokenizer
    parent: Tensor
    branch: Tensor
    val: Tensor
    val_texts: list[str]
    val_sources: list[str]
    val_bytes: int
    sha256: str


def load(domain: str, tokenizer: Tokenizer | None = None) -> Texts:
    """Fetches what is not there yet and cuts it; kept in `FOLDER`. tokenizer: of a pretrained model, not a new one.

    A unit that begins meanwhile waits: two downloads of a file would write into each other.
    """
    text = repr((SEQ, VOCAB, PIECE, NUM_VAL, PARENT_SHARE, CUT_SEED, DOMAINS[domain])).encode()
    key = hashlib.sha256(Path(__file__).read_bytes() + text + (tokenizer.to_str().encode() if tokenizer else b""))
    kept = FOLDER / "texts" / f"{domain}-{key.hexdigest()[:16]}.pt"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "texts" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if kept.exists():
            fields = torch.load(kept)
            return Texts(tokenizer=Tokenizer.from_str(fields.pop("tokenizer")), **fields)
        documents = [(package.source, text) for package in DOMAINS[domain] for text in _documents(package)]
        texts = cut(documents, tokenizer)
        fields = {field.name: getattr(texts, field.name) for field in dataclasses.fields(texts)}
        with replacing(kept) as path:
            torch.save({**fields, "tokenizer": texts.tokenizer.to_str()}, path)
        return texts


def cut(documents: list[tuple[str, str]], tokenizer: Tokenizer | None = None, vocab: int = VOCAB) -> Texts:
    """Steps 2 and 3. documents: (source, text)."""
    pieces = [(source, piece) for source, text in documents for piece in _pieces(text)]
    held = {round((i + 0.5) * len(pieces) / NUM_VAL) for i in range(NUM_VAL)}
    rest = [i for i in range(len(pieces)) if i not in held]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(CUT_SEED)).tolist()
    first = set(order[: round(PARENT_SHARE * len(rest))])
    parent = "".join(pieces[piece][1] for place, piece in enumerate(rest) if place in first)
    branch = "".join(pieces[piece][1] for place, piece in enumerate(rest) if place not in first)
    tokenizer = tokenizer or train_tokenizer(parent, vocab)
    held_out = [pieces[i] for i in sorted(held)]
    val = torch.stack([encode(tokenizer, text)[: SEQ + 1] for _, text in held_out])
    digest = hashlib.sha256(repr((SEQ, vocab, PIECE, NUM_VAL, PARENT_SHARE, CUT_SEED)).encode())
    for source, text in documents:
        digest.update(f"{source}\0{text}\0".encode())
    windows = [_windows(encode(tokenizer, part)) for part in (parent, branch)]
    for part in (*windows, val):
        digest.update(part.numpy().tobytes())
    return Texts(
        tokenizer=tokenizer,
        parent=windows[0],
        branch=windows[1],
        val=val,
        val_texts=[text for _, text in held_out],
        val_sources=[source for source, _ in held_out],
        val_bytes=sum(len(tokenizer.id_to_token(token) or "") for token in val[:, 1:].flatten().tolist()),
        sha256=digest.hexdigest(),
    )


def _windows(tokens: Tensor) -> Tensor:
    """(N, SEQ + 1): windows side by side, each with the token after it."""
    count = (len(tokens) - 1) // SEQ
    return tokens[: count * SEQ + 1].unfold(0, SEQ + 1, SEQ).contiguous()


def _pieces(text: str) -> Iterator[str]:
    """Consecutive parts of about `PIECE` characters, cut after a line; what is left at the end is dropped if short."""
    begin = 0
    while len(text) - begin >= PIECE:
        end = text.find("\n", begin + PIECE) + 1 or len(text)
        yield text[begin:end]
        begin = end


# -- packages -> documents ------------------------------------------------------------------------------------------


def _documents(package: Package) -> Iterator[str]:
    if package.kind == "own":
        yield _checked(package, REPOSITORY / MOBY_DICK).read_text(encoding="utf-8")
        return
    archive = _checked(package, _fetched(package))
    if package.kind == "wheel":
        yield from _python(archive)
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(archive), folder], check=True)
        for path in sorted(Path(folder).rglob("markdown/*.md.gz")) + sorted(Path(folder).rglob("markdown/*.md")):
            body = path.read_bytes()
            yield html.unescape((gzip.decompress(body) if path.suffix == ".gz" else body).decode("utf-8"))


def _python(wheel: Path) -> Iterator[str]:
    """Python files of a wheel, without tests, as one document a file with a comment between."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".py") and not re.search(r"(^|/)tests?/|/test_", n))
        yield "".join(archive.read(name).decode("utf-8") + "\n\n" for name in names)


def _fetched(package: Package) -> Path:
    """The downloaded file; downloads it if there is none."""
    folder = FOLDER / "packages" / f"{package.name}-{package.version}"
    if not any(folder.glob("*")):
        folder.mkdir(parents=True, exist_ok=True)
        if package.kind == "deb":
            subprocess.run(["apt-get", "download", f"{package.name}={package.version}"], cwd=folder, check=True)
        else:
            named = f"{package.name}=={package.version}"
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", named]
            subprocess.run(pip, cwd=folder, check=True)
    return next(folder.glob("*"))


def _checked(package: Package, path: Path) -> Path:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise SystemExit(f"{path}: sha256 is {found}, and the study is declared for {package.sha256}")
    return path
