"""tests/guard.py: a test that takes all memory, dies, hangs or leaves a process behind fails, and ends the run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import guard

REPOSITORY = Path(__file__).parents[1]
CONFTEST = (
    "from tests.guard import Guard\n\ndef pytest_configure(config): config.pluginmanager.register(Guard(config))\n"
)
SLOW = "import time\n\ndef test_slow(): time.sleep(100)\n"
DIES = "import os, signal\n\ndef test_dies(): os.kill(os.getpid(), signal.SIGKILL)\n"
HANGS = "import time\n\ndef test_hangs(): time.sleep(100)\n"
LEAVES = """
import os, subprocess, sys, time

def test_leaves():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
    if os.fork() == 0:
        os.setsid()
        time.sleep(100)
        os._exit(0)
"""


def run(folder: Path, files: dict[str, str], *words: str) -> tuple[int, str]:
    """Exit code and output of pytest on these files, and not of this run."""
    for name, text in {"conftest.py": CONFTEST, **files}.items():
        (folder / name).write_text(text)
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_") and name != guard.RUN
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words], cwd=folder, timeout=60, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("file", "words"),
    [(DIES, ()), (HANGS, ("-o", "faulthandler_timeout=2", "-o", "faulthandler_exit_on_timeout=true"))],
)
def test_a_worker_that_dies_ends_the_run(file: str, words: tuple[str, ...], tmp_path: Path) -> None:
    began = time.monotonic()
    code, out = run(tmp_path, {"test_a.py": file, "test_b.py": SLOW}, "-n", "2", "--dist", "loadfile", *words)
    name = "test_a.py::test_dies" if file is DIES else "test_a.py::test_hangs"
    assert code != 0 and f"a worker died in {name}" in out and f"FAILED {name}" in out and "replacing" not in out
    assert time.monotonic() - began < 40


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("-n", "1")])
def test_what_is_left_over_is_named_and_killed(words: tuple[str, ...], tmp_path: Path) -> None:
    code, out = run(tmp_path, {"test_a.py": LEAVES}, *words)
    _, _, named = out.partition("processes of this run were left over, and have been killed:\n")
    pids = [int(line.split()[1].rstrip(":")) for line in named.splitlines() if line.startswith("pid ")]
    assert code == 1 and len(pids) == 2, out
    assert not any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="CUDA reserves more than it uses: no cap")
def test_memory_has_a_cap() -> None:
    code = f"from tests.guard import cap_memory; cap_memory(); bytearray({guard.CAP_GIB + 1} << 30)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and "MemoryError" in done.stderr
