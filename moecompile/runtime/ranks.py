"""Reads the ranks that torchrun or SLURM started from the environment variables of this process.

It needs no torch, so that the command line knows first whether it is one of several ranks.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import socket
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moecompile import hub_kernels
from moecompile.errors import ConfigError, UserError

FREE_PORTS = (30_000, 32_768)
"""Ports for process groups: below the ephemeral ones of Linux, above those that SLURM's ranks derive."""

_TRIED_PORTS = 64
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MPIRUN = "OMPI_COMM_WORLD_SIZE"
_OTHERS = {_MPIRUN: "OMPI_COMM_WORLD_RANK", "PMI_SIZE": "PMI_RANK", "WORLD_SIZE": "RANK"}
"""Variables of other launchers, number of processes -> which one: Open MPI, MPICH and Intel MPI, pods of a job."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among all ranks, with torchrun's names. launcher: name of what started them, for messages.

    node: index of this process's node, from the launcher.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str
    node: int = 0

    def variables(self) -> dict[str, str]:
        """The same values as environment variables for torch and Lightning."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.rank // self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def started_ranks(environ: Mapping[str, str] = os.environ) -> Ranks | None:
    """This process's rank under torchrun or in a SLURM job step; None without such a launcher.

    torchrun is checked first, because it is often started by srun. In a SLURM allocation outside of a job step (a batch
    script, an interactive shell), and in a step of one task, there are no ranks.
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
            node=int(environ.get("GROUP_RANK", 0)),
        )
    num_tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)
    has_step = "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and num_tasks > 1
    if has_step and _MPIRUN not in environ:  # else it is the step of mpirun's daemons, one on each node
        return _slurm_ranks(environ, num_tasks)
    return None


def check_alone(environ: Mapping[str, str] = os.environ) -> None:
    """Checks that this process, which is about to start all ranks, is not one of several that would do so.

    Raises:
        UserError: another launcher has started several.
    """
    for name, place in _OTHERS.items():
        if (number := environ.get(name, "")).isdigit() and int(number) > 1 and place in environ:
            raise UserError(
                f"{name}={number}: this is one of {number} processes, and each would start all ranks, for a run of its "
                f"own. Start them by torchrun or srun, or unset the variable if there is only this one."
            )


def check_places(places: Sequence[tuple[int, int]], launcher: str) -> None:
    """Checks that every node has the same number of ranks, and consecutive ones. places: (node, local rank) by rank.

    Raises:
        UserError: it does not hold.
    """
    counts = Counter(node for node, _ in places)
    per_node = len(places) // len(counts)
    if [local for _, local in places] == [rank % per_node for rank in range(len(places))] and (
        len(set(counts.values())) == 1 and [node for node, _ in places] == sorted(node for node, _ in places)
    ):
        return
    shown = ", ".join(f"{rank} on node {node}" for rank, (node, _) in enumerate(places[:8]))
    more = ", ..." if len(places) > 8 else ""
    fix = (
        f"srun --distribution=block --ntasks-per-node={math.ceil(per_node)}" if launcher == "srun"
        else "as many processes on each node, nodes one after the other"
    )  # fmt: skip
    raise UserError(
        f"{launcher} started rank {shown}{more}: ranks must fill the nodes in order, the same number on each. "
        f"Start them with {fix}."
    )


def check_order(ranks: Ranks, environ: Mapping[str, str] = os.environ) -> None:
    """Checks the places of SLURM's ranks as far as each of them knows, before they have met; `check_places` sees all.

    Raises:
        UserError: the nodes have unequally many ranks, or those of this node are not contiguous.
    """
    if ranks.launcher != "srun":
        return
    counts = _tasks_per_node(_tasks_text(environ, ranks.world_size))
    own = [int(rank) for rank in environ.get("SLURM_GTIDS", "").split(",") if rank.isdigit()]
    if len(set(counts)) == 1 and (not own or own == [*range(own[0], own[0] + len(own))]):
        return
    shown = f"ranks {', '.join(map(str, own[:8]))} on node {ranks.node}" if own else f"{counts} ranks on the nodes"
    raise UserError(
        f"srun put {shown}: nodes must have as many ranks each, and those of a node must be contiguous. Start them "
        f"with srun --distribution=block --ntasks-per-node={math.ceil(ranks.world_size / len(counts))}."
    )


def check_mesh(num_nodes: int, ranks_per_node: int, hosts: int, local_world_size: int, launcher: str) -> str | None:
    """Checks that a mesh fits the ranks on `hosts` machines; returns a note if machines simulate several nodes.

    Raises:
        ConfigError: the number of ranks differs, or a node of the mesh would span several machines.
    """
    wanted, found = num_nodes * ranks_per_node, hosts * local_world_size
    machines = "machine" if hosts == 1 else "machines"
    started = f"{launcher} started {found} ranks, {local_world_size} on each of {hosts} {machines}"
    if wanted != found:
        raise ConfigError(
            "mesh.num_nodes * mesh.ranks_per_node", wanted, started,
            f"Use mesh.num_nodes={hosts} mesh.ranks_per_node={local_world_size}, or start {wanted} ranks",
        )  # fmt: skip
    if num_nodes % hosts:
        raise ConfigError(
            "mesh.num_nodes", num_nodes, f"{started}, and a node of the mesh would lie on several of them",
            f"Use mesh.num_nodes={hosts} mesh.ranks_per_node={local_world_size}, "
            f"or start {wanted} ranks on {num_nodes} {'machine' if num_nodes == 1 else 'machines'}",
        )  # fmt: skip
    if num_nodes == hosts:
        return None
    where = "this machine plays" if hosts == 1 else "each machine plays"
    return f"{where} {num_nodes // hosts} nodes of {ranks_per_node} ranks (mesh.num_nodes={num_nodes})"


def worker_variables(threads: int, *, one_machine: bool) -> dict[str, str]:
    """Environment variables of a rank.

    Threads that spin while they wait take cores from other ranks, so they are `passive`. Freed tensors stay on the
    heap, else glibc would map every large buffer again in each step. Ranks of one machine communicate over loopback,
    independent of its host name.
    """
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "MALLOC_MMAP_THRESHOLD_": str(4 * 1024**3),
        "MALLOC_TRIM_THRESHOLD_": str(16 * 1024**3),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        hub_kernels.VARIABLE: hub_kernels.OFF,
    }
    if one_machine:
        variables["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    return variables


def free_port() -> int:
    """An unused port of this machine, if there is one below those that the kernel gives to connections.

    It is opened later, by another process; meanwhile only a program that wants this very port can take it.

    Raises:
        UserError: no port can be opened.
    """
    system = random.SystemRandom()  # no seed of the run: two runs would try the same ports
    for port in (*(system.randrange(*FREE_PORTS) for _ in range(_TRIED_PORTS)), 0):  # 0: as the kernel chooses
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    low, high = FREE_PORTS
    raise UserError(
        f"no port of {socket.gethostname()} can be opened. Let programs listen on ports {low} to {high - 1}."
    )


def _slurm_ranks(environ: Mapping[str, str], num_tasks: int) -> Ranks:
    rank, local_rank = int(environ["SLURM_PROCID"]), int(environ.get("SLURM_LOCALID", environ["SLURM_PROCID"]))
    counts = _tasks_per_node(_tasks_text(environ, num_tasks))
    local_world_size = counts[min(int(environ.get("SLURM_NODEID", 0)), len(counts) - 1)]
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
        node=int(environ.get("SLURM_NODEID", 0)),
    )


def _tasks_text(environ: Mapping[str, str], num_tasks: int) -> str:
    return environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(num_tasks)


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's run-length list: `2(x3),1` is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, repeat = part.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts


def _first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `node[03-05,07],login1` is node03."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0].strip()


def _port(environ: Mapping[str, str]) -> int:
    """A port that all ranks derive the same way, different for two steps of a job and below the ephemeral ports."""
    job, step = int(environ.get("SLURM_JOB_ID", 0)), int(environ["SLURM_STEP_ID"])
    return 15000 + (job + 101 * step) % 15000
