"""Processes of tests, forked from one that has imported what they need: torch and Lightning take seconds to import.

`python("-m", "moecompile", ..., cwd=folder)` is `python -m moecompile ...` in all but that time: a session, an
environment, a working directory, arguments and output of its own. Its ranks are forked from the same process.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from moecompile.runtime.ranks import worker_variables

REPOSITORY = Path(__file__).parents[1]
_PRELOAD = (
    "moecompile.runtime.fork_server",
    "pytest",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.launcher.api",
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
)
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


def python(
    *words: str, cwd: Path, timeout_s: float = 480, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python WORDS` in `cwd`: a module after `-m`, or a program. environ: beside or instead of this process's."""
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), **(environ or {})}
    with tempfile.TemporaryDirectory(prefix="output_") as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = start(context.Process(target=_run, args=(words, cwd, variables, outputs)))
        process.join(timeout_s)
        is_late = process.is_alive()
        if is_late and process.pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        out, err = (path.read_text() if path.exists() else "" for path in outputs)
        if is_late:
            raise subprocess.TimeoutExpired(words, timeout_s, out, err)
        assert process.exitcode is not None
        return subprocess.CompletedProcess(words, process.exitcode, out, err)


def ranks_of(folder: Path) -> dict[int, int]:
    """Rank -> process id, of the living ranks whose run directory is in `folder`: each holds its log open."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            log = path.readlink()
            if log.is_relative_to(folder) and log.parent.name == "logs" and log.stem.startswith("rank_"):
                found[int(log.stem.removeprefix("rank_"))] = int(path.parts[2])
    return found


def _run(words: tuple[str, ...], cwd: Path, variables: Mapping[str, str], outputs: list[Path]) -> None:
    os.setsid()
    forkserver.ensure_running = forkserver._forkserver.ensure_running = _is_running
    for number, path in enumerate(outputs, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(variables)
    time.tzset()
    os.chdir(cwd)
    with suppress(BrokenPipeError):
        code = _code(words)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _is_running() -> None:
    """Instead of a check that would start a second fork server: this process's own is alive."""


def _code(words: tuple[str, ...]) -> int:
    """Runs the program as `__main__`, and returns its exit code."""
    try:
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
