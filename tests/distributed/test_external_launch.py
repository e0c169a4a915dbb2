"""Ranks that torchrun or SLURM started: success, and one message for every way to fail, whoever fails."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest

from moecompile.runtime.external_launch import ANSWER_TIMEOUT_S, GRACE_S
from moecompile.runtime.ranks import free_port
from moecompile.schema import TrainerConfig
from tests.forked import NEW_WORKERS, Program, python

PROGRAM = ["-m", "tests.distributed.launcher_program"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node"]
REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("from_the_repository")


def run(words: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    """torchrun is forked, and so are its ranks."""
    return python(*words, cwd=REPOSITORY, timeout_s=240, environ=environ)


def errors(text: str) -> list[str]:
    """What was told; torchrun has its own report, which has other words."""
    return [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_torchrun_in_place(tmp_path: Path) -> None:
    runs = [tmp_path / "first", tmp_path / "second"]  # as a multirun: one process, a new process group each time
    result = run([*TORCHRUN, "2", *PROGRAM, "2", *map(str, runs)], MESH_NODES="2")
    assert result.returncode == 0, result.stderr
    for folder in runs:
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        assert names == ["done_0", "done_1", "logs/rank_0.log", "logs/rank_1.log", "started_0", "started_1"]
        assert (folder / "logs/rank_1.log").read_text() == "rank 1: no terminal\n"
    said = "this machine plays 2 nodes of 1 ranks (mesh.num_nodes=2)\n"
    assert result.stdout == 2 * f"{said}rank 0: no terminal\n"


ENDED = r"rank {rank} of 2 failed: the process has ended without a message \(killed by SIGKILL\?.*"
RAISED = r"rank {rank} of 2 failed: ZeroDivisionError: in the middle of it \(see .*/errors/rank_{rank}\.txt\)"
MISTAKE = r"routing\.top_k=9: must be at most 8\. Use 8\."
LEFT = r"rank {rank} of 2 failed: [\w.]*RankFailure: the process wanted to end with exit code 0 .*"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("phase", "mode", "told"),
    [
        ("middle", "raise", RAISED),
        ("start", "raise", RAISED),
        ("middle", "late", RAISED),
        ("middle", "mistake", MISTAKE),
        ("middle", "kill", ENDED),
        ("start", "kill", ENDED),
        ("middle", "exit", ENDED),
        ("middle", "leave", LEFT),
    ],
)
def test_torchrun_failure_is_told_once(phase: str, mode: str, told: str, rank: int, tmp_path: Path) -> None:
    result = run(
        [*TORCHRUN, "2", *PROGRAM, "2", str(tmp_path)], MODE=mode, PHASE=phase, FAILING_RANK=str(rank)
    )  # fmt: skip
    assert result.returncode != 0
    found = errors(result.stderr)
    assert len(found) == 1 and re.fullmatch(told.format(rank=rank), found[0]), result.stderr
    assert (tmp_path / "logs" / "rank_1.log").is_file()


@pytest.mark.slow
def test_torchrun_with_another_number_of_ranks(tmp_path: Path) -> None:
    result = run([*TORCHRUN, "2", *PROGRAM, "4", str(tmp_path)])
    assert result.returncode != 0
    assert errors(result.stderr) == [
        "mesh.num_nodes * mesh.ranks_per_node=4: torchrun started 2 ranks, 2 on each of 1 machine. "
        "Use mesh.num_nodes=1 mesh.ranks_per_node=2, or start 4 ranks."
    ]


BROKEN = """
import os, sys
if os.environ.get("RANK") in os.environ["BROKEN"].split(",") and "tests.distributed.launcher_program" in sys.orig_argv:
    sys.modules["torch"] = None
"""


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["0", "1", "0,1"])
def test_an_import_that_fails_before_the_ranks_have_met(broken: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    path = os.pathsep.join((str(tmp_path), str(REPOSITORY)))
    environ = {"BROKEN": broken, "PYTHONPATH": path, NEW_WORKERS: "1"}  # whose Python has yet to import torch
    result = run([*TORCHRUN, "2", *PROGRAM, "2", str(tmp_path / "run")], **environ)
    assert result.returncode != 0
    assert result.stderr.count("ModuleNotFoundError: No module named 'torch.distributed'") == 1, result.stderr


def slurm(world_size: int, places: list[tuple[int, int]], **environ: str) -> list[Program]:
    """The processes of a job step; `places`: node and local rank of each."""
    nodes = len({node for node, _ in places})
    common = {
        "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": str(len(places)),
        "SLURM_TASKS_PER_NODE": f"{len(places) // nodes}(x{nodes})", "SLURM_JOB_NODELIST": "localhost",
        "MASTER_PORT": str(free_port()), **environ,
    }  # fmt: skip
    processes = []
    for rank, (node, local_rank) in enumerate(places):
        place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local_rank), "SLURM_NODEID": str(node)}
        processes.append(
            Program(*PROGRAM, str(world_size), environ["RUN"], cwd=REPOSITORY, environ={**common, **place})
        )
    return processes


def ended(processes: list[Program]) -> tuple[list[int], list[str], str]:
    """Exit codes, all that was told, and the output."""
    outputs = [process.communicate(timeout_s=240) for process in processes]
    told = [line for _, text in outputs for line in errors(text)]
    return [process.wait() for process in processes], told, "".join(text for text, _ in outputs)


def test_slurm_in_place(tmp_path: Path) -> None:
    codes, told, _ = ended(slurm(2, [(0, 0), (0, 1)], RUN=str(tmp_path)))
    assert (codes, told) == ([0, 0], [])
    assert (tmp_path / "done_1").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("mode", "told"), [("raise", RAISED), ("kill", ENDED), ("mistake", MISTAKE)])
def test_slurm_failure_is_told_once(mode: str, told: str, rank: int, tmp_path: Path) -> None:
    """srun does not end the other ranks by itself."""
    places = [(0, 0), (0, 1)]
    codes, found, _ = ended(slurm(2, places, RUN=str(tmp_path), MODE=mode, FAILING_RANK=str(rank)))
    assert all(codes)
    assert len(found) == 1 and re.fullmatch(told.format(rank=rank), found[0]), found


@pytest.mark.slow
def test_ranks_that_do_not_fit_the_mesh(tmp_path: Path) -> None:
    two_machines = [(0, 0), (0, 1), (1, 0), (1, 1)]
    codes, told, _ = ended(slurm(4, two_machines, RUN=str(tmp_path)))
    assert codes == [2, 2, 2, 2]
    assert told == [
        "mesh.num_nodes=1: srun started 4 ranks, 2 on each of 2 machines, and a node of the mesh would lie on several "
        "of them. Use mesh.num_nodes=2 mesh.ranks_per_node=2, or start 4 ranks on 1 machine."
    ]
    cyclic = [(0, 0), (1, 0), (0, 1), (1, 1)]
    codes, told, _ = ended(slurm(4, cyclic, RUN=str(tmp_path), MESH_NODES="2"))
    assert codes == [2, 2, 2, 2]
    assert told == [
        "srun started rank 0 on node 0, 1 on node 1, 2 on node 0, 3 on node 1: ranks must fill the nodes in order, the "
        "same number on each. Start them with srun --distribution=block --ntasks-per-node=2."
    ]
    assert list(tmp_path.iterdir()) == []
    one_machine = [(0, 0), (0, 1), (0, 2), (0, 3)]
    codes, told, output = ended(slurm(4, one_machine, RUN=str(tmp_path), MESH_NODES="2"))
    assert (codes, told) == ([0, 0, 0, 0], [])
    assert "this machine plays 2 nodes of 2 ranks (mesh.num_nodes=2)\n" in output


@pytest.mark.slow
def test_a_master_without_an_address_is_told_once(tmp_path: Path) -> None:
    codes, told, _ = ended(slurm(2, [(0, 0), (0, 1)], RUN=str(tmp_path), MASTER_ADDR="nowhere.invalid"))
    assert codes == [2, 2]
    assert [re.sub(r"on .*? \(.*\)\.", "on HOST.", line) for line in told if "(rank 1" not in line] == [
        "MASTER_ADDR=nowhere.invalid: has no address on HOST. Set it to a name or address of rank 0's machine."
    ]


@pytest.mark.slow
def test_a_silent_program_at_the_masters_port_ends_all_ranks(tmp_path: Path) -> None:
    """It takes connections and never answers: under torchrun all ranks ask it, under SLURM all but the first one."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        port = str(silent.getsockname()[1])
        place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "ANSWER_TIMEOUT_S": "3"}
        start = time.monotonic()
        ranks = [
            Program(*PROGRAM, "2", str(tmp_path), cwd=REPOSITORY, environ={**place, "RANK": rank, "LOCAL_RANK": rank})
            for rank in "01"
        ]
        codes, told, _ = ended(ranks)
    assert codes == [2, 2] and time.monotonic() - start < 60
    assert TrainerConfig().timeout_s > ANSWER_TIMEOUT_S + GRACE_S
    assert told == [
        f"MASTER_PORT={port}: another program uses this port of 127.0.0.1; it takes connections, and has not answered in "
        "3 s. Set MASTER_PORT to a free one."
    ]
