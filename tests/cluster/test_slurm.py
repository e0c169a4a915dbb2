"""Batch jobs on a real SLURM: what task=submit submits, signals and requeues, and what is refused."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moecompile.checkpoint import folders
from tests.cluster.slow_model import SMALL
from tests.cluster.slurm import Cluster, cluster, environment, processes, wait_for, why_not
from tests.distributed.resume_job import rows

RUN = (
    *SMALL, "mesh.num_nodes=2", "data.micro_batch_size=2", "optimizer.min_lr_ratio=1.0", "launcher.interface=eth0",
)  # fmt: skip
STEPS = 40
SLEEP_S = "0.25"
STEP = re.compile(r"^step (\d+)/", re.MULTILINE)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(f"NOT TESTED on a real SLURM: {reason}")
    with cluster() as found:
        yield found


@pytest.fixture(scope="module")
def short_of_time(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A job whose steps take 72 s, and that is asked to save 40 s to 70 s after it starts, on nodes beside the others."""
    run_dir = tmp_path_factory.mktemp("run") / "short of time"
    limits = ("launcher.time=2", "launcher.signal_s=50", "launcher.partition=other")
    return slurm.submit(run_dir, *RUN, *limits, "trainer.max_steps=12", SLEEP_S="6"), run_dir


@pytest.fixture(scope="module")
def uninterrupted(slurm: Cluster, short_of_time: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nobody interrupts."""
    run_dir = tmp_path_factory.mktemp("run") / "#1 of two"
    ended = slurm.end(slurm.submit(run_dir, *RUN, f"trainer.max_steps={STEPS}"))
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "0"), output(run_dir)
    return run_dir


def output(run_dir: Path) -> str:
    return "".join(path.read_text() for path in sorted(run_dir.glob("slurm-*.out")))


def told(text: str) -> list[str]:
    return [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]


def losses(run_dir: Path, num_steps: int) -> list[float]:
    """One loss for each step."""
    found = [(int(row["step"]), float(row["loss"])) for row in rows(run_dir)]
    assert [step for step, _ in found] == list(range(1, num_steps + 1))
    return [loss for _, loss in found]


def wait_for_steps(run_dir: Path, count: int, *, attempts: int) -> None:
    """Waits until the last of so many attempts has printed `count` steps."""

    def has_come() -> bool:
        parts = output(run_dir).split("loading torch ...")
        return len(parts) == attempts + 1 and len(STEP.findall(parts[-1])) >= count

    wait_for(has_come, f"attempt {attempts} has not come to {count} steps", 200)


def test_the_mesh_is_that_of_the_job(slurm: Cluster, uninterrupted: Path) -> None:
    said = output(uninterrupted)
    assert "mesh  2 nodes x 1 rank = 2 on cpu" in said and not told(said)
    assert len(losses(uninterrupted, STEPS)) == STEPS
    assert not processes(str(uninterrupted))


def test_signals_requeue_a_run_that_ends_as_if_nothing_had_happened(
    slurm: Cluster, uninterrupted: Path, tmp_path: Path
) -> None:
    """A rank killed, warned, preempted, cancelled: five attempts."""
    run_dir = tmp_path / "run"
    overrides = (*RUN, f"trainer.max_steps={STEPS}", "trainer.save_interval=1")
    job = slurm.submit(run_dir, *overrides, SLEEP_S=SLEEP_S)
    # 1. A rank is killed, and the operator requeues the job.
    wait_for_steps(run_dir, 2, attempts=1)
    (rank_1,) = (pid for pid, _ in processes(str(run_dir)) if environment(pid).get("SLURM_PROCID") == "1")
    os.kill(rank_1, signal.SIGKILL)
    assert slurm.end(job)["JobState"] == "FAILED"
    assert [re.sub(r" \(.*", "", line) for line in told(output(run_dir))] == [
        "rank 1 of 2 failed: the process has ended without a message"
    ]
    slurm.run("scontrol", "requeue", job)
    # 2. A warning: rank 0 requeues.
    wait_for_steps(run_dir, 2, attempts=2)
    slurm.run("scancel", "--signal=USR1", job)
    # 3. A preferred job needs the nodes: SIGTERM, and rank 0 requeues.
    wait_for_steps(run_dir, 2, attempts=3)
    assert slurm.run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "true").returncode == 0
    # 4. It is cancelled.
    wait_for_steps(run_dir, 2, attempts=4)
    slurm.run("scancel", job)
    assert slurm.end(job)["JobState"] == "CANCELLED"
    saved = re.findall(r"^ended by (\w+): step (\d+) is saved$", output(run_dir), re.MULTILINE)
    requeued = re.findall(rf"^job {job} is requeued, and goes on from step (\d+)$", output(run_dir), re.MULTILINE)
    assert [name for name, _ in saved] == ["SIGUSR1", "SIGTERM", "SIGTERM"], output(run_dir)
    assert requeued == [step for _, step in saved[:2]] and slurm.shown(job)["Restarts"] == "3"
    assert folders.steps(folders.checkpoints_of(run_dir))[-1] == int(saved[2][1])
    # 5. The same job again.
    again = slurm.run("sbatch", "--parsable", run_dir / "job.sbatch", SLEEP_S="0").stdout.strip()
    assert slurm.end(again)["JobState"] == "COMPLETED", output(run_dir)
    assert losses(run_dir, STEPS) == pytest.approx(losses(uninterrupted, STEPS), abs=1e-6)
    assert not processes(str(run_dir))


WRONG_COUNT = (
    "mesh.num_nodes * mesh.ranks_per_node=4: srun started 2 ranks, 1 on each of 2 machines. "
    "Use mesh.num_nodes=2 mesh.ranks_per_node=1, or start 4 ranks."
)
CYCLIC = (
    "srun put ranks 0, 2 on node 0: nodes must have as many ranks each, and those of a node must be contiguous. "
    "Start them with srun --distribution=block --ntasks-per-node=2."
)
UNRESOLVED = (
    "MASTER_ADDR=nowhere.invalid: has no address on node0 (X). Set it to a name or address of rank 0's machine."
)


@pytest.mark.parametrize(
    ("flag", "message"), [("--ntasks-per-node=1", WRONG_COUNT), ("--distribution=cyclic", CYCLIC), (None, UNRESOLVED)]
)
def test_what_does_not_fit_is_refused_once(flag: str | None, message: str, slurm: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = (*RUN, "mesh.ranks_per_node=2", "data.global_batch_size=8", "launcher.dry_run=true")
    command = ("-m", "moecompile", "task=submit", "launcher=slurm", *overrides, f"hydra.run.dir={run_dir}")
    printed = slurm.run(sys.executable, *command)
    script = run_dir / "job.sbatch"
    assert printed.stdout == script.read_text()
    if flag is None:
        script.write_text(re.sub(r"MASTER_ADDR=\$.*", "MASTER_ADDR=nowhere.invalid", script.read_text()))
    done = slurm.run("sbatch", "--wait", *([flag] if flag else []), script)
    said = output(run_dir)
    assert done.returncode == 2, said
    (job,) = (path.stem.removeprefix("slurm-") for path in run_dir.glob("slurm-*.out"))
    hours, minutes, seconds = map(int, slurm.shown(job)["RunTime"].split(":"))
    assert [re.sub(r"\(\[.*?\]? .*?\)", "(X)", line) for line in told(said)] == [message]
    assert "Traceback" not in said and (hours, minutes) == (0, 0) and seconds <= 15
    assert not processes(str(run_dir))
    assert {path.name for path in run_dir.iterdir() if not path.name.startswith("slurm-")} == {
        "job.sbatch", "overrides.txt", "resolved.yaml"
    }  # fmt: skip


def test_a_sweep_waits_for_its_jobs_and_fails_with_them(slurm: Cluster, tmp_path: Path) -> None:
    """Jobs that end before their ranks start, one of them with an error."""
    overrides = ("task=submit", "launcher=slurm", "launcher.wait=true", *RUN, f"hydra.sweep.dir={tmp_path}/sweep")
    both = slurm.run(sys.executable, "-m", "moecompile", "-m", *overrides, "launcher.setup=[exit 0],[exit 3]")
    submitted = re.findall(r"^job (\d+) is submitted: (.*)$", both.stdout, re.MULTILINE)
    assert [script for _, script in submitted] == [f"{tmp_path}/sweep/{number}/job.sbatch" for number in (0, 1)]
    assert (both.returncode, told(both.stderr)) == (
        1, [f"job {submitted[1][0]} of {submitted[1][1]} is FAILED. See what it wrote beside job.sbatch."]
    ), both.stdout + both.stderr  # fmt: skip
    assert "waiting for 2 jobs\n" in both.stdout and (tmp_path / "sweep" / "sweep.csv").exists()
    overrides = ("task=submit", "launcher=slurm", "launcher.wait=true", *RUN, f"hydra.run.dir={tmp_path}/one")
    one = slurm.run(sys.executable, "-m", "moecompile", *overrides, "launcher.setup=[exit 0]")
    assert (one.returncode, one.stderr) == (0, ""), one.stderr


def test_a_time_limit_that_is_too_short_is_no_end(
    slurm: Cluster, short_of_time: tuple[str, Path], uninterrupted: Path
) -> None:
    job, run_dir = short_of_time
    ended = slurm.end(job, 280)
    said = output(run_dir)
    assert ended["JobState"] == "COMPLETED" and int(ended["Restarts"]) >= 1, said
    assert len(re.findall(r"^ended by SIGUSR1: step \d+ is saved$", said, re.MULTILINE)) == int(ended["Restarts"]), said
    assert losses(run_dir, 12) == pytest.approx(losses(uninterrupted, STEPS)[:12], abs=1e-6)
    assert not processes(str(run_dir))
