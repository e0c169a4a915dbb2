"""A run directory belongs to one run. Until the run is accepted there, its files are kept separate.

    RUN/.pending/    files of a run in a directory that is not empty, until all checks that may refuse the run are done
    RUN/             where `accept` moves them; in an empty directory files are written here directly

A run that is refused, or that crashes before that, does not change the files of the previous run.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from moecompile.errors import ConfigError, UserError

PENDING = ".pending"
RESULT = "result.json"
_accepted: set[Path] = set()
_BUSY = (errno.EWOULDBLOCK, errno.EACCES)


def place(run_dir: Path) -> Path:
    """Where the run writes now: `run_dir`, or `run_dir`/.pending until it is accepted."""
    pending = run_dir / PENDING
    return pending if pending.is_dir() else run_dir


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Locks the existing directory `run_dir` for one run; other runs are refused.

    It is a kernel lock on the directory itself, released when this process ends for any reason. On a file system that
    cannot lock a directory (NFS) it has no effect.

    Raises:
        ConfigError: another run is writing there.
    """
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                raise ConfigError(
                    "hydra.run.dir", run_dir, "another run is writing there", "Wait for it, or use another directory"
                ) from None
        discard(run_dir)  # left by a run that was killed before it was accepted
        if any(run_dir.iterdir()):
            (run_dir / PENDING).mkdir()
        yield
    finally:
        os.close(descriptor)


def accept(run_dir: Path) -> None:
    """Gives the directory to this run: the files that it has written so far replace those with the same names."""
    note_accepted(run_dir)
    pending = run_dir / PENDING
    if not pending.is_dir():
        return
    with suppress(FileNotFoundError):
        (run_dir / RESULT).unlink()  # of the previous run; this one has none yet
    for path in sorted(pending.iterdir()):
        target = run_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    pending.rmdir()


def note_accepted(run_dir: Path) -> None:
    """Records the acceptance; also called on ranks that learn of it from the accepting rank."""
    _accepted.add(run_dir.absolute())


def is_discarded(run_dir: Path, *, was_pending: bool) -> bool:
    """Whether the files of the run were removed because it was refused, which another rank has reported."""
    return was_pending and not (run_dir / PENDING).is_dir() and run_dir.absolute() not in _accepted


def discard(run_dir: Path) -> None:
    """Removes the files of a run that was not accepted; at once for other ranks, which may be writing there."""
    with suppress(OSError):
        (run_dir / PENDING).rename(run_dir / f"{PENDING}-{os.getpid()}")
    for path in run_dir.glob(f"{PENDING}*"):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def kept_apart(run_dir: Path) -> Iterator[None]:
    """Removes files that were not accepted in `run_dir`, except after a crash, whose traceback is among them."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError | OSError) or hasattr(error, "number"):
            discard(run_dir)
        raise
    except BaseException:
        discard(run_dir)
        raise
    discard(run_dir)


def resume_hint(overrides: Sequence[str], run_dir: Path) -> str:
    """The command that resumes a run that was ended by a signal."""
    flags = [word for word in sys.argv[1:] if "=" not in word and word not in ("-m", "--multirun")]
    kept = [word for word in overrides if not re.match(r"\+{0,2}(trainer\.resume|hydra\.run\.dir)=", word)]
    python = "python" if os.path.realpath(shutil.which("python") or "") == os.path.realpath(sys.executable) else None
    words = [python or sys.executable, "-m", "moecompile", *flags, *kept]
    words += [f"hydra.run.dir={_quoted(run_dir)}", "trainer.resume=auto"]
    return f"resume with:  {shlex.join(words)}"


def _quoted(path: Path) -> str:
    """A path, quoted for Hydra's grammar."""
    text = str(path)
    if re.fullmatch(r"[\w./+-]+", text):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def task_of(run_dir: Path) -> str | None:
    """The task of the successful result in `run_dir`; None: no such result."""
    try:
        result = json.loads((run_dir / RESULT).read_text(encoding="utf-8"))
        return str(result["task"]) if result["status"] == "ok" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
