"""A run directory belongs to one run. What is written before the run has been accepted there is kept apart.

    RUN/.pending/    what a run writes in a directory that is not empty, until all that may refuse it has been checked
    RUN/             where `accept` moves it; in an empty directory everything is written there at once

A run that is refused, or that crashes before, leaves the files of the one before it as they were.
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
    """Where the run writes now: `run_dir`, or apart from it until it is accepted."""
    pending = run_dir / PENDING
    return pending if pending.is_dir() else run_dir


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Holds the directory `run_dir`, which exists, for one run; whoever else wants it is refused.

    The lock is the kernel's, on the directory itself: it ends with this process, however that ends. A file system that
    cannot lock a directory (NFS) holds nobody off.

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
        discard(run_dir)  # of a run that was killed before it was accepted
        if any(run_dir.iterdir()):
            (run_dir / PENDING).mkdir()
        yield
    finally:
        os.close(descriptor)


def accept(run_dir: Path) -> None:
    """From here on the directory is this run's: what it has written so far replaces files of the same names."""
    note_accepted(run_dir)
    pending = run_dir / PENDING
    if not pending.is_dir():
        return
    with suppress(FileNotFoundError):
        (run_dir / RESULT).unlink()  # of the run before; this one has none yet
    for path in sorted(pending.iterdir()):
        target = run_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    pending.rmdir()


def note_accepted(run_dir: Path) -> None:
    """On ranks that know it from the one that accepts."""
    _accepted.add(run_dir.absolute())


def is_discarded(run_dir: Path, *, was_pending: bool) -> bool:
    """Whether what the run has written there is gone: it was refused, and somebody has said so."""
    return was_pending and not (run_dir / PENDING).is_dir() and run_dir.absolute() not in _accepted


def discard(run_dir: Path) -> None:
    """Removes what was written but not accepted."""
    shutil.rmtree(run_dir / PENDING, ignore_errors=True)


@contextmanager
def kept_apart(run_dir: Path) -> Iterator[None]:
    """What was not accepted in `run_dir` is removed, unless a crash left it, with its traceback."""
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


def go_on(overrides: Sequence[str], run_dir: Path) -> str:
    """The command that goes on with a run that was asked to end."""
    flags = [word for word in sys.argv[1:] if "=" not in word and word not in ("-m", "--multirun")]
    kept = [word for word in overrides if not re.match(r"\+{0,2}(trainer\.resume|hydra\.run\.dir)=", word)]
    python = "python" if os.path.realpath(shutil.which("python") or "") == os.path.realpath(sys.executable) else None
    words = [python or sys.executable, "-m", "moecompile", *flags, *kept]
    words += [f"hydra.run.dir={_quoted(run_dir)}", "trainer.resume=auto"]
    return f"go on with:  {shlex.join(words)}"


def _quoted(path: Path) -> str:
    """A path as Hydra's grammar reads it."""
    text = str(path)
    if re.fullmatch(r"[\w./+-]+", text):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def task_of(run_dir: Path) -> str | None:
    """The task whose result is in `run_dir`; None: no result."""
    try:
        found = json.loads((run_dir / RESULT).read_text(encoding="utf-8"))
        return str(found["task"]) if found["status"] == "ok" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
