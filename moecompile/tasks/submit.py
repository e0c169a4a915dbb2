"""task=submit: writes the batch job of a run from its mesh, and submits it."""

from __future__ import annotations

import sys
from pathlib import Path

from moecompile.atomic import write_text
from moecompile.rundir import OVERRIDES, job_command, place
from moecompile.runtime import slurm
from moecompile.schema import Config


def run(config: Config, run_dir: Path) -> None:
    """Writes `job.sbatch` to the run directory and submits it; what a run that it continues has left there is kept."""
    overrides = (place(run_dir) / OVERRIDES).read_text(encoding="utf-8").splitlines()
    command = job_command(overrides, run_dir, config.launcher.task.value, config.launcher.python or sys.executable)
    text = slurm.job_script(config, run_dir, command)
    script = run_dir / slurm.SCRIPT
    write_text(script, text)
    if config.launcher.dry_run:
        print(text, end="", flush=True)
        return
    job = slurm.submit(script)
    if config.launcher.wait:
        slurm.wait_later(job, script)
    output = run_dir / slurm.OUTPUT.replace("%j", job)
    print(f"job {job} is submitted: {script}\nit writes to {output}", flush=True)
