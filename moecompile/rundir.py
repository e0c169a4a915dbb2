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
REPORT = "report.html"
ERRORS = "errors"
"""The folder with the failures of ranks."""
FORECAST = "forecast.json"
"""The predicted time of a step of a training run."""
PROFILE = "step_profile.json"
"""What the last steps of a training run measured: time by part, rows, bytes, memory."""
ROUTES = "routes_sample.npz"
"""Which experts tokens of the last steps chose."""
SAMPLES = "samples.jsonl"
"""Text that the model wrote during training."""
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
    shutil.rmtree(run_dir / ERRORS, ignore_errors=True)  # else a signal would be taken for the end of a failed run
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
    python = "python" if os.path.realpath(shutil.which("python") or "") == os.path.realpath(sys.executable) else None
    kept = _without(overrides, "trainer.resume")
    words = [*_command(python or sys.executable, kept, run_dir), "trainer.resume=auto"]
    return f"resume with:  {shlex.join(words)}"


def job_command(overrides: Sequence[str], run_dir: Path, task: str, python: str) -> list[str]:
    """The command of a job that runs `task` in `run_dir`, and goes on there if it is started again."""
    kept = _without(overrides, "task", "launcher.dry_run")
    resumes = task != "train" or _without(kept, "trainer.resume") != kept  # as the caller says
    return [*_command(python, [f"task={task}", *kept], run_dir), *([] if resumes else ["trainer.resume=auto"])]


def _command(python: str, overrides: Sequence[str], run_dir: Path) -> list[str]:
    flags = [word for word in sys.argv[1:] if "=" not in word and word not in ("-m", "--multirun")]
    kept = _without(overrides, "hydra.run.dir")
    return [python, "-m", "moecompile", *flags, *kept, f"hydra.run.dir={_quoted(run_dir)}"]


def _without(overrides: Sequence[str], *keys: str) -> list[str]:
    """The overrides of other keys than these."""
    return [word for word in overrides if word.lstrip("+").partition("=")[0] not in keys]


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


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
