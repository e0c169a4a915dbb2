"""The batch job without a cluster: its text, what is refused, and when it goes back into the queue."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.rundir import PENDING, RESOLVED, job_command, resume_hint
from moecompile.runtime import slurm
from moecompile.runtime.launch import is_restart
from moecompile.runtime.signals import Stopped
from moecompile.runtime.slurm import _may_go_on, job_id, job_script
from moecompile.schema import validate

SUBMIT = ["task=submit", "launcher=slurm"]


def directives(text: str) -> dict[str, str]:
    lines = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert all(len(words) == 1 for words in lines)
    return dict(words[0].partition("=")[::2] for words in lines)


def test_the_job_is_that_of_the_mesh() -> None:
    config = compose_config([
        *SUBMIT, "recipe=deepseek_ep", "mesh=h100_2x8", "launcher.partition=gpu", "launcher.time='2-00:00:00'",
        "launcher.interface=ib0", "launcher.setup=[module load cuda]", "launcher.directives=['--mem=0']",
        "launcher.cpus_per_rank=12",
    ])  # fmt: skip
    text = job_script(config, Path("/data/it's 100% #1"), ["python", "-m", "moecompile", "name=it's"], {})
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    found = directives(text)
    assert found == {
        "--job-name": "deepseek_ep", "--partition": "gpu", "--time": "2-00:00:00", "--nodes": "2",
        "--ntasks-per-node": "8", "--cpus-per-task": "12", "--gpus-per-node": "8", "--distribution": "block:block",
        "--signal": "USR1@120", "--chdir": str(Path.cwd()), "--output": "/data/it's 100%% #1/slurm-%j.out",
        "--requeue": "", "--open-mode": "append", "--mem": "0",
    }  # fmt: skip
    *before, last = [line for line in text.splitlines() if not line.startswith("#")]
    assert before[:2] == ["set -e", "module load cuda"]
    assert "export NCCL_SOCKET_IFNAME=ib0" in before and "export GLOO_SOCKET_IFNAME=ib0" in before
    assert shlex.split(last)[-4:] == ["python", "-m", "moecompile", "name=it's"]


def test_without_gpus_and_without_requeue() -> None:
    config = compose_config([*SUBMIT, "mesh=cpu_2x2", "launcher.requeue=false"])
    found = directives(job_script(config, Path("/run"), ["true"], {}))
    assert "--no-requeue" in found and "--requeue" not in found and "--gpus-per-node" not in found


def test_the_command_goes_on_in_its_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["moecompile", "--config-dir", "mine", "-m", *SUBMIT, "seed=1,2"])
    overrides = [*SUBMIT, "seed=1", "launcher.dry_run=true"]
    train = job_command(overrides, Path("/a b"), "train", "python3")
    assert train == [
        "python3", "-m", "moecompile", "--config-dir", "mine", "task=train", "launcher=slurm", "seed=1",
        "hydra.run.dir='/a b'", "trainer.resume=auto",
    ]  # fmt: skip
    assert job_command([*overrides, "trainer.resume=/old"], Path("/b"), "train", "python3")[-2:] == [
        "trainer.resume=/old", "hydra.run.dir=/b"
    ]  # fmt: skip
    assert job_command(overrides, Path("/b"), "bench", "python3")[-1] == "hydra.run.dir=/b"
    monkeypatch.setattr(sys, "argv", ["moecompile", "--config-dir=mine", *SUBMIT])
    assert job_command(SUBMIT, Path("/b"), "bench", "python3")[3:5] == ["--config-dir=mine", "task=bench"]


def test_what_is_left_out_is_so_once_and_a_folder_may_have_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["moecompile", "~balance", "--config-dir", "of=mine", *SUBMIT])
    assert job_command(["~balance", *SUBMIT], Path("/b"), "bench", "python3")[3:] == [
        "--config-dir", "of=mine", "task=bench", "~balance", "launcher=slurm", "hydra.run.dir=/b"
    ]  # fmt: skip
    assert resume_hint(["~balance"], Path("/b")).count("~balance") == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launcher=local"], "launcher=local: submits nothing. Use launcher=slurm, or leave out task=submit."),
        (["launcher.task=verify"], "launcher.task=verify: does not run on the ranks of a mesh. Use train or bench."),
        (["launcher.directives=['--nodes=3']"], "launcher.directives[0]=--nodes=3: is decided by mesh.num_nodes."),
        (["launcher.directives=['-t 5']"], "launcher.directives[0]=-t 5: is decided by launcher.time."),
        (["launcher.directives=['mem=0']"], "launcher.directives[0]=mem=0: is no option of sbatch."),
        (['launcher.setup=["a\nb"]'], "launcher.setup[0]='a\\nb': must be one line of text."),
        (["launcher.partition=''"], "launcher.partition='': must be one line of text."),
        (["launcher.signal_s=0"], "launcher.signal_s=0: must be"),
        (
            ["data.global_batch_size=7", "mesh=cpu_1x2"],
            "data.global_batch_size=7: ",
        ),  # what the job itself would refuse
    ],
)
def test_what_cannot_be_submitted(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(compose_config([*SUBMIT, *overrides]))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("shown", "may"),
    [
        ("JobState=RUNNING Reason=None Dependency=(null)\n   Requeue=1", True),
        ("JobState=COMPLETING Reason=TimeLimit Dependency=(null)", True),
        ("JobState=COMPLETING Reason=None Dependency=(null)", False),  # cancelled
        ("JobState=PENDING Reason=BeginTime Dependency=(null)", False),  # requeued already
        ("", False),
    ],
)
def test_a_cancelled_job_stays_cancelled(shown: str, may: bool) -> None:
    """As scontrol of SLURM 24.11 shows jobs."""
    assert _may_go_on(shown) is may


@pytest.mark.parametrize(
    ("step", "num_steps", "told"),
    [
        (7, 2, "job 4711 is requeued, and goes on from step 7"),
        (7, 0, "job 4711 is not requeued: it was asked to end before it finished a step"),
        (
            None,
            2,
            "job 4711 is not requeued: nothing was saved, so it would begin again. Use trainer.save_checkpoint=true, or "
            "a longer launcher.time",
        ),
    ],
)
def test_a_job_that_would_come_no_further_is_not_requeued(
    step: int | None, num_steps: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        asked.append(command[1])
        return subprocess.CompletedProcess(command, 0, "JobState=RUNNING Reason=None", "")

    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setattr(slurm, "_run", run)
    monkeypatch.setattr(slurm, "IGNORED_AT_THE_END", ())
    slurm.ask_for_requeue(compose_config(["launcher=slurm"]), Stopped(signal.SIGUSR1, step, num_steps))
    assert slurm.requeue_if_asked() == told
    assert ("requeue" in asked) is told.startswith("job 4711 is requeued")


def test_the_id_of_a_job() -> None:
    assert job_id({}) is None
    assert job_id({"SLURM_JOB_ID": "7"}) == "7"
    assert job_id({"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}) == "7_1"


def a_config(folder: Path, resume: str | None, lr: float = 0.1, ranks: int = 2) -> None:
    folder.mkdir(exist_ok=True)
    body = {"trainer": {"resume": resume}, "optimizer": {"lr": lr}, "mesh": {"ranks_per_node": ranks}}
    (folder / RESOLVED).write_text(yaml.safe_dump(body))


def test_a_requeued_job_is_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the run's own checkpoint comes before a given trainer.resume, as after a lost rank; but not if no attempt has
    trained: the directory then has the run before.
    """
    for name in ("MOECOMPILE_RESTART", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    here, pending = [f"{tmp_path}/checkpoints/step-{step}" for step in (2, 4)], tmp_path / PENDING
    a_config(tmp_path, here[0])
    a_config(pending, here[0])
    assert not is_restart(tmp_path)
    for count, expected in (("0", False), ("2", True)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        assert is_restart(tmp_path) is expected
    a_config(pending, here[0], lr=0.2)
    assert not is_restart(tmp_path)
    a_config(pending, here[1])
    assert not is_restart(tmp_path)
    a_config(pending, here[0], ranks=1)  # torchrun found fewer machines
    assert is_restart(tmp_path)
    a_config(tmp_path, "/other/checkpoints/step-2")
    a_config(pending, "/other/checkpoints/step-4")  # where the job began has moved on
    assert is_restart(tmp_path)
    (tmp_path / RESOLVED).unlink()
    assert not is_restart(tmp_path)


def test_ranks_that_the_launcher_starts_again_go_on_if_they_have_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECOMPILE_RESTART", "1")
    assert is_restart(tmp_path)
    (tmp_path / PENDING).mkdir()
    assert not is_restart(tmp_path)
