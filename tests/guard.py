"""What keeps tests from taking the machine with them: a cap of memory, an end when a worker dies, nothing left over.

A bound in seconds is pytest's own (`faulthandler_timeout` in pyproject.toml): a test that reaches it ends its process,
with the stacks of all threads.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import pytest

CAP_GIB = 8
"""Private memory of each process of tests, each of its ranks included. A model of default widths (7B) needs 28."""
RUN = "MOECOMPILE_TESTS_RUN"
"""Environment variable: the process id of the pytest that all processes of a run come from."""
_GRACE_S = 5.0


def cap_memory() -> None:
    """Beyond it an allocation fails, in the test that makes it. CUDA reserves more than it uses, so GPUs have no cap."""
    if Path("/dev/nvidiactl").exists():
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    cap = CAP_GIB << 30
    resource.setrlimit(resource.RLIMIT_DATA, (cap if hard == resource.RLIM_INFINITY else min(cap, hard), hard))


class Guard:
    """A plugin of pytest. It ends a run of xdist at the first worker that dies: xdist would start another, and may then
    wait forever. A run that leaves processes behind fails, and they are named."""

    def __init__(self, config: pytest.Config) -> None:
        cap_memory()
        os.environ.setdefault(RUN, str(os.getpid()))  # workers have that of the first process
        self.config = config
        if getattr(config.option, "maxworkerrestart", "0") is None:
            config.option.maxworkerrestart = "0"

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        """Other workers are not waited for: they are killed."""
        self.config.hook.pytest_runtest_logreport(report=report)
        why = "out of memory, a crash, or longer than faulthandler_timeout"
        raise pytest.Session.Interrupted(f"a worker died in {crashitem}: {why}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """xdist has ended its workers by then."""
        if hasattr(self.config, "workerinput"):
            return
        if found := left_over(os.environ[RUN]):
            lines = [f"pid {pid}: {command}" for pid, command in found.items()]
            print("\nprocesses of this run were left over, and have been killed:", *lines, sep="\n", file=sys.stderr)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def left_over(run: str, grace_s: float = _GRACE_S) -> dict[int, str]:
    """Processes of a run that outlive it, id -> command, `grace_s` after it has ended; they are killed."""
    deadline = time.monotonic() + grace_s
    while (found := dict(_of_run(run))) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


def _of_run(run: str) -> Iterator[tuple[int, str]]:
    """Those that began with its environment, and forks of its first process, which have that one's command."""
    own = _ancestors() | {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}  # type: ignore[attr-defined]
    mine = Path("/proc/self/cmdline").read_bytes()
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with suppress(OSError):
            command = (folder / "cmdline").read_bytes()
            is_of_run = f"{RUN}={run}".encode() in (folder / "environ").read_bytes().split(b"\0")
            is_fork = command == mine and _began(folder) > _began(Path("/proc/self"))
            if pid not in own and command and (is_of_run or is_fork):
                yield pid, command.replace(b"\0", b" ").decode(errors="replace").strip()


def _ancestors() -> set[int]:
    """This process, and those that started it."""
    found, pid = set(), os.getpid()
    while pid > 0:
        found.add(pid)
        pid = int(_stat(Path(f"/proc/{pid}"))[1])
    return found


def _began(folder: Path) -> int:
    return int(_stat(folder)[19])


def _stat(folder: Path) -> list[str]:
    """Fields of `/proc/PID/stat` after the name, which may hold spaces."""
    return (folder / "stat").read_text().rpartition(")")[2].split()
