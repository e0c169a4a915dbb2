"""A folder that many ranks write is either complete or absent: it is written under another name, then renamed.

DCP alone does not ensure this: a save that is killed while it overwrites an older one can load as a mix of both.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moecompile.checkpoint.sums import seal

UNFINISHED = ".tmp"
"""Suffix of a folder that is being written, or whose writing was interrupted."""


@contextmanager
def whole_folder(path: Path, *, is_first_rank: bool, barrier: Callable[[], object]) -> Iterator[Path]:
    """Yields `<path>.tmp` to write into, and renames it to `path` when all ranks are done. All ranks must enter it.

    An older folder at `path` stays until the new one is complete. If a rank fails, nothing is renamed.
    """
    tmp, old = unfinished(path), path.with_name(path.name + ".old")
    if is_first_rank:
        for leftover in (tmp, old):
            shutil.rmtree(leftover, ignore_errors=True)
        tmp.mkdir(parents=True)
    barrier()
    yield tmp
    barrier()
    if is_first_rank:
        seal(tmp)
        if path.exists():
            path.rename(old)
        publish(tmp, path)
        shutil.rmtree(old, ignore_errors=True)
    barrier()


def unfinished(path: Path) -> Path:
    """The temporary name under which `path` is written."""
    return path.with_name(path.name + UNFINISHED)


def publish(tmp: Path, path: Path) -> None:
    """Renames the complete folder `tmp` to `path`, and makes both files and name durable (fsync)."""
    for file in tmp.iterdir():
        sync(file)
    sync(tmp)
    tmp.rename(path)
    sync(path.parent)


def write_file(path: Path, text: str) -> None:
    """Writes a file atomically."""
    partial = path.with_name(f".{path.name}{UNFINISHED}")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)


def point(link: Path, target: str) -> None:
    """Makes `link` a symbolic link to `target`; an existing link is replaced atomically."""
    partial = link.with_name(f".{link.name}{UNFINISHED}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.replace(link)
    sync(link.parent)


def sync(path: Path) -> None:
    """Flushes a file's contents, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
