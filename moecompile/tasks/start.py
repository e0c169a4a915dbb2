"""Starts the ranks of a task."""

from __future__ import annotations

import os
from pathlib import Path

from moecompile.named_code import VARIABLE, for_ranks, named_in
from moecompile.runtime.launch import launch, prepare
from moecompile.schema import Config, TaskName, mesh_spec

WORKER = "moecompile.tasks.worker"


def prepare_ranks(config: Config) -> None:
    """Lets ranks import what they need while the launcher checks its inputs."""
    if config.task.name is TaskName.bench:
        # torch warns that its profiler does not see older memory freed, which bench/measure.py allows for.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    rank = f"moecompile.tasks.ranks.{config.task.name.value}"
    others = ("moecompile.compose", "transformers.modeling_utils", "torch.fx.experimental.symbolic_shapes")
    prepare([WORKER, rank, *others], config.trainer.threads_per_rank)


def start_ranks(config: Config, run_dir: Path, *, max_restarts: int = 0) -> None:
    """Starts one process per rank, or runs in place if ranks exist already; returns when all have succeeded.

    Each rank reads the resolved config of `run_dir` and runs `run_rank` of its task in moecompile.tasks.ranks. It did
    not see the command line, so it is told separately which code was named there.

    Arguments and errors are those of `runtime.launch.launch`.
    """
    os.environ[VARIABLE] = for_ranks(named_in(config))
    launch(
        mesh_spec(config.mesh).world_size,
        run_dir,
        module=WORKER,
        threads=config.trainer.threads_per_rank,
        timeout_s=config.trainer.timeout_s,
        max_restarts=max_restarts,
        num_nodes=config.mesh.num_nodes,
    )
