"""logs/rank_N.log: what a rank without the terminal prints; and a lock on it, by which others see that it is alive.

The kernel drops the lock when the process ends, however it ends. So a rank that has lost a peer can tell the one that
was killed from those that have only lost it too. Where the file system has no locks, nobody is known to be gone.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

from moecompile.rundir import place

_TERMINAL = "This rank writes to the terminal.\n"
_locks: dict[int, int] = {}  # slot -> descriptor, for the life of the process


def log_path(run_dir: Path, rank: int) -> Path:
    """The log of a rank."""
    return place(run_dir) / "logs" / f"rank_{rank}.log"


def hold(run_dir: Path, rank: int) -> None:
    """Makes the log of `rank` and locks it. Sends standard output and error, of C++ too, there: rank 0 alone talks."""
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
    """Locks the file `path` for the life of this process, in place of what `slot` has locked before."""
    if slot in _locks:
        os.close(_locks.pop(slot))
    # A descriptor of its own: children inherit the others, and with them a lock.
    _locks[slot] = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(_locks[slot], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        path.with_suffix(".unlocked").touch()


def gone(run_dir: Path, world_size: int) -> list[int]:
    """Ranks whose process has ended."""
    return [rank for rank in range(world_size) if is_free(log_path(run_dir, rank))]


_early: list[int] = []  # a file without a name, before the run directory is known


def hide() -> int:
    """Keeps output off the terminal until there is a log to put it into; returns a descriptor of the old stderr."""
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
        return False  # it has not started yet
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
