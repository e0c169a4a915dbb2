"""A folder that many ranks write is either whole or not there: written beside its place, then renamed.

DCP alone is not safe here: a save that is killed while it overwrites an older one can load as a mix of both.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moecompile.checkpoint.sums import seal

UNFINISHED = ".tmp"
"""Suffix of a folder that is being written, or whose writing was cut off."""


@contextmanager
def whole_folder(path: Path, *, is_first_rank: bool, barrier: Callable[[], object]) -> Iterator[Path]:
    """Yields `<path>.tmp` to write into; afterwards it is at `path`, whole, on all ranks. All ranks must enter it.

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
    """Where the folder that will be `path` is written."""
    return path.with_name(path.name + UNFINISHED)


def publish(tmp: Path, path: Path) -> None:
    """Renames the folder `tmp`, whose files are complete, to `path`; it is there after a power failure too."""
    for file in tmp.iterdir():
        sync(file)
    sync(tmp)
    tmp.rename(path)
    sync(path.parent)


def write_file(path: Path, text: str) -> None:
    """Writes `path`, whole or not at all."""
    partial = path.with_name(f".{path.name}{UNFINISHED}")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)


def point(link: Path, target: str) -> None:
    """Makes `link` a symbolic link to `target`, in one step if it is one already."""
    partial = link.with_name(f".{link.name}{UNFINISHED}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.replace(link)
    sync(link.parent)


def sync(path: Path) -> None:
    """Waits until the disk has a file's bytes, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
