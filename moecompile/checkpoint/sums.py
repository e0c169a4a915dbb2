"""checksums.json: what every file of a checkpoint must hold, written with it and checked before it is used.

crc32 finds every flipped byte, and each rank sums the shards that it wrote, and those that it will read. It is no
signature: who can write into the folder can write its checksums too. Needs no torch.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from moecompile.errors import ConfigError

SUMS = "checksums.json"
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
    """Writes the checksums of all files in `folder`; those in `known` or sealed before are not summed again."""
    found = {**_read(folder), **(known or {})}
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    sums = {name: found.get(name) or file_sum(folder / name) for name in names}
    (folder / SUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")  # not published yet


def is_sealed(folder: Path) -> bool:
    """Whether there are checksums: earlier versions wrote none."""
    return (folder / SUMS).is_file()


def check(folder: Path, names: Iterable[str], *, key: str = "trainer.resume") -> None:
    """Whether files of a checkpoint are what was written. A folder without checksums cannot be checked.

    Args:
        key: the config path that names the checkpoint, for the message.

    Raises:
        ConfigError: a file differs, or is not there.
    """
    if not is_sealed(folder):
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


def _problem(path: Path, wanted: str | None) -> str | None:
    if wanted is None:
        return None if not path.exists() else f"has no entry in {SUMS}"
    try:
        found = file_sum(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if found == wanted:
        return None
    (crc, size), (wanted_crc, wanted_size) = found.split(), wanted.split()
    if size != wanted_size:
        return f"has {size} bytes where {wanted_size} were written"
    return f"has the checksum {crc} where {wanted_crc} was written"


def _read(folder: Path) -> dict[str, str]:
    path = folder / SUMS
    if not path.is_file():
        return {}
    body = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(body, dict) or not all(isinstance(v, str) and len(v.split()) == 2 for v in body.values()):
        raise ValueError("it is no table of checksums")
    return body
