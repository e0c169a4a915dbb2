"""The checkpoints of a run: names, the latest one, which are kept; and folders that many ranks write. Needs no torch.

    RUN/checkpoints/step-20/       complete: DCP's files (.metadata, __RANK_0.distcp), plan.yaml, state.json,
                                   checksums.json
    RUN/checkpoints/step-30.tmp/   being written, or interrupted
    RUN/checkpoints/latest         a link to the newest complete one
    RUN/replaced-1/                a run directory with the checkpoints after the one from which a later run went on
    .ANY.old                       what a folder of a Trainer's replaces, for the moment between two renames

Every rank writes its shards into a `.tmp`; all else is rank 0's. DCP alone does not ensure that a checkpoint is whole:
a save that is killed while it overwrites an older one can load as a mix of both.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from moecompile.atomic import UNFINISHED, replacing, sync, write_text
from moecompile.errors import ConfigError

# -- checksums.json: of all files of a checkpoint, written with it and checked before it is used --------------------
#
# crc32 detects every flipped byte. Each rank computes it for the shards that it writes, and for those that it will
# read. It is not a signature: whoever can write to the folder can also change the checksums. Needs no torch.

SUMS = "checksums.json"
INDEX = ".metadata"
"""The index of DCP."""
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


# -- names, and folders that many ranks write -----------------------------------------------------------------------

CHECKPOINTS = "checkpoints"
LATEST = "latest"
STATE = "state.json"
PLAN = "plan.yaml"
AUTO = "auto"
REPLACED = "replaced"
_BESIDE = ("resolved.yaml", "overrides.txt", "plan.yaml", "tokenizer.json", "metrics.csv", "load.npz", "result.json")
"""Files of a run that its replaced checkpoints are resumed or exported with."""
_WHY = """These are the checkpoints of steps {steps}, and the files of their run.
In {run}, a run went on from step {step}, and writes later steps again.
Nothing reads this folder, and nothing deletes it.
Delete it, or use it as a run directory: trainer.resume={folder}, export.run={folder}.
"""


def checkpoints_of(run_dir: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run_dir / CHECKPOINTS


def step_folder(checkpoints: Path, step: int) -> Path:
    """The checkpoint of an optimizer step."""
    return checkpoints / f"step-{step}"


def steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    matches = (re.fullmatch(r"step-(\d+)", path.name) for path in checkpoints.glob("step-*"))
    numbers = sorted(int(match[1]) for match in matches if match)
    return [step for step in numbers if (step_folder(checkpoints, step) / STATE).is_file()]


def latest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint; without the link (after a crash at the first one), that of the highest step."""
    link = checkpoints / LATEST
    if (link / STATE).is_file():
        return link.resolve()
    numbers = steps(checkpoints)
    return step_folder(checkpoints, numbers[-1]) if numbers else None


def find(resume: str, run_dir: Path) -> Path | None:
    """The checkpoint that `trainer.resume` names; for `auto`, the latest of `run_dir`, or None if there is none yet.

    Raises:
        ConfigError: the path is neither a checkpoint nor a run directory with one.
    """
    if resume == AUTO:
        return latest(checkpoints_of(run_dir))
    path = Path(resume)
    if (path / STATE).is_file():
        return path.resolve()
    newest = latest(checkpoints_of(path)) or latest(path)
    if newest is None:
        raise ConfigError(
            "trainer.resume", resume, "there is no whole checkpoint",
            "Give a run directory, one of its checkpoints/step-N, or auto",
        )  # fmt: skip
    return newest.absolute()


def finish(checkpoints: Path, step: int, keep_last: int) -> Path:
    """Makes a complete `step-N.tmp` the latest checkpoint and removes all but the newest `keep_last` (0: keeps all).

    If it is killed at any moment, `latest` still points to a complete checkpoint.
    """
    folder = step_folder(checkpoints, step)
    seal(unfinished(folder))
    _publish(folder)
    _point(checkpoints / LATEST, folder.name)
    for old in steps(checkpoints)[:-keep_last] if keep_last else []:
        going = step_folder(checkpoints, old)
        shutil.rmtree(going.rename(unfinished(going)))  # so that one that is half removed is not taken for a checkpoint
    return folder


def set_aside(run_dir: Path, step: int) -> Path | None:
    """Moves what a run that goes on at `step` will write again, the later checkpoints, into a new folder `replaced-N`.

    Interrupted checkpoints are removed. If it is killed at any moment, `latest` is a complete checkpoint: the one of
    `step` or the one of before, and all others are in one of the two folders.

    Returns:
        The new folder; None: there are no later checkpoints.
    """
    checkpoints = checkpoints_of(run_dir)
    for path in [*checkpoints.glob(f"step-*{UNFINISHED}"), *checkpoints.glob(f".{LATEST}*{UNFINISHED}")]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if not (later := [number for number in steps(checkpoints) if number > step]):
        return None
    folder = next(path for i in count(1) if not (path := run_dir / f"{REPLACED}-{i}").exists())
    checkpoints_of(folder).mkdir(parents=True)
    for name in _BESIDE:
        if (run_dir / name).is_file():
            shutil.copy2(run_dir / name, folder / name)
    named = ", ".join(map(str, later))
    write_text(folder / "README.txt", _WHY.format(steps=named, run=run_dir, step=step, folder=folder))
    if step_folder(checkpoints, step).is_dir():
        _point(checkpoints / LATEST, f"step-{step}")
    for number in later:
        step_folder(checkpoints, number).rename(step_folder(checkpoints_of(folder), number))
        _point(checkpoints_of(folder) / LATEST, f"step-{number}")
    return folder


@contextmanager
def whole_folder(path: Path, *, is_first_rank: bool, barrier: Callable[[], object]) -> Iterator[Path]:
    """Yields `<path>.tmp` to write into, and renames it to `path` when all ranks are done. All ranks must enter it.

    An older folder at `path` stays until the new one is complete and on disk. If a rank fails, nothing is renamed. If
    it is killed at any moment, `whole` finds the older one or the new one.

    Raises:
        ConfigError: on all ranks: a folder at `path` holds something that is of no checkpoint.
    """
    if strays := _strays(path):
        rule = f"holds {strays[0]}, which is of no checkpoint, and a save would remove the folder"
        raise ConfigError("filepath", path, rule, "Save under another name")
    tmp, old = unfinished(path), _older(path)
    if is_first_rank:
        if whole(path) == old:  # killed between the two renames
            old.rename(path)
        _remove(tmp)
        _remove(old)
        tmp.mkdir(parents=True)
    barrier()
    yield tmp
    barrier()
    if is_first_rank:
        seal(tmp)
        _publish(path, old)
        if old.exists():
            _remove(old.rename(tmp))  # so that one that is half removed is not taken for a whole one
    barrier()


def _strays(path: Path) -> list[str]:
    """Names in a folder that are of no checkpoint, without hidden files, which systems leave (.DS_Store, .nfs0001). A
    file at `path` is replaced as by any save.
    """
    found = list(path.iterdir()) if path.is_dir() else []
    names = {each.name for each in found if each.is_dir() or not each.name.startswith(".")}
    try:
        known = {SUMS, *_read(path)} & names
    except (OSError, ValueError):
        known = {SUMS}
    if known <= {SUMS} and (path / INDEX).is_file():  # of version 0.1.0, or damaged
        known = {name for name in names if (path / name).is_file()}
    return sorted(names - known)


def whole(path: Path) -> Path:
    """`path`; or the older folder that a save was replacing when it was killed, where that is all there is."""
    return _older(path) if _older(path).exists() and not path.exists() else path


def unfinished(path: Path) -> Path:
    """The name under which many ranks write `path`."""
    return path.with_name(path.name + UNFINISHED)


def _older(path: Path) -> Path:
    """The name of what was at `path` while a new folder takes its place."""
    return path.with_name(f".{path.name}.old")  # not `last.ckpt.old`, which may be a copy of the user's


def _remove(path: Path) -> None:
    """Removes a folder, or what else has its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _publish(path: Path, old: Path | None = None) -> None:
    """Renames a complete `<path>.tmp` to `path`, and makes both files and name durable (fsync).

    What was there is renamed to `old`, but not before the files are durable, which takes long.
    """
    tmp = unfinished(path)
    for file in tmp.iterdir():
        sync(file)
    sync(tmp)
    if old is not None and path.exists():
        path.rename(old)
    tmp.rename(path)
    sync(path.parent)


def _point(link: Path, target: str) -> None:
    """Makes `link` a symbolic link to `target`; an existing link is replaced."""
    with replacing(link) as partial:
        partial.symlink_to(target)
    sync(link.parent)
