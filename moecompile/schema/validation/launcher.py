"""Rules of `launcher`, and the config that a submitted job has."""

from __future__ import annotations

from dataclasses import replace

from moecompile.errors import ConfigError
from moecompile.schema.config import Config, TaskConfig
from moecompile.schema.enums import LauncherKind, TaskName

_TASKS = (TaskName.train, TaskName.bench)
_DECIDED = {
    "--nodes": "mesh.num_nodes", "-N": "mesh.num_nodes", "--ntasks": "mesh", "-n": "mesh",
    "--ntasks-per-node": "mesh.ranks_per_node", "--distribution": "the order of ranks", "-m": "the order of ranks",
    "--gpus-per-node": "mesh.ranks_per_node and mesh.device", "--cpus-per-task": "launcher.cpus_per_rank",
    "-c": "launcher.cpus_per_rank", "--signal": "launcher.signal_s", "--requeue": "launcher.requeue",
    "--no-requeue": "launcher.requeue", "--time": "launcher.time", "-t": "launcher.time",
    "--partition": "launcher.partition", "-p": "launcher.partition", "--account": "launcher.account",
    "-A": "launcher.account", "--qos": "launcher.qos", "-q": "launcher.qos", "--chdir": "the folder of the command",
    "-D": "the folder of the command", "--output": "hydra.run.dir", "-o": "hydra.run.dir",
}  # fmt: skip
"""Options of sbatch -> what decides them."""


def of_the_job(config: Config) -> Config:
    """The config with the task of the job that task=submit submits; another task's config is returned as it is."""
    if config.task.name is not TaskName.submit:
        return config
    return replace(config, task=TaskConfig(name=config.launcher.task))


def check_launcher(config: Config) -> None:
    """Checks what is written into the job.

    Raises:
        ConfigError: the first rule that is broken.
    """
    launcher = config.launcher
    if launcher.task not in _TASKS:
        raise ConfigError(
            "launcher.task", launcher.task.value, "does not run on the ranks of a mesh", "Use train or bench"
        )
    if config.task.name is TaskName.submit and launcher.kind is LauncherKind.local:
        raise ConfigError("launcher", "local", "submits nothing", "Use launcher=slurm, or leave out task=submit")
    named = {name: getattr(launcher, name) for name in ("partition", "account", "qos", "time", "interface", "python")}
    lines = {**named, **{f"directives[{i}]": text for i, text in enumerate(launcher.directives)},
             **{f"setup[{i}]": text for i, text in enumerate(launcher.setup)}}  # fmt: skip
    for name, text in lines.items():
        if text is not None and (not text.strip() or not text.isprintable()):
            raise ConfigError(f"launcher.{name}", repr(text), "must be one line of text", "Write one line, or null")
    for i, text in enumerate(launcher.directives):
        option = text.replace("=", " ").split()[0]
        if not option.startswith("-"):
            raise ConfigError(f"launcher.directives[{i}]", text, "is no option of sbatch", "Write --name=value")
        if option in _DECIDED:
            raise ConfigError(
                f"launcher.directives[{i}]", text, f"is decided by {_DECIDED[option]}", "Leave it out, and set that"
            )
