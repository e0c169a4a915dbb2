"""One job of the command line in its run directory, and the end of a multirun."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, read_write

from moecompile import waiting
from moecompile.atomic import UNWRITABLE
from moecompile.compose.typed import plain, save_resolved, to_config, unresolved
from moecompile.errors import ConfigError, MoecompileError, UserError
from moecompile.named_code import load_plugins
from moecompile.rundir import (
    FAILURES,
    OVERRIDES,
    RESOLVED,
    contents,
    held,
    is_run,
    kept_apart,
    others_in,
    output_dir,
    resume_hint,
)
from moecompile.schema import Config, validate


def run_job(
    cfg: DictConfig,
    run: Callable[[Config, Path], int],
    prepare: Callable[[Config, Path], Config],
    check: Callable[[Config], None],
) -> int:
    """Runs one job in its run directory and returns its exit code; raises only if a signal ends a multirun."""
    job = HydraConfig.get()
    run_dir, multirun = Path(job.runtime.output_dir), job.mode == RunMode.MULTIRUN
    overrides = unresolved(job.overrides.task)
    if multirun:
        print(f"job {job.job.num}: {' '.join(overrides)}", flush=True)
    debug, message = asks_debug(overrides), ""
    try:
        with held(run_dir), _used(run_dir, multirun=multirun), kept_apart(run_dir):
            code = _in_directory(cfg, overrides, run_dir, run, prepare, check)
    except Exception as error:
        debug = debug or plain(cfg).get("debug") is True
        code, message = report(error, debug=debug), " ".join(str(error).split())
        if isinstance(getattr(error, "number", None), int):  # ended by a signal
            if _task_of(cfg) == "train":
                print(resume_hint(overrides, run_dir), file=sys.stderr, flush=True)
            if multirun:
                raise SystemExit(code) from None
    if code and multirun:
        with Path(job.sweep.dir, FAILURES).open("a", encoding="utf-8") as file:
            file.write(f"{job.job.num}\t{code}\t{message}\n")
    return code


def _task_of(cfg: DictConfig) -> str:
    name = plain(cfg)["task"]["name"]
    return str(getattr(name, "value", name))


def _in_directory(
    cfg: DictConfig, overrides: list[str], run_dir: Path,
    run: Callable[[Config, Path], int], prepare: Callable[[Config, Path], Config], check: Callable[[Config], None],
) -> int:  # fmt: skip
    """Writes the config, checks it and runs it."""
    # Read by the report and by the table of a sweep.
    (output_dir(run_dir) / OVERRIDES).write_text("\n".join(overrides), encoding="utf-8")
    config = to_config(cfg, overrides)
    load_plugins(config.plugins, only=True)  # what they register is known to what follows
    config = prepare(config, run_dir)
    save_resolved(config, output_dir(run_dir) / RESOLVED)
    validate(config)
    check(config)
    return run(config, run_dir)


def report(error: Exception, *, debug: bool) -> int:
    """Prints one message, with the traceback if `debug` or if the error is a defect; returns the exit code."""
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        error = UserError(
            f"{error.filename or 'the run directory'}: {error.strerror}. A run directory must be one that can be "
            "written, give another one: hydra.run.dir=FOLDER, for a sweep hydra.sweep.dir=FOLDER."
        )
    is_ours = isinstance(error, MoecompileError)
    waiting.done()
    if isinstance(error, MoecompileError) and error.reported:
        return error.exit_code
    if debug or not is_ours:
        traceback.print_exception(error)
    if is_ours:
        prefix = "" if hasattr(error, "number") else "error: "
        print(f"{prefix}{error}", file=sys.stderr, flush=True)
    return error.exit_code if isinstance(error, MoecompileError) else 1


def asks_debug(overrides: Iterable[str]) -> bool:
    return any(re.fullmatch(r"\+{0,2}debug=(true|yes|on|1)", item, re.IGNORECASE) for item in overrides)


@contextmanager
def _used(run_dir: Path, *, multirun: bool) -> Iterator[None]:
    """Removes a new run directory with no results; a crash keeps its config, a multirun the rows of its table."""
    is_new = output_dir(run_dir) == run_dir and not multirun
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError | OSError) and is_new:
            remove_unused(run_dir, keep=RunFolders.existing)
        raise
    if is_new:
        remove_unused(run_dir, keep=RunFolders.existing)


def remove_unused(folder: Path, *, keep: Path) -> None:
    """Removes a run directory that has nothing but its config, and its empty parents below `keep`.

    That is the case after a mistake in the config, and on ranks other than 0 if torchrun or SLURM has started them.
    """
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - {RESOLVED, OVERRIDES, "multirun.yaml"}:
        return
    for path in folder.iterdir():
        path.unlink()
    with suppress(OSError):  # not empty
        while folder != keep:
            folder.rmdir()
            folder = folder.parent


class RunFolders(Callback):
    """Hydra's callback around a run: keeps track of directories, and ends a multirun with a table and the exit code."""

    existing: ClassVar[Path]  # the part of the directory that existed before the run
    sweep: ClassVar[Path | None] = None
    summarize: ClassVar[Callable[[Path], None]]  # called at the end of a sweep

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Records what exists before the run directory is created, and creates it."""
        RunFolders.existing = _existing(config.hydra.run.dir)
        _create(Path(config.hydra.run.dir), "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Fixes the sweep directory: jobs that sweep `recipe` or `name` would each compute a different one."""
        given = dict(word.split("=", 1) for word in config.hydra.overrides.hydra if "=" in word)
        if (folder := given.get("hydra.run.dir")) and "hydra.sweep.dir" not in given:
            refused = ConfigError("hydra.run.dir", folder, "is not of a sweep", f"Use hydra.sweep.dir={folder}")
            sys.exit(report(refused, debug=False))
        RunFolders.existing = _existing(config.hydra.sweep.dir)
        _create(Path(config.hydra.sweep.dir), "hydra.sweep.dir")
        _check_sweep(Path(config.hydra.sweep.dir), list(config.hydra.overrides.task))
        RunFolders.sweep = Path(config.hydra.sweep.dir).absolute()
        quoted = str(RunFolders.sweep).replace("\\", "\\\\").replace("'", "\\'")
        with read_write(config.hydra):
            config.hydra.sweep.dir = str(RunFolders.sweep)
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the table; exits if a job failed (according to a file, because jobs may run in other processes)."""
        sweep = Path(config.hydra.sweep.dir)
        failures = sweep / FAILURES
        codes = [int(line.split("\t")[1]) for line in failures.read_text().splitlines()] if failures.exists() else []
        try:
            RunFolders.summarize(sweep)
        except Exception as error:  # Hydra would turn it into a warning
            codes.append(report(error, debug=False))
        if codes:
            sys.exit(max(codes))


def _create(folder: Path, key: str) -> None:
    """Creates a directory, or ends the process with one message; Hydra would turn an error into a warning."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = "" if error.filename in (None, str(folder)) else f" ({error.filename})"
        refused = ConfigError(key, folder, f"cannot be created: {error.strerror}{where}", "Give another directory")
        sys.exit(report(refused, debug=False))


def _check_sweep(folder: Path, overrides: Sequence[str]) -> None:
    """Ends the process if the directory has other files, or a sweep that is not resumed."""
    if not (folder / "multirun.yaml").exists():
        names = contents(folder)
        if names and not any(path.is_dir() and is_run(path) for path in folder.iterdir()):
            rule = f"holds {others_in(names)}, and no sweep"
            refused = ConfigError("hydra.sweep.dir", folder, rule, "Use a new directory, or an empty one")
            sys.exit(report(refused, debug=False))
        return
    if not any(re.match(r"\+{0,2}trainer\.resume=", word) for word in overrides):
        refused = ConfigError(
            "hydra.sweep.dir", folder, "holds another sweep",
            "Use another directory, or resume its jobs with trainer.resume=auto",
        )  # fmt: skip
        sys.exit(report(refused, debug=False))
    (folder / FAILURES).unlink(missing_ok=True)


def _existing(folder: str) -> Path:
    path = Path(folder).absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())
