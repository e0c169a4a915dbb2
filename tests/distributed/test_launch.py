"""The launcher: success, every way to fail, signals, torchrun and SLURM in place."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from moecompile.errors import RankFailure
from moecompile.runtime import failures
from moecompile.runtime.launch import GRACE_S, _passing_signals_to, launch
from tests import forked
from tests.forked import ranks_of

JOB = "tests.distributed.launched_job"
PROGRAM = [sys.executable, "-m", "tests.distributed.launcher_program"]
pytestmark = pytest.mark.usefixtures("from_the_repository")


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run directory that no process holds on to afterwards."""
    yield tmp_path / "run"
    _wait_for(lambda: not ranks_of(tmp_path), "ranks were left behind", seconds=2)


def _launch(world_size: int, run_dir: Path) -> None:
    launch(world_size, run_dir, module=JOB, threads=1)


def _wait_for(condition: Callable[[], Any], what: str, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def _run(command: list[str], environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env={**os.environ, **(environ or {})}, capture_output=True, text=True, timeout=90, check=False
    )


# -- started by the program itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "world_size", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_success(world_size: int, run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    environ, handlers = dict(os.environ), {number: signal.getsignal(number) for number in (2, 15)}
    _launch(world_size, run_dir)
    total = world_size * (world_size + 1) // 2
    done = {path.name: path.read_text() for path in run_dir.glob("done_*")}
    assert done == {f"done_{rank}": f"{total * world_size} 1" for rank in range(world_size)}
    output = capfd.readouterr()
    assert output.out == "rank 0: no terminal\n"
    assert output.err == ""
    assert not failures.errors_dir(run_dir).exists()
    assert dict(os.environ) == environ
    assert {number: signal.getsignal(number) for number in (2, 15)} == handlers


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("raise", "rank 3 of 4 failed: ZeroDivisionError: in the middle of it (see {errors}/rank_3.txt)"),
        pytest.param("exit", "rank 3 of 4 failed: the process ended with exit code 3", marks=pytest.mark.slow),
        ("kill", "rank 3 of 4 failed: killed by SIGKILL (the machine may have run out of memory)"),
    ],
)
def test_a_failing_rank_ends_the_run_and_is_named(
    mode: str, message: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODE", mode)
    with pytest.raises(RankFailure) as caught:
        _launch(4, run_dir)
    assert time.time() - _last_start(run_dir) < 25  # a collective would wait for 30 s
    assert str(caught.value) == message.format(errors=run_dir / "errors")
    assert caught.value.exit_code == 1
    assert "Traceback" not in capfd.readouterr().err
    if mode == "raise":
        assert "ZeroDivisionError: in the middle of it\nsecond line" in (run_dir / "errors/rank_3.txt").read_text()
        assert "launched_job.py" in caught.value.__notes__[0]
        assert json.loads((run_dir / "errors/rank_3.json").read_text())["exit_code"] == 1


@pytest.mark.slow
def test_a_mistake_is_told_once_in_its_own_words(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODE", "mistake")
    result = _run([*PROGRAM, "2", str(run_dir)])
    assert (result.returncode, result.stderr) == (2, "error: routing.top_k=9: must be at most 8. Use 8.\n")
    monkeypatch.setenv("MODE", "succeed")
    _launch(1, run_dir)  # the same directory again: what an earlier run left is not taken for a failure
    assert list((run_dir / "errors").iterdir()) == []


@pytest.mark.slow
def test_leaving_early_is_not_success(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODE", "leave")
    with pytest.raises(RankFailure, match="rank 0 of 1 failed: the process ended with exit code 143"):
        _launch(1, run_dir)


@pytest.mark.slow
def test_peers_that_ignore_sigterm_are_ended(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODE", "deaf_peers")
    with pytest.raises(RankFailure, match="rank 1 of 2 failed: ZeroDivisionError"):
        _launch(2, run_dir)
    assert time.time() - _last_start(run_dir) < GRACE_S + 45  # they would sleep for 100 s


@pytest.mark.slow
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_ending_the_launcher_ends_its_ranks(number: signal.Signals, exit_code: int, run_dir: Path) -> None:
    environ = {**os.environ, "MODE": "hang"}
    with subprocess.Popen([*PROGRAM, "2", str(run_dir)], env=environ, stderr=subprocess.DEVNULL) as process:
        _wait_for(lambda: len(list(run_dir.glob("started_*"))) == 2, "the ranks did not start", seconds=60)
        process.send_signal(number)
        assert process.wait(GRACE_S + 5) == exit_code


@pytest.mark.slow
def test_a_second_signal_is_heard_while_the_launcher_waits_for_a_rank(run_dir: Path) -> None:
    """Rank 0 has ended, and rank 1 is stopped, which would be killed after two times `GRACE_S`."""
    environ = {**os.environ, "MODE": "hang"}
    with subprocess.Popen([*PROGRAM, "2", str(run_dir)], env=environ, stderr=subprocess.DEVNULL) as process:
        _wait_for(lambda: len(list(run_dir.glob("started_*"))) == 2, "the ranks did not start", seconds=60)
        os.kill(ranks_of(run_dir)[1], signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        _wait_for(lambda: 0 not in ranks_of(run_dir), "rank 0 goes on", seconds=GRACE_S)
        process.send_signal(signal.SIGINT)
        assert process.wait(GRACE_S) == 130


def test_signals_are_not_passed_on_to_processes_of_the_caller() -> None:
    process = forked.start(forked.context.Process(target=time.sleep, args=(60,)))
    try:
        with _passing_signals_to([]) as asked:
            for _ in range(2):  # the second one kills ranks
                os.kill(os.getpid(), signal.SIGINT)
        assert asked == [signal.SIGINT] * 2
        process.join(0.5)
        assert process.is_alive()
    finally:
        process.kill()
        process.join()


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [True, False])
def test_a_terminal_that_closes_ends_ranks_unless_nohup_is_used(ignored: bool, run_dir: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with subprocess.Popen([*PROGRAM, "2", str(run_dir)], env={**os.environ, "MODE": "sleep"}) as process:
            _wait_for(lambda: len(list(run_dir.glob("started_*"))) == 2, "the ranks did not start", seconds=60)
            process.send_signal(signal.SIGHUP)
            assert process.wait(60) == (0 if ignored else 128 + signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_terminal_stays_a_terminal_for_rank_0(run_dir: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen([*PROGRAM, "2", str(run_dir)], stdout=theirs, stderr=theirs) as process:
        assert process.wait(60) == 0
    assert os.read(ours, 1000).decode() == "rank 0: a terminal\r\n"
    os.close(ours)
    os.close(theirs)
    assert (run_dir / "logs" / "rank_1.log").read_text() == "rank 1: no terminal\n"


def _last_start(run_dir: Path) -> float:
    return max(float(path.read_text().split()[1]) for path in run_dir.glob("started_*"))


def test_of_several_consequences_the_hung_rank_is_named(tmp_path: Path) -> None:
    """Rank 2 hangs; one peer gives up, and another one sees that connection break and is the first to tell."""
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    late = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation")
    closed = RuntimeError("Application timeout caused pair closure")
    for rank, error in ((0, gone), (1, late), (3, closed)):
        failures.record(error, tmp_path, rank)
    told = str(failures.first_error(tmp_path, 4, {0: 1, 1: 1, 3: 1, 2: -signal.SIGKILL}))
    assert told.startswith("rank 2 of 4 hangs: rank 1 has waited for an answer for trainer.timeout_s (")
    failures.record(ValueError("its own"), tmp_path, 2)
    assert str(failures.first_error(tmp_path, 4, {})).startswith("rank 2 of 4 failed: ValueError: its own")


def test_a_killed_rank_is_not_taken_for_a_hung_one(tmp_path: Path) -> None:
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    failures.record(gone, tmp_path, 0)
    told = str(failures.first_error(tmp_path, 2, {1: -signal.SIGKILL, 0: 1}))
    assert told == "rank 1 of 2 failed: killed by SIGKILL (the machine may have run out of memory)"
