"""checksums.json: checksums of all files of a checkpoint, written with it and checked before it is used.

crc32 detects every flipped byte. Each rank computes it for the shards that it writes, and for those that it will read.
It is not a signature: whoever can write to the folder can also change the checksums. Needs no torch.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from moecompile.errors import ConfigError

SUMS = "checksums.json"
_PLAN = "plan.yaml"
_BLOCK = 2**22


def file_sum(path: Path) -> str:
    """crc32 and size of a file, `8c736521 1048576`.

    Raises:
        OSError: it cannot be read.
    """
    crc = size = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return f"{crc:08x} {size}"


def seal(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Writes the checksums of all files in `folder`; those in `known` or already written are not computed again."""
    done = {**_read(folder), **(known or {})}
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    sums = {name: done.get(name) or file_sum(folder / name) for name in names}
    (folder / SUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")  # not published yet


def check(folder: Path, names: Iterable[str], *, key: str = "trainer.resume") -> None:
    """Checks files of a checkpoint against its checksums. A folder of version 0.1.0, which wrote none, is not checked.

    Args:
        key: the config path that names the checkpoint, for the message.

    Raises:
        ConfigError: a file differs or is missing, or the checksums are missing.
    """
    if not (folder / SUMS).is_file():
        if _was_sealed(folder):
            rule = f"has no {SUMS}, which the version that wrote it writes, so it is damaged"
            raise ConfigError(key, folder, rule, "Use another checkpoint, or a copy of this one")
        return
    try:
        sums = _read(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(key, folder, f"its {SUMS} cannot be read ({error})", "Use another checkpoint") from error
    for name in sorted(set(names)):
        problem = _problem(folder / name, sums.get(name))
        if problem is not None:
            raise ConfigError(
                key, folder, f"{name} {problem}, so it is damaged", "Use another checkpoint, or a copy of this one"
            )


def _was_sealed(folder: Path) -> bool:
    """Whether the version that wrote a folder writes checksums: its plans, too, have what those of 0.1.0 have not."""
    try:
        plan = (folder / _PLAN).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return re.search(r"^context_parallel:", plan, re.MULTILINE) is not None


def _problem(path: Path, written: str | None) -> str | None:
    if written is None:
        return None if not path.exists() else f"has no entry in {SUMS}"
    try:
        actual = file_sum(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if actual == written:
        return None
    (crc, size), (written_crc, written_size) = actual.split(), written.split()
    if size != written_size:
        return f"has {size} bytes where {written_size} were written"
    return f"has the checksum {crc} where {written_crc} was written"


def _read(folder: Path) -> dict[str, str]:
    path = folder / SUMS
    if not path.is_file():
        return {}
    body = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(body, dict) or not all(isinstance(v, str) and len(v.split()) == 2 for v in body.values()):
        raise ValueError("it is not a table of checksums")
    return body
