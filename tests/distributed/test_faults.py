"""What goes wrong in a run from the command line: one message, no process left, checkpoints whole, and it goes on."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import soak
from moecompile.checkpoint import folders
from moecompile.rundir import PENDING, PROFILE
from tests.distributed.resume_job import TINY, losses
from tests.forked import Program, ranks_of

REPOSITORY = Path(__file__).parents[2]
STEPS = 12
COMMON = [*TINY, f"trainer.max_steps={STEPS}", "trainer.save_interval=2", "mesh=cpu_1x2"]


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield
    deadline = time.monotonic() + 30
    while left := ranks_of(tmp_path_factory.getbasetemp()):
        assert time.monotonic() < deadline, f"ranks were left behind: {left}"
        time.sleep(0.1)


def wait_for(condition: Callable[[], Any], seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return value


def start(run_dir: Path, *overrides: str, environ: dict[str, str] | None = None) -> Program:
    words = ["-m", "moecompile", *COMMON, f"hydra.run.dir={run_dir}", *overrides]
    return Program(*words, cwd=REPOSITORY, environ=environ)


def finish(process: Program, seconds: float = 300) -> tuple[int, str]:
    """Exit code and what was said on stderr."""
    _, error = process.communicate(seconds)
    return process.wait(), error


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    code, error = finish(start(run_dir))
    assert code == 0, error
    return run_dir


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_nothing_is_lost(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with start(run_dir, "trainer.max_restarts=1") as process:
        wait_for(lambda: folders.steps(folders.checkpoints_of(run_dir))[-1:] >= [4])
        os.kill(ranks_of(run_dir)[1], signal.SIGKILL)
        code, error = finish(process)
    assert code == 0, error
    assert re.fullmatch(r"rank 1 of 2 failed: killed by SIGKILL \(the machine .*memory\)\nrestart 1 of 1\n", error)
    assert losses(run_dir) == losses(whole) and len(losses(whole)) == STEPS


@pytest.mark.slow
def test_a_killed_stage_is_started_again_and_trains_what_one_stage_does(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with start(run_dir, "mesh.pp=2", "mesh.ep=1", "trainer.max_restarts=1") as process:
        wait_for(lambda: folders.steps(folders.checkpoints_of(run_dir))[-1:] >= [4])
        os.kill(ranks_of(run_dir)[1], signal.SIGKILL)
        code, error = finish(process)
    assert code == 0, error
    assert re.fullmatch(r"rank 1 of 2 failed: killed by SIGKILL \(the machine .*memory\)\nrestart 1 of 1\n", error)
    assert losses(run_dir) == pytest.approx(losses(whole), abs=1e-5)
    assert json.loads((run_dir / PROFILE).read_text())["step_seconds"] > 0


@pytest.mark.slow
def test_a_rank_that_is_killed_before_its_first_step_begins_where_it_was_told_to(whole: Path, tmp_path: Path) -> None:
    """Not at the latest checkpoint of the run before, which is still there."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir, symlinks=True)
    steps = folders.steps(folders.checkpoints_of(whole))
    earlier = f"trainer.resume={run_dir}/checkpoints/step-{steps[0]}"
    with start(run_dir, earlier, "trainer.max_restarts=1") as process:
        wait_for((run_dir / PENDING / "plan.yaml").exists)
        assert folders.steps(folders.checkpoints_of(run_dir)) == steps
        os.kill(ranks_of(run_dir)[1], signal.SIGKILL)
        code, error = finish(process)
    assert code == 0 and "restart 1 of 1" in error, error
    assert losses(run_dir) == losses(whole)
    assert folders.steps(folders.checkpoints_of(run_dir / "replaced-1")) == steps[1:]


@pytest.mark.slow
def test_fewer_ranks_go_on(whole: Path, tmp_path: Path) -> None:
    code, error = finish(start(tmp_path / "run", f"trainer.resume={whole}", "mesh=cpu_1", "trainer.max_steps=13"))
    assert code == 0, error
    found = losses(tmp_path / "run")
    assert list(found) == list(range(1, 14))
    assert {step: found[step] for step in losses(whole)} == losses(whole)


@pytest.mark.slow
def test_a_hung_rank_is_named_in_time(tmp_path: Path) -> None:
    """It hangs in an EP group that is not the whole world; that group's timeout counts too."""
    run_dir = tmp_path / "run"
    mesh = ["mesh=cpu_2x2", "mesh.ep=2", "dispatch=flat", "trainer.max_steps=100000", "trainer.timeout_s=15"]
    with start(run_dir, *mesh) as process:
        wait_for(lambda: folders.steps(folders.checkpoints_of(run_dir)))
        stopped = time.monotonic()
        os.kill(ranks_of(run_dir)[2], signal.SIGSTOP)
        code, error = finish(process)
    assert time.monotonic() - stopped < 15 + 60  # ending the others takes seconds, on a busy machine more
    assert code == 1
    assert error.startswith("error: rank 2 of 4 hangs: rank ") and error.count("\n") == 1
    assert "has waited for an answer for trainer.timeout_s" in error
    assert folders.latest(folders.checkpoints_of(run_dir)) is not None


@pytest.mark.slow
def test_a_rank_without_memory_is_named(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    big = ["data.micro_batch_size=512", "data.global_batch_size=1024", "data.seq_len=32"]
    with start(run_dir, *big) as process:
        rank = wait_for(lambda: ranks_of(run_dir).get(1))
        wait_for((run_dir / "plan.yaml").exists)
        used = int(Path(f"/proc/{rank}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(rank, resource.RLIMIT_AS, (used, used))
        code, error = finish(process)
    assert code == 1
    assert error.startswith("error: rank 1 of 2 failed: ") and error.count("\n") == 1
    assert "memory" in error.lower(), error


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for some checkpoints of this model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_checkpoint_before_is_whole(small_disk: Path) -> None:
    run_dir = small_disk / "run"
    checkpoint = folders.checkpoints_of(run_dir)
    with start(run_dir, f"trainer.max_steps={100 * STEPS}", "trainer.keep_last=100") as process:
        code, error = finish(process)
    assert code == 2
    steps = folders.steps(checkpoint)
    assert steps
    assert re.fullmatch(
        rf"error: the checkpoint of step {steps[-1] + 2} could not be written to {checkpoint} on rank \d: .*No space left "
        rf"on device.* The checkpoints before it are whole, the latest is step-{steps[-1]}\. Make room, .*\n",
        error,
    ), error
    assert sorted(path.name for path in checkpoint.iterdir()) == ["latest", *sorted(f"step-{n}" for n in steps)]
    for step in steps[:-1]:  # room is made
        shutil.rmtree(checkpoint / f"step-{step}")
    code, error = finish(start(run_dir, f"trainer.max_steps={steps[-1] + 2}", "trainer.resume=auto"))
    assert code == 0, error
    assert folders.steps(checkpoint)[-1] == steps[-1] + 2


@pytest.mark.slow
def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environ = {
            "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2",
            "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        code, error = finish(start(tmp_path / "run", environ=environ))
    assert code == 2
    assert error == (
        f"error: MASTER_PORT={port}: another program uses this port of 127.0.0.1. Set MASTER_PORT to a free one.\n"
    )


@pytest.mark.slow
def test_under_skewed_load_memory_is_bounded_and_no_token_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    """The soak of benchmarks/, shorter and smaller."""
    kept = ("model.", "data.vocab", "data.seq", "data.val_fraction", "data.path")
    model = [word for word in TINY if word.startswith(kept) and not re.search("intermediate|num_hidden", word)]
    code = soak.main(["--steps", "40", *model, "model.config.intermediate_size=64", "model.config.num_hidden_layers=1"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert printed.count("assignments lost: 0 of ") == 2
