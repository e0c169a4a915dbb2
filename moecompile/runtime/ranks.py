"""Ranks that somebody else started: what torchrun's or SLURM's environment says about this process.

Reading it needs no torch, so that the command line knows before anything else whether it is one rank of many.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from moecompile.errors import UserError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place among all ranks, in torchrun's words. launcher: who started them, for messages."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str

    @property
    def node(self) -> int:
        """The node of this rank; nodes are contiguous ranks."""
        return self.rank // self.local_world_size

    def variables(self) -> dict[str, str]:
        """The environment variables from which torch and Lightning read the same place."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.node),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def in_place_ranks(environ: Mapping[str, str] = os.environ) -> Ranks | None:
    """The place that torchrun or a SLURM job step gave to this process; None if there is no such launcher.

    torchrun comes first, because it is often started by srun. Inside a SLURM allocation but outside of a job step (a
    batch script, an interactive shell) there are no ranks yet, and neither in a step of one task.

    Raises:
        UserError: SLURM spread the tasks so that a node does not hold contiguous ranks.
    """
    if all(name in environ for name in _TORCHRUN):
        world_size = int(environ["WORLD_SIZE"])
        return Ranks(
            rank=int(environ["RANK"]),
            world_size=world_size,
            local_rank=int(environ["LOCAL_RANK"]),
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE", world_size)),
            master_addr=environ["MASTER_ADDR"],
            master_port=int(environ["MASTER_PORT"]),
            launcher="torchrun",
        )
    num_tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and num_tasks > 1:
        return _slurm_ranks(environ, num_tasks)
    return None


def worker_variables(threads: int, *, one_machine: bool) -> dict[str, str]:
    """Environment variables of a rank.

    Threads that spin while they wait steal the cores of the other ranks, hence `passive`. Freed tensors stay on the
    heap: glibc would otherwise map every big buffer anew in each step. All ranks of one machine talk over loopback,
    whatever its host name resolves to.
    """
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "MALLOC_MMAP_THRESHOLD_": str(4 * 1024**3),
        "MALLOC_TRIM_THRESHOLD_": str(16 * 1024**3),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    if one_machine:
        variables["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    return variables


def _slurm_ranks(environ: Mapping[str, str], num_tasks: int) -> Ranks:
    rank, local_rank = int(environ["SLURM_PROCID"]), int(environ.get("SLURM_LOCALID", environ["SLURM_PROCID"]))
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(num_tasks)
    local_world_size = _tasks_on_node(tasks, int(environ.get("SLURM_NODEID", 0)))
    if rank % local_world_size != local_rank:
        raise UserError(
            f"SLURM_PROCID={rank}, SLURM_LOCALID={local_rank}: the ranks of a node must be contiguous and every node "
            f"must hold as many. Start the job with srun --distribution=block --ntasks-per-node={local_world_size}."
        )
    nodes = next((environ[f"SLURM_{name}"] for name in ("STEP_NODELIST", "NODELIST", "JOB_NODELIST")
                  if environ.get(f"SLURM_{name}")), "127.0.0.1")  # fmt: skip
    return Ranks(
        rank=rank,
        world_size=num_tasks,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=environ.get("MASTER_ADDR") or _first_host(nodes),
        master_port=int(environ.get("MASTER_PORT") or _port(environ)),
        launcher="srun",
    )


def _tasks_on_node(text: str, node: int) -> int:
    """Entry `node` of SLURM's run-length list: `2(x3),1` is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, repeat = part.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts[min(node, len(counts) - 1)]


def _first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `node[03-05,07],login1` is node03."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0].strip()


def _port(environ: Mapping[str, str]) -> int:
    """A port that all ranks derive alike, apart for two steps of a job and below the ephemeral ports."""
    job, step = int(environ.get("SLURM_JOB_ID", 0)), int(environ["SLURM_STEP_ID"])
    return 15000 + (job + 101 * step) % 15000
