"""Without starting a rank: what the environment says about it, and which of several failures is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moecompile.errors import UserError
from moecompile.runtime import failures
from moecompile.runtime.ranks import Ranks, in_place_ranks, worker_variables

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


# -- torchrun and SLURM ----------------------------------------------------------------------------------------------

STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODELIST": "n[07-08],login",
}  # fmt: skip


def test_slurm_variables() -> None:
    ranks = in_place_ranks(STEP)
    assert ranks == Ranks(
        rank=2, world_size=4, local_rank=0, local_world_size=2, master_addr="n07", master_port=15000 + 4711,
        launcher="srun",
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
    ranks = in_place_ranks({**STEP, "SLURM_STEP_NODELIST": nodes})
    assert ranks is not None
    assert ranks.master_addr == first


def test_a_given_master_wins() -> None:
    ranks = in_place_ranks({**STEP, "MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert ranks is not None
    assert (ranks.master_addr, ranks.master_port) == ("head", 1234)


@pytest.mark.parametrize("missing", ["SLURM_STEP_ID", "SLURM_PROCID"])
def test_no_ranks_outside_of_a_job_step(missing: str) -> None:
    assert in_place_ranks({name: value for name, value in STEP.items() if name != missing}) is None


def test_a_step_of_one_task_launches_by_itself() -> None:
    assert in_place_ranks({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_slurm_cyclic_distribution_is_refused() -> None:
    with pytest.raises(UserError, match="--distribution=block --ntasks-per-node=2"):
        in_place_ranks({**STEP, "SLURM_PROCID": "1", "SLURM_LOCALID": "0"})


def test_torchrun_comes_before_slurm() -> None:
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "5"}
    ranks = in_place_ranks({**STEP, **torchrun})
    assert ranks is not None
    assert (ranks.rank, ranks.world_size, ranks.local_world_size, ranks.launcher) == (1, 2, 2, "torchrun")


def test_loopback_only_on_one_machine() -> None:
    assert "GLOO_SOCKET_IFNAME" in worker_variables(1, one_machine=True)
    assert "GLOO_SOCKET_IFNAME" not in worker_variables(1, one_machine=False)
