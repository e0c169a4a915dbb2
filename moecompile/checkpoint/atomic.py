"""A folder that many ranks write is either whole or not there: written beside its place, then renamed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(path: Path, *, is_first_rank: bool, barrier: Callable[[], object]) -> Iterator[Path]:
    """Yields `<path>.tmp` to write into; afterwards it is at `path`, whole, on all ranks. All ranks must enter it.

    An older folder at `path` stays until the new one is complete. If a rank fails, nothing is renamed. DCP alone is not
    safe here: a save that is killed while it overwrites an older one can load as a mix of both.
    """
    tmp, old = (path.with_name(path.name + suffix) for suffix in (".tmp", ".old"))
    if is_first_rank:
        for leftover in (tmp, old):
            shutil.rmtree(leftover, ignore_errors=True)
        tmp.mkdir(parents=True)
    barrier()
    yield tmp
    barrier()
    if is_first_rank:
        if path.exists():
            path.rename(old)
        tmp.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    barrier()
