"""The tasks that run on every rank of the mesh: how they are started, and what a rank runs first."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from moecompile import waiting
from moecompile.named_code import VARIABLE, for_ranks, from_launcher, load_plugins, named_in
from moecompile.rundir import RESOLVED, output_dir
from moecompile.runtime.launch import launch, prepare
from moecompile.schema import Config, TaskName, mesh_spec


def prepare_ranks(config: Config) -> None:
    """Lets ranks import what they need while the launcher checks its inputs."""
    if config.task.name is TaskName.bench:
        # torch warns that its profiler does not see older memory freed, which bench/measure.py allows for.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    others = ("moecompile.compose", "transformers.modeling_utils", "torch.fx.experimental.symbolic_shapes")
    prepare([__name__, _in_rank(config), *others], config.trainer.threads_per_rank)


def start_ranks(config: Config, run_dir: Path) -> None:
    """Starts one process per rank, or runs in place if ranks exist already; returns when all have succeeded.

    Each rank reads the resolved config of `run_dir` and runs `run_rank` of its task in moecompile.tasks.ranks. It did
    not see the command line, so it is told separately which code was named there.

    Raises:
        MoecompileError: that of `runtime.launch.launch`.
    """
    os.environ[VARIABLE] = for_ranks(named_in(config))
    launch(
        mesh_spec(config.mesh).world_size,
        run_dir,
        module=__name__,
        threads=config.trainer.threads_per_rank,
        max_restarts=config.trainer.max_restarts if config.task.name is TaskName.train else 0,
        num_nodes=config.mesh.num_nodes,
    )


def main(run_dir: Path) -> None:
    """A rank: runs its part of the task that the resolved config in `run_dir` names."""
    if os.environ.get("RANK") == "0":
        waiting.show("loading torch", line=False)
    from moecompile.compose import load_resolved

    config = load_resolved(output_dir(run_dir) / RESOLVED, named=from_launcher(os.environ.get(VARIABLE)))
    load_plugins(config.plugins)
    module = importlib.import_module(_in_rank(config))
    waiting.done()
    module.run_rank(config, run_dir)


def _in_rank(config: Config) -> str:
    """The module of `run_rank`, which loads torch and Lightning."""
    return f"moecompile.tasks.ranks.{config.task.name.value}"
