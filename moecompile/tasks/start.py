"""How a task that runs on ranks starts them."""

from __future__ import annotations

from pathlib import Path

from moecompile.runtime.launch import launch
from moecompile.schema import Config, mesh_spec


def start_ranks(config: Config, run_dir: Path, *, max_restarts: int = 0) -> None:
    """One process per rank of the config's mesh, or in place where ranks exist already; returns when all succeeded.

    Each rank reads the resolved config of `run_dir` and runs `run_rank` of its task (moecompile.tasks.worker).

    Args: as of `runtime.launch.launch`, whose errors are raised.
    """
    launch(
        mesh_spec(config.mesh).world_size,
        run_dir,
        module="moecompile.tasks.worker",
        threads=config.trainer.threads_per_rank,
        timeout_s=config.trainer.timeout_s,
        max_restarts=max_restarts,
        num_nodes=config.mesh.num_nodes,
    )
