"""Processes of tests, forked from one that has imported what they need: torch and Lightning take seconds to import.

`python("-m", "moecompile", ..., cwd=folder)` is `python -m moecompile ...` in all but that time: a session, an
environment, a working directory, arguments and output of its own. Its ranks are forked from the same process, and so are
those of torchrun (tests/cluster/test_torchrun.py has real ones).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import forkserver, reduction
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from moecompile.runtime.ranks import worker_variables

REPOSITORY = Path(__file__).parents[1]
_PRELOAD = (
    "moecompile.runtime.fork_server",
    "pytest",
    "torch.fx.experimental.symbolic_shapes",
    "moecompile.compose",
    "moecompile.tasks.inputs",
    "moecompile.tasks.plan",
    "moecompile.tasks.compile",
    "moecompile.tasks.ranks.train",
    "moecompile.tasks.ranks.verify",
    "transformers.modeling_utils",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "transformers.models.mixtral.modeling_mixtral",
    "tests.preloaded",
)
NEW_WORKERS = "TESTS_NEW_WORKERS"
"""Environment variable: the workers of torchrun are not forked, but start as Python does."""
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(list(_PRELOAD))


def start(process: ForkServerProcess) -> ForkServerProcess:
    """Starts a process of `context`; the fork server's memory is as a rank's."""
    before = dict(os.environ)
    os.environ.update(worker_variables(1, one_machine=True))
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return process


class Forked:
    """`python WORDS` in `cwd`, as a `subprocess.Popen` of it: a module after `-m`, or a program; `-u` may be before."""

    def __init__(self, words: Sequence[str], cwd: Path, variables: Mapping[str, str], outputs: _Outputs) -> None:
        self._process = start(context.Process(target=_run, args=(tuple(words), cwd, variables, outputs)))
        assert self._process.pid is not None
        self.args, self.pid = words, self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_s: float | None = None) -> int:
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            assert timeout_s is not None
            raise subprocess.TimeoutExpired(self.args, timeout_s)
        return self._process.exitcode


class Program(Forked):
    """One whose output can be read.

    Args:
        environ: beside or instead of this process's. merged: stderr goes where stdout goes.
    """

    def __init__(
        self, *words: str, cwd: Path, environ: Mapping[str, str] | None = None, merged: bool = False
    ) -> None:  # fmt: skip
        variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), **(environ or {})}
        (out, to_out), (err, to_err) = os.pipe(), os.pipe()
        outputs = _Outputs(to_out, to_out if merged else to_err)
        super().__init__(words, cwd, variables, outputs)
        for descriptor in (to_out, to_err):
            os.close(descriptor)
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self.stdout.close()
        self.stderr.close()

    def communicate(self, timeout_s: float) -> tuple[str, str]:
        """What is printed until its end; after the timeout it is killed, with its ranks."""
        with self.stdout, self.stderr, ThreadPoolExecutor(2) as pool:
            printed = [pool.submit(file.read) for file in (self.stdout, self.stderr)]
            try:
                self.wait(timeout_s)
            except subprocess.TimeoutExpired as late:
                with suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                late.output, late.stderr = (each.result() for each in printed)
                raise
            out, err = (each.result() for each in printed)
        return out, err


def python(
    *words: str, cwd: Path, timeout_s: float = 480, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, as `subprocess.run` does."""
    program = Program(*words, cwd=cwd, environ=environ)
    out, err = program.communicate(timeout_s)
    return subprocess.CompletedProcess(words, program.wait(), out, err)


def run(
    command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, stdout: Any = None, **_: Any
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Instead of `subprocess.run` in a program that starts Python; stdout: a file that gets all that is printed."""
    assert command[0] == sys.executable
    done = python(*command[1:], cwd=cwd or Path.cwd(), environ=env)
    if stdout is not None:
        stdout.write(done.stdout + done.stderr)
    return done


class _Outputs:
    """Descriptors that become stdout and stderr of the process that is started with it."""

    def __init__(self, *descriptors: int) -> None:
        self.descriptors = descriptors

    def __reduce__(self) -> Any:
        return _take_outputs, tuple(reduction.DupFd(each) for each in self.descriptors)


def _take_outputs(*outputs: Any) -> _Outputs:
    for number, output in enumerate(outputs, start=1):
        descriptor = output.detach()
        os.dup2(descriptor, number)
        os.close(descriptor)
    return _Outputs(1, 2)


def ranks_of(folder: Path) -> dict[int, int]:
    """Rank -> process id, of the living ranks whose run directory is in `folder`: each holds its log open."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            log = path.readlink()
            if log.is_relative_to(folder) and log.parent.name == "logs" and log.stem.startswith("rank_"):
                found[int(log.stem.removeprefix("rank_"))] = int(path.parts[2])
    return found


def _run(words: tuple[str, ...], cwd: Path, variables: Mapping[str, str], outputs: _Outputs) -> None:
    os.setsid()
    multiprocessing.set_start_method(None, force=True)
    forkserver.ensure_running = forkserver._forkserver.ensure_running = _is_running
    is_unbuffered = words[0] == "-u"
    words, buffering = words[is_unbuffered:], 1 if is_unbuffered else -1
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(variables)
    time.tzset()
    os.chdir(cwd)
    sys.path[1:1] = [path for path in variables["PYTHONPATH"].split(os.pathsep) if path not in sys.path]
    with suppress(BrokenPipeError):
        code = _code(words)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _is_running() -> None:
    """Instead of a check that would start a second fork server: this process's own is alive."""


def _fork_workers() -> None:
    """Torchrun's workers are forked as well: `python -u WORDS`, whose output goes where its own goes, or to its files."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    def start_worker(handler: Any, command: tuple[str, ...], variables: dict[str, str]) -> Forked:
        out, err = (file.fileno() if file else number for number, file in ((1, handler._stdout), (2, handler._stderr)))
        return Forked(command[1:], Path.cwd(), variables, _Outputs(out, err))

    SubprocessHandler._popen = start_worker


def _code(words: tuple[str, ...]) -> int:
    """Runs the program as `__main__`, and returns its exit code."""
    try:
        if words[:2] == ("-m", "torch.distributed.run") and NEW_WORKERS not in os.environ:
            _fork_workers()
        if words[0] == "-m":
            sys.argv = ["-m", *words[2:]]
            sys.path[0] = os.getcwd()
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            sys.path[0] = str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0
