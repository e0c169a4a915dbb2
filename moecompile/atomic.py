"""Files and folders that are whole or not there: they are written under a new name beside their own, then renamed.

Any number of processes may write the same file: the last one stays, whole. An error leaves what was there before, and
nothing else; only a killed process leaves its `.NAME.XXXXXXXX.tmp`.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".tmp"
"""Suffix of what is being written, or whose writing was interrupted."""
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)
"""What the file system says of a place that cannot be written."""


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a new name, and makes what is written there the file `path`; after an error it is removed.

    durable: the file is on disk (fsync) before it replaces another one, and so is its name afterwards.
    """
    partial = _beside(path)
    try:
        yield partial
        if durable:
            sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Writes the file `path`."""
    with replacing(path, durable=durable) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def creating(path: Path, *, alone: bool = True) -> Iterator[Path]:
    """Yields a new folder, and renames it to `path`; after an error it is removed.

    alone: no other process is writing it, so what killed ones have left is removed.

    Raises:
        OSError: `path` is there by then.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{UNFINISHED}") if alone else ():
        shutil.rmtree(leftover, ignore_errors=True)
    partial = _beside(path)
    made = [parent for parent in path.parents if not parent.exists()]
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # not empty: it holds the new folder, or what others wrote meanwhile
                parent.rmdir()


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Waits for the lock of a file, which is released when its process ends; False: the file system has no locks."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def sync(path: Path) -> None:
    """Flushes a file's contents, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
