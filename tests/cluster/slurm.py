"""A real SLURM for tests, brought up by up.sh: four nodes in namespaces of this machine."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "ip", "nsenter", "unshare")


def why_not() -> str:
    """Why there can be no cluster on this machine; empty if there can."""
    if os.geteuid():
        return "namespaces need root"
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    return f"there is no {', '.join(missing)}: .ci/run installs them" if missing else ""


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """SLURM, until the end of the context.

    Raises:
        RuntimeError: it does not come up, or leaves a process behind.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: munge's socket is in it
    try:
        up = subprocess.run([HERE / "up.sh", folder], capture_output=True, text=True, timeout=60)
        if up.returncode:
            raise RuntimeError(f"{up.stdout}\n{up.stderr}")
        yield Cluster(folder)
    finally:
        subprocess.run([HERE / "down.sh", folder], timeout=60, check=True)
        if left := processes(str(folder)):
            raise RuntimeError(f"processes of SLURM were left behind: {left}")
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Cluster:
    """A SLURM that runs."""

    folder: Path

    def run(self, *command: object, timeout: float = 120, **environ: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of SLURM, or moecompile, in the checkout."""
        return subprocess.run(
            [str(word) for word in command], cwd=REPOSITORY, env=self._environment(environ), capture_output=True,
            text=True, timeout=timeout,
        )  # fmt: skip

    def submit(self, run_dir: Path, *overrides: str, **environ: str) -> str:
        """Submits a run by `task=submit`, and returns the id of its job."""
        command = (sys.executable, "-m", "moecompile", "task=submit", "launcher=slurm", *overrides)
        done = self.run(*command, f"hydra.run.dir='{run_dir}'", **environ)
        found = re.match(r"job (\d+) is submitted: ", done.stdout)
        assert done.returncode == 0 and found, done.stdout + done.stderr
        return found[1]

    def shown(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "show", "job", job).stdout))

    def end(self, job: str, seconds: float = 200) -> dict[str, str]:
        """Waits until a job has ended, and returns what SLURM says then."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(lambda: self.shown(job)["JobState"] in ended, f"job {job} did not end", seconds)
        return self.shown(job)

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        own = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        return {**kept, **own, **more}


def wait_for(condition: Callable[[], Any], what: str, seconds: float) -> None:
    """Waits for a condition.

    Raises:
        AssertionError: it does not hold in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def processes(text: str) -> list[tuple[int, list[str]]]:
    """(process id, words) of the processes that have `text` in a word of their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = [word.decode(errors="replace") for word in path.read_bytes().split(b"\0")]
        except OSError:
            continue
        if any(text in word for word in words):
            found.append((int(path.parent.name), words))
    return found


def environment(pid: int) -> dict[str, str]:
    """The environment variables with which a process was started."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        return dict(word.partition("=")[::2] for word in text.split("\0"))
    return {}
