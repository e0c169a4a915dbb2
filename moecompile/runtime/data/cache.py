"""Results on disk that are made once, by whichever process comes first, and are whole or not there.

    CACHE/KEY/              a result; the key is a hash of all that it depends on
    CACHE/KEY.lock          locked by the process that makes it; others wait for the lock, not in a collective
    CACHE/files/HASH.json   the content hash of a file, by path, size and time of change, so that it is read only once

The kernel releases a lock when its process ends for any reason. On a file system without locks two processes may make
the same result; the second one is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from moecompile.atomic import creating, locked, write_text
from moecompile.errors import ConfigError

_READ = 2**22


def cache_folder(given: str | None, name: str = "data") -> Path:
    """`data.cache`, or `moecompile/NAME` in the user's folder for caches; created.

    Raises:
        ConfigError: it cannot be created.
    """
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(given) if given else Path(home, "moecompile", name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("data.cache", folder, f"cannot be created: {error.strerror}", "Give another folder") from None
    return folder


def key_of(*parts: Any) -> str:
    """The hash of plain values."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def made(cache: Path, key: str, make: Callable[[Path], None]) -> Path:
    """The folder of a result. Any number of processes may call it at once.

    Args:
        make: writes the result into an empty folder; it is called by one process, if there is no result yet.
    """
    done = cache / key
    if done.is_dir():
        return done
    with locked(cache / f"{key}.lock") as is_locked:
        if done.is_dir():  # made while this process waited
            return done
        try:
            with creating(done, alone=is_locked) as folder:
                make(folder)
        except OSError:
            if not done.is_dir():  # else another process was faster, where there are no locks
                raise
    return done


def content_of(path: Path, cache: Path) -> str:
    """The hash of a file's content, or of all files in a folder."""
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        return key_of([[str(file.relative_to(path)), content_of(file, cache)] for file in inside])
    status = path.stat()
    known = cache / "files" / f"{key_of(str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino)}.json"
    with suppress(OSError, ValueError):
        return str(json.loads(known.read_text(encoding="utf-8")))
    known.parent.mkdir(exist_ok=True)
    with locked(known.with_suffix(".lock")):
        with suppress(OSError, ValueError):  # read by another process while this one waited
            return str(json.loads(known.read_text(encoding="utf-8")))
        digest = _digest(path)
        write_text(known, json.dumps(digest))
    return digest


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_READ):
            digest.update(chunk)
    return digest.hexdigest()


class Progress:
    """Prints progress of long preprocessing."""

    EVERY_S = 30

    def __init__(self, what: str, unit: str) -> None:
        self.what, self.unit = what, unit
        self._said = time.monotonic()

    def show(self, amount: float) -> None:
        """Prints a line if the last one is long ago."""
        if time.monotonic() - self._said > self.EVERY_S:
            self._said = time.monotonic()
            print(f"{self.what}: {amount:,.0f} {self.unit} so far", flush=True)
