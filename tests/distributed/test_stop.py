"""Ctrl-C, SIGTERM, a batch system's SIGUSR1: the step is saved, and the printed command goes on as if nothing happened."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from moecompile.checkpoint import folders
from tests.distributed.resume_job import TINY, losses
from tests.forked import Program, python, ranks_of

REPOSITORY = Path(__file__).parents[2]
RUN = [*TINY, "mesh=cpu_1x2", "trainer.progress_bar=true"]
STEPS = 400
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]

pytestmark = pytest.mark.slow


def start(run_dir: Path, *overrides: str, before: tuple[str, ...] = ()) -> Program:
    words = [*before, "-m", "moecompile", *RUN, f"hydra.run.dir={run_dir}", *overrides]
    return Program(*words, cwd=REPOSITORY, merged=True)


def read_until(process: Program, text: str) -> str:
    """What the process prints, to the first line that begins with `text`."""
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith(text):
            return said
    raise AssertionError(f"{text!r} did not come: {said}")


def rest(process: Program) -> tuple[int, str]:
    said, _ = process.communicate(240)
    return process.wait(), said


def printed_command(said: str) -> str:
    found = re.search(r"^resume with:  (.*)$", said, re.MULTILINE)
    assert found, said
    return found[1]


@pytest.mark.parametrize("how", ["ctrl_c", "sigterm", "sigusr1", "torchrun"])
def test_the_step_is_saved_and_the_command_goes_on(how: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "it's a run"
    number = {"ctrl_c": signal.SIGINT, "sigusr1": signal.SIGUSR1}.get(how, signal.SIGTERM)
    quoted = Path(f"'{run_dir}'".replace("it's", r"it\'s"))
    process = start(quoted, f"trainer.max_steps={STEPS}", before=tuple(TORCHRUN) if how == "torchrun" else ())
    read_until(process, "step 2/")
    if how == "ctrl_c":  # as a terminal does
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid, number)
    code, said = rest(process)
    assert code == (1 if how == "torchrun" else 128 + number), said  # torchrun has a code of its own
    checkpoints = folders.checkpoints_of(run_dir)
    (step,) = folders.steps(checkpoints)
    assert f"ended by {number.name}: step {step} is saved\n" in said and 2 <= step < STEPS
    assert not list(checkpoints.glob("*.tmp")) and not (run_dir / ".pending").exists()
    name, *words = shlex.split(printed_command(said))
    assert name in ("python", sys.executable)
    more = ["balance.losses.z=0.5"] if how == "sigterm" else []  # may change, and is told
    again = python(*words, f"trainer.max_steps={step + 2}", *more, cwd=REPOSITORY)
    assert again.returncode == 0, again.stderr
    assert ("losses of the routers were" in again.stdout) is bool(more)
    assert f"going on from step {step} of " in again.stdout
    shown = re.findall(r"^step (\d+)/(\d+) ", again.stdout, re.MULTILINE)
    assert shown == [(str(step + 1), str(step + 2)), (str(step + 2), str(step + 2))]
    assert list(losses(run_dir)) == list(range(1, step + 3))


def test_before_the_first_step_it_ends_at_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir)
    deadline = time.monotonic() + 240
    while not (run_dir / "logs" / "rank_1.log").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    code, said = rest(process)
    assert code == 130 and "ended by SIGINT: nothing was saved\n" in said
    assert printed_command(said).endswith("trainer.resume=auto")
    assert not (run_dir / "checkpoints").exists()


def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    """A rank is stopped, so that no step ever ends."""
    run_dir = tmp_path / "run"
    process = start(run_dir, f"trainer.max_steps={STEPS}", "trainer.save_interval=1")
    read_until(process, "step 2/")
    pids = list(ranks_of(tmp_path).values())
    assert len(pids) == 2
    os.kill(pids[-1], signal.SIGSTOP)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    code, said = rest(process)
    assert code == 130, said
    assert folders.latest(folders.checkpoints_of(run_dir)) is not None
    assert not any(Path("/proc", str(pid)).exists() for pid in pids)
