"""logs/rank_N.log: the output of a rank without the terminal, locked to show other ranks that it is alive.

The kernel releases the lock when the process ends for any reason. So a rank that has lost a peer can distinguish a
killed rank from ranks that have only lost it too. On a file system without locks, no rank is known to have ended.
"""

from __future__ import annotations

import fcntl
import io
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from moecompile.rundir import output_dir

_TERMINAL = "This rank writes to the terminal.\n"
_locks: dict[int, int] = {}  # slot -> descriptor, kept until the process ends


class _Output(io.FileIO):
    """A descriptor that is led to nowhere once nobody reads it: `| head -1` ends the output, and not the run."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(memoryview(data).cast("B"))


def outlive_readers() -> None:
    """Lets this process go on, quietly and to its own exit code, when the reader of stdout or stderr has ended."""
    for number, name in enumerate(("stdout", "stderr"), start=1):
        stream = getattr(sys, name)
        if stream is None:  # closed before Python began (`>&-`)
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.flush()
            output = io.BufferedWriter(_Output(number, "wb", closefd=False))
            is_whole = stream.line_buffering or stream.write_through or name == "stderr"
            text = io.TextIOWrapper(output, encoding=stream.encoding, errors=stream.errors, line_buffering=is_whole)
            setattr(sys, name, text)


def log_path(run_dir: Path, rank: int) -> Path:
    """The log of a rank."""
    return output_dir(run_dir) / "logs" / f"rank_{rank}.log"


def hold(run_dir: Path, rank: int) -> None:
    """Creates and locks the log of `rank`. Redirects stdout and stderr to it, also of C++, except on rank 0."""
    path = log_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        path.write_text(_TERMINAL, encoding="utf-8")
    else:
        with open(path, "wb", buffering=0) as log:
            _take_early(log.fileno())
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    lock(path, rank)


def lock(path: Path, slot: int) -> None:
    """Locks the file `path` until this process ends, instead of the file that `slot` has locked before."""
    if slot in _locks:
        os.close(_locks.pop(slot))
    # A new descriptor: children inherit the redirected ones, and would keep the lock.
    _locks[slot] = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(_locks[slot], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        path.with_suffix(".unlocked").touch()


def gone(run_dir: Path, world_size: int) -> list[int]:
    """Ranks whose process has ended."""
    return [rank for rank in range(world_size) if is_free(log_path(run_dir, rank))]


_early: list[int] = []  # an unlinked file, before the run directory is known


def hide() -> int:
    """Keeps output off the terminal until there is a log for it; returns a descriptor of the old stderr."""
    terminal = os.dup(2)
    try:
        descriptor, name = tempfile.mkstemp(prefix="moecompile-")
        os.unlink(name)
        _early.append(descriptor)
    except OSError:  # a full disk
        descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    return terminal


def _take_early(log: int) -> None:
    while _early:
        descriptor = _early.pop()
        os.lseek(descriptor, 0, os.SEEK_SET)
        while block := os.read(descriptor, 65536):
            os.write(log, block)
        os.close(descriptor)


def is_free(path: Path) -> bool:
    """Whether the process that has locked `path` has ended."""
    if path.with_suffix(".unlocked").exists():
        return False
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False  # the process has not started yet
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def claim_file(path: Path, *, for_s: float = math.inf) -> bool:
    """True for the first process that calls it for the file `path`, and again when that is `for_s` seconds ago.

    Raises:
        OSError: the file cannot be created.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        if time.time() - path.stat().st_mtime < for_s:
            return False
        path.touch()
    return True
