"""A run directory belongs to one run. Until the run is accepted there, its files are kept separate.

    RUN/.pending/    files of a run in a directory that is not empty, until nothing can refuse the run any more: a run
                     that trains has then computed its first new step
    RUN/.accepted/   the same files while `accept` moves them; what a killed run has left there is moved by the next one
    RUN/             where they are moved to; in an empty directory files are written here directly

A run that is refused, or that crashes before that, does not change the files of the previous run. A folder that has
something else than a run is not used at all.
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
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moecompile.errors import ConfigError, UserError

PENDING = ".pending"
ACCEPTED = ".accepted"
RESOLVED = "resolved.yaml"
"""The composed config."""
OVERRIDES = "overrides.txt"
"""The overrides of the command line, one a line."""
FAILURES = "failures.txt"
"""In a sweep's directory: a line for each job that failed, with its number and its exit code."""
RESULT = "result.json"
REPORT = "report.html"
ERRORS = "errors"
"""The folder with the failures of ranks."""
FORECAST = "forecast.json"
"""The predicted time of a step of a training run."""
BASELINE = "baseline"
"""The folder with the metrics of the dense model that is trained beside."""
PROFILE = "step_profile.json"
"""What the last steps of a training run measured: time by part, rows, bytes, memory."""
ROUTES = "routes_sample.npz"
"""Which experts tokens of the last steps chose."""
SAMPLES = "samples.jsonl"
"""Text that the model wrote during training."""
_accepted: set[Path] = set()
_BUSY = (errno.EWOULDBLOCK, errno.EACCES)
_OF_OTHERS = (".hydra", "lost+found", "job.sbatch", "slurm-*.out")
"""What Hydra, file systems and a batch system put into a folder that is empty otherwise."""
_GROUPS = {"task", "model", "experts", "mesh", "trainer"}
"""Keys that the `resolved.yaml` of every version has."""
_SHOWN = 3


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The rows of `samples.jsonl`; none of what a kill or a full disk has cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # a text may have other ends of lines
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def output_dir(run_dir: Path) -> Path:
    """Where the run writes now: `run_dir`, or `run_dir`/.pending until it is accepted."""
    for name in (PENDING, ACCEPTED):
        if (run_dir / name).is_dir():
            return run_dir / name
    return run_dir


def contents(folder: Path) -> list[str]:
    """Names of what is in an existing folder, without what Hydra, file systems and a batch system put there."""
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if not any(fnmatchcase(name, each) for each in _OF_OTHERS))


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory, also one of an earlier version, or of a run that was killed early."""
    try:
        keys = re.findall(r"^(\w+):", (folder / RESOLVED).read_text(encoding="utf-8"), re.MULTILINE)
        if set(keys) >= _GROUPS:
            return not any(folder.glob("*.safetensors"))  # else it is an export, which has the config too
    except (OSError, ValueError):
        pass
    if any(folder.glob("checkpoints/step-*/state.json")):  # a copy of the checkpoints alone
        return True
    if [name for name in contents(folder) if not name.startswith((PENDING, ACCEPTED))] != [OVERRIDES]:
        return False
    try:  # killed before there was a config, or a job of a sweep that has failed
        lines = (folder / OVERRIDES).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return False
    return all(re.match(r"[~+]*[\w./@-]+(=|$)", line) for line in lines)


def others_in(names: Sequence[str]) -> str:
    """`notes.txt, src and 4 more`: the rule in the message about a folder that has other files."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Locks the existing directory `run_dir` for one run; other runs are refused.

    It is a kernel lock on the directory itself, released when this process ends for any reason. On a file system that
    cannot lock a directory (NFS) it has no effect.

    Raises:
        ConfigError: another run is writing there, or it holds other files than those of a run.
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
        names = contents(run_dir)
        if names and not is_run(run_dir):
            rule = f"holds {others_in(names)}, and no run"
            raise ConfigError("hydra.run.dir", run_dir, rule, "Use a new directory, or an empty one")
        settle(run_dir)
        discard(run_dir)  # left by a run that was killed before it was accepted
        if contents(run_dir):
            (run_dir / PENDING).mkdir()
        yield
    finally:
        os.close(descriptor)


def accept(run_dir: Path) -> None:
    """Gives the directory to this run: the files that it has written so far replace those with the same names."""
    note_accepted(run_dir)
    if (run_dir / PENDING).is_dir():
        (run_dir / PENDING).rename(run_dir / ACCEPTED)  # from here on it is this run's, whatever happens
    settle(run_dir)


def settle(run_dir: Path) -> None:
    """Moves the files of an accepted run to their places; after a kill the next one goes on where this has ended."""
    accepted = run_dir / ACCEPTED
    if not accepted.is_dir():
        return
    for name in (RESULT, PROFILE, ROUTES):  # of the previous run; this one has none yet
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / ERRORS, ignore_errors=True)  # else a signal would be taken for the end of a failed run
    for path in sorted(accepted.iterdir()):
        target = run_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    accepted.rmdir()


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
    for path in run_dir.glob(f"{PENDING}-*"):
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


def rehearsal_hint(overrides: Sequence[str]) -> str:
    """The command that rehearses a step of a job on this machine."""
    kept = [word for word in _without(overrides, "task", "hydra.run.dir") if not word.startswith("launcher")]
    return f"rehearse a step of it here with:  {shlex.join(['python', '-m', 'moecompile', 'task=rehearse', *kept])}"


def job_command(overrides: Sequence[str], run_dir: Path, task: str, python: str) -> list[str]:
    """The command of a job that runs `task` in `run_dir`, and goes on there if it is started again."""
    kept = _without(overrides, "task", "launcher.dry_run")
    resumes = task != "train" or _without(kept, "trainer.resume") != kept  # as the caller says
    return [*_command(python, [f"task={task}", *kept], run_dir), *([] if resumes else ["trainer.resume=auto"])]


_FOLDER_FLAGS = ("--config-dir", "-cd")  # the next word is a folder, whatever is in its name


def _command(python: str, overrides: Sequence[str], run_dir: Path) -> list[str]:
    words = [word for word in sys.argv[1:] if word not in ("-m", "--multirun")]
    flags = [
        word
        for before, word in zip(["", *words], words, strict=False)
        if before in _FOLDER_FLAGS or word.startswith("-") or not ("=" in word or word.startswith("~"))
    ]
    kept = _without(overrides, "hydra.run.dir")
    return [python, "-m", "moecompile", *flags, *kept, f"hydra.run.dir={_quoted(run_dir)}"]


def _without(overrides: Sequence[str], *keys: str) -> list[str]:
    """The overrides of other keys than these."""
    return [word for word in overrides if word.lstrip("+").partition("=")[0] not in keys]


def _quoted(path: Path) -> str:
    """A path, quoted for Hydra's grammar."""
    text = str(path)
    if re.fullmatch(r"[\w./+-]+", text):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def task_of(run_dir: Path) -> str | None:
    """The task of the result in `run_dir`; None: there is none, or it failed."""
    try:
        result = json.loads((run_dir / RESULT).read_text(encoding="utf-8"))
        return str(result["task"]) if result["status"] != "failed" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
