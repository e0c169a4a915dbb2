"""The batch job of SLURM for a run, and how it goes back into the queue. Needs no torch.

Algorithm:
1. `submit`, the task, writes RUN/job.sbatch from the mesh and submits it. Its command has a fixed run directory and
   `trainer.resume=auto`, so that each attempt goes on from the last checkpoint.
2. `launcher.signal_s` before the time limit SLURM sends SIGUSR1 to all ranks. SIGTERM comes at the limit, for a job
   that is preferred, and by scancel. All ranks finish the step and save (runtime/signals.py).
3. Rank 0, after all others have ended, asks SLURM for the job's state, and requeues it: unless it was cancelled, SLURM
   has requeued it, or this attempt finished no step or saved none, which the next one would not either.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from moecompile.atomic import write_text
from moecompile.errors import ConfigError, RankFailure, UserError
from moecompile.rundir import OVERRIDES, job_command, output_dir, rehearsal_hint
from moecompile.runtime.signals import IGNORED_AT_THE_END, Stopped
from moecompile.schema import Config, LauncherKind, TaskName, mesh_spec

SCRIPT = "job.sbatch"
OUTPUT = "slurm-%j.out"
_TIMEOUT_S = 60.0
"""Timeout, seconds, of a command of SLURM."""
_WAIT_S = 60
"""Seconds that srun waits for the other ranks after one has ended."""

_POLL_S = 5.0
"""Seconds between two questions for the jobs in the queue."""

_wanted: list[Stopped] = []
_written: list[Path] = []  # the scripts of this process
_waiting: dict[str, Path] = {}  # job -> its script, of those that are waited for


def job_script(config: Config, run_dir: Path, command: Sequence[str], environ: Mapping[str, str] = os.environ) -> str:
    """The text of the batch job that runs `command` on the ranks of the mesh."""
    mesh, launcher = mesh_spec(config.mesh), config.launcher
    cpus = launcher.cpus_per_rank or config.trainer.threads_per_rank
    options = {
        "--job-name": config.name,
        "--partition": launcher.partition,
        "--account": launcher.account,
        "--qos": launcher.qos,
        "--time": launcher.time,
        "--nodes": mesh.num_nodes,
        "--ntasks-per-node": mesh.ranks_per_node,
        "--cpus-per-task": cpus,
        "--gpus-per-node": mesh.ranks_per_node if mesh.device == "cuda" else None,
        "--distribution": "block:block",  # the ranks of a node are contiguous
        "--signal": f"USR1@{launcher.signal_s}",
        "--chdir": os.getcwd(),
        "--output": f"{str(run_dir).replace('%', '%%')}/{OUTPUT}",
    }
    lines = [f"#SBATCH {name}={_quoted(str(value))}" for name, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue" if launcher.requeue else "#SBATCH --no-requeue", "#SBATCH --open-mode=append"]
    lines += [f"#SBATCH {text}" for text in launcher.directives]
    exported: dict[str, str | None] = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), launcher.interface)
    exported["MOECOMPILE_CONFIG_DIR"] = environ.get("MOECOMPILE_CONFIG_DIR")
    return "\n".join([
        "#!/bin/bash",
        f"# Written by task=submit. `sbatch {SCRIPT}` submits it again, and the run goes on from its last checkpoint.",
        *lines,
        "set -e",
        *launcher.setup,
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export MASTER_ADDR",
        *(f"export {name}={shlex.quote(value)}" for name, value in exported.items() if value),
        f"exec srun --kill-on-bad-exit=0 --wait={_WAIT_S} --cpus-per-task={cpus} {shlex.join(command)}",
        "",
    ])  # fmt: skip


def submit(config: Config, run_dir: Path) -> None:
    """task=submit: writes `job.sbatch` to the run directory, and submits it.

    What a run that it continues has left there is kept.

    Raises:
        ConfigError: there is no sbatch. UserError: SLURM refuses the job.
    """
    overrides = (output_dir(run_dir) / OVERRIDES).read_text(encoding="utf-8").splitlines()
    command = job_command(overrides, run_dir, config.launcher.task.value, config.launcher.python or sys.executable)
    text, script = job_script(config, run_dir, command), run_dir / SCRIPT
    write_text(script, text)
    _written.append(script)
    if config.launcher.dry_run:
        print(text, end="", flush=True)
        return
    job = _submitted_as(script)
    if config.launcher.wait:
        _waiting[job] = script
    print(f"job {job} is submitted: {script}\nit writes to {run_dir / OUTPUT.replace('%j', job)}", flush=True)
    if config.launcher.task is TaskName.train:
        print(rehearsal_hint(overrides), flush=True)


def _submitted_as(script: Path) -> str:
    """Submits a batch job and returns its id.

    Raises:
        ConfigError: there is no sbatch. UserError: SLURM refuses the job.
    """
    try:
        done = _run("sbatch", "--parsable", str(script))
    except FileNotFoundError:
        raise ConfigError(
            "launcher.kind", "slurm", "there is no sbatch on this machine",
            f"Run sbatch {script} on one that has it, or print the job with launcher.dry_run=true",
        ) from None  # fmt: skip
    if done.returncode:
        raise UserError(f"sbatch refuses {script}: {_reason(done)}. Change launcher.*, or the mesh.")
    return done.stdout.strip().partition(";")[0]


def has_results() -> bool:
    """Whether there will be results when this process ends: it submits no job, or waits for one."""
    return bool(_waiting) or not _written


def wait_for_jobs() -> None:
    """Waits until all jobs with `launcher.wait` have ended, also if they are requeued meanwhile.

    Raises:
        RankFailure: some have failed, or were cancelled.
    """
    jobs, failed = dict(_waiting), []
    _waiting.clear()
    if jobs:
        print(f"waiting for {len(jobs)} {'job' if len(jobs) == 1 else 'jobs'}", flush=True)
    while jobs:
        time.sleep(_POLL_S)
        queue = _run("squeue", "--noheader", "--format=%A", f"--user={os.getuid()}")
        if queue.returncode:  # SLURM does not answer; it may later
            continue
        for job in jobs.keys() - set(queue.stdout.split()):
            state = _fields(_run("scontrol", "show", "job", job).stdout).get("JobState", "not known to SLURM")
            if state != "COMPLETED":
                failed.append(f"job {job} of {jobs[job]} is {state}")
            del jobs[job]
    if failed:
        raise RankFailure(f"{'; '.join(sorted(failed))}. See what it wrote beside {SCRIPT}.")


def ask_for_requeue(config: Config, stopped: Stopped) -> None:
    """Remembers that the run was asked to end, if its job should go back into the queue then."""
    launcher = config.launcher
    if launcher.kind is LauncherKind.slurm and launcher.requeue and job_id() and stopped.number != signal.SIGINT:
        _wanted.append(stopped)


def requeue_if_asked() -> str | None:
    """Puts the job back into the queue if `ask_for_requeue` remembers that; returns what to tell, or None."""
    if not _wanted:
        return None
    for number in IGNORED_AT_THE_END:  # SLURM sends them when it requeues the job
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    stopped, job = _wanted.pop(), job_id()
    if (why := _no_progress(stopped)) is not None:
        return f"job {job} is not requeued: {why}"
    try:
        state = _run("scontrol", "show", "job", str(job))
        if not _may_go_on(state.stdout):
            return None
        done = _run("scontrol", "requeue", str(job))
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"job {job} could not be requeued: {error}. Submit {SCRIPT} again."
    if done.returncode:
        return f"job {job} could not be requeued: {_reason(done)}. Submit {SCRIPT} again."
    return f"job {job} is requeued, and goes on from step {stopped.step}"


def _no_progress(stopped: Stopped) -> str | None:
    """Why the next attempt would come no further than this one; None: it would."""
    if not stopped.num_steps:
        return "it was asked to end before it finished a step"
    if stopped.step is None:
        return "nothing was saved, so it would begin again. Use trainer.save_checkpoint=true, or a longer launcher.time"
    return None


def job_id(environ: Mapping[str, str] = os.environ) -> str | None:
    """The id of this process's job, as scontrol takes it; None outside of a job."""
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def _may_go_on(shown: str) -> bool:
    """Whether a job may be requeued: it runs, or its time is over. If not, it was cancelled, or is in the queue."""
    found = _fields(shown)
    return found.get("JobState") == "RUNNING" or found.get("Reason") == "TimeLimit"


def _fields(shown: str) -> dict[str, str]:
    """What `scontrol show job` says about the state of a job."""
    return dict(re.findall(r"\b(JobState|Reason)=(\S+)", shown))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    text = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    return text.removesuffix(".")


def _quoted(text: str) -> str:
    """A value in a line of sbatch, which reads quotes and backslashes as a shell does."""
    return text if re.fullmatch(r"[\w./:,@%+=-]+", text) else shlex.quote(text)
