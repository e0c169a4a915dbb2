"""Without starting a rank: what the environment says about it, and which of several failures is told."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from moecompile import rundir
from moecompile.errors import ConfigError, UserError
from moecompile.runtime import external_launch, failures
from moecompile.runtime.external_launch import meet
from moecompile.runtime.launch import launch
from moecompile.runtime.ranks import (
    Ranks,
    check_alone,
    check_mesh,
    check_places,
    free_port,
    started_ranks,
    worker_variables,
)

# -- which failure is told -------------------------------------------------------------------------------------------


def _lost_peer() -> RuntimeError:
    return RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")


def _wrapped_lost_peer() -> RuntimeError:
    try:
        raise RuntimeError("while saving") from _lost_peer()
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("errors", "exit_codes", "told"),
    [
        ({1: _lost_peer(), 2: ValueError("x"), 0: KeyError("y")}, {1: 1, 2: 1, 0: 1}, "rank 2 of 3 failed: ValueError"),
        ({0: _lost_peer(), 1: _wrapped_lost_peer()}, {0: 1, 1: 1, 2: 3}, "rank 2 of 3 failed: the process ended"),
        ({0: ValueError("x")}, {2: -15, 0: 1, 1: -6}, "rank 0 of 3 failed: ValueError: x"),
        ({1: _lost_peer()}, {1: 1, 0: -15, 2: 143}, "rank 1 of 3 failed: RuntimeError: .*closed by peer"),
        ({}, {1: -15, 0: 143}, "rank 1 of 3 failed: killed by SIGTERM"),
        ({}, {0: -40}, "rank 0 of 3 failed: killed by signal 40"),
    ],
)
def test_the_first_failure_that_is_no_consequence_is_told(
    errors: dict[int, BaseException], exit_codes: dict[int, int], told: str, tmp_path: Path
) -> None:
    for rank, error in errors.items():
        failures.record(error, tmp_path, rank)
    assert re.match(told, str(failures.first_error(tmp_path, 3, exit_codes)))


def test_one_rank_claims_the_word(tmp_path: Path) -> None:
    failures.record(UserError("no"), tmp_path, 1)
    assert [failures.claim(tmp_path), failures.claim(tmp_path)] == [True, False]


@pytest.mark.parametrize("moment", ["record", "claim"])
def test_a_rank_that_fails_while_the_run_is_refused_says_nothing_more(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another rank has reported it, and takes the folder away between any two steps of this one."""
    (tmp_path / "plan.yaml").touch()  # of the previous run
    (tmp_path / rundir.PENDING).mkdir()
    monkeypatch.setattr(external_launch._state, "was_pending", True)
    found = getattr(failures, moment)

    def refused(*arguments: object) -> object:
        rundir.discard(tmp_path)
        return found(*arguments)

    monkeypatch.setattr(failures, moment, refused)
    ranks = started_ranks(STEP)
    assert ranks is not None
    assert external_launch._failed(UserError("no"), tmp_path, ranks) is None
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]
    assert capfd.readouterr() == ("", "")


# -- torchrun and SLURM ----------------------------------------------------------------------------------------------

STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODELIST": "n[07-08],login",
}  # fmt: skip


def test_slurm_variables() -> None:
    ranks = started_ranks(STEP)
    assert ranks == Ranks(
        rank=2, world_size=4, local_rank=0, local_world_size=2, master_addr="n07", master_port=15000 + 4711,
        launcher="srun", node=1,
    )  # fmt: skip
    assert ranks is not None
    assert ranks.variables() == {
        "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
        "MASTER_ADDR": "n07", "MASTER_PORT": "19711",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a1,a2", "a1"), ("n[003-005,9]-ib,x", "n003-ib"), ("n[12]", "n12"), ("r[1-2]c[3,4]", "r1c3")],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    ranks = started_ranks({**STEP, "SLURM_STEP_NODELIST": nodes})
    assert ranks is not None
    assert ranks.master_addr == first


def test_a_given_master_wins() -> None:
    ranks = started_ranks({**STEP, "MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert ranks is not None
    assert (ranks.master_addr, ranks.master_port) == ("head", 1234)


@pytest.mark.parametrize("missing", ["SLURM_STEP_ID", "SLURM_PROCID"])
def test_no_ranks_outside_of_a_job_step(missing: str) -> None:
    assert started_ranks({name: value for name, value in STEP.items() if name != missing}) is None


def test_a_step_of_one_task_launches_by_itself() -> None:
    assert started_ranks({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    "places",
    [[(0, 0), (1, 0), (0, 1), (1, 1)], [(0, 0), (0, 1), (1, 0)], [(0, 0), (0, 1), (0, 2), (1, 0)], [(1, 0), (0, 0)]],
)
def test_ranks_of_a_node_are_contiguous_and_as_many_on_each(places: list[tuple[int, int]]) -> None:
    with pytest.raises(
        UserError, match=r"srun started rank 0 .*: ranks must fill the nodes in order, .* --distribution=block"
    ):
        check_places(places, "srun")


@pytest.mark.parametrize("places", [[(0, 0)], [(0, 0), (0, 1)], [(0, 0), (0, 1), (1, 0), (1, 1)]])
def test_contiguous_ranks_are_accepted(places: list[tuple[int, int]]) -> None:
    check_places(places, "torchrun")


def test_which_meshes_fit_which_machines() -> None:
    assert check_mesh(2, 2, 2, 2, "srun") is None
    assert check_mesh(1, 4, 1, 4, "srun") is None
    assert check_mesh(4, 2, 2, 4, "srun") == "each machine plays 2 nodes of 2 ranks (mesh.num_nodes=4)"
    for nodes, per_node in ((1, 4), (3, 2)):
        with pytest.raises(ConfigError, match=r"Use mesh.num_nodes=2 mesh.ranks_per_node="):
            check_mesh(nodes, per_node, 2, 2 if nodes == 1 else 3, "srun")


def test_torchrun_comes_before_slurm() -> None:
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "5"}
    ranks = started_ranks({**STEP, **torchrun})
    assert ranks is not None
    assert (ranks.rank, ranks.world_size, ranks.local_world_size, ranks.launcher) == (1, 2, 2, "torchrun")


@pytest.mark.parametrize(
    "environ",
    [
        {
            **STEP,
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_RANK": "1",
        },  # mpirun in a batch job: the step is its own
        {"PMI_SIZE": "2", "PMI_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "5"},  # a pod, in which torchrun belongs
    ],
)
def test_several_processes_of_another_launcher_do_not_each_start_all_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environ: dict[str, str]
) -> None:
    assert started_ranks(environ) is None
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"_SIZE=.: this is one of . processes, .* Start them by torchrun or srun"):
        launch(2, tmp_path, module="none", threads=1)


def test_one_process_of_a_launcher_may_start_ranks() -> None:
    check_alone({"RANK": "0", "WORLD_SIZE": "1", "PMI_SIZE": "1", "PMI_RANK": "0"})


def test_loopback_only_on_one_machine() -> None:
    assert "GLOO_SOCKET_IFNAME" in worker_variables(1, one_machine=True)
    assert "GLOO_SOCKET_IFNAME" not in worker_variables(1, one_machine=False)


def test_a_free_port_is_none_that_a_connection_gets() -> None:
    """Ports are opened later: one that the kernel gives to another program's connection would be taken by then."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 40 and all(30_000 <= port < first for port in ports)


def test_no_free_port_is_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(self: socket.socket, address: tuple[str, int]) -> None:
        asked.append(address[1])
        raise PermissionError

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(UserError, match=r"no port of .* can be opened\. Let programs listen on ports 30000 to 32767\."):
        free_port()
    assert asked[-1] == 0 and len(asked) < 100  # at last as the kernel chooses


def test_ranks_that_torchrun_restarts_do_not_read_the_commands_of_the_attempt_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its agent keeps one store for all attempts. A rank that follows an old command writes into the run before."""
    from torch.distributed import TCPStore

    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    ranks = Ranks(
        rank=0, world_size=1, local_rank=0, local_world_size=1, master_addr="127.0.0.1", master_port=agent.port,
        launcher="torchrun",
    )  # fmt: skip
    for name, value in ranks.variables().items():
        monkeypatch.setenv(name, value)
    stores = []
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        meet.cache_clear()
        stores.append(meet(ranks))
    meet.cache_clear()
    stores[0].set("moecompile/command/0", "old")
    assert stores[0].check(["moecompile/command/0"]) and not stores[1].check(["moecompile/command/0"])
