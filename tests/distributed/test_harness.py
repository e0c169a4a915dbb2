"""The harness reports what a rank returned or raised, and never hangs."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from moecompile.errors import ConfigError
from tests.distributed.harness import run_distributed_test


def _sum(rank: int, world_size: int, offset: torch.Tensor) -> torch.Tensor:
    total = torch.tensor([rank, world_size])
    dist.all_reduce(total)
    return total + offset


def _fail(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ConfigError("mesh.ep", 3, "must divide", "Use 2")
    dist.barrier()


def _die(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _hang(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(100)
    dist.barrier()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_in_rank_order(world_size: int) -> None:
    results = run_distributed_test(_sum, world_size, torch.tensor([1, 0]))
    expected = [world_size * (world_size - 1) // 2 + 1, world_size**2]
    assert [result.tolist() for result in results] == [expected] * world_size


def test_the_first_failure_is_raised_with_its_traceback() -> None:
    with pytest.raises(ConfigError, match=r"mesh.ep=3: must divide. Use 2.") as caught:
        run_distributed_test(_fail, 4)
    assert caught.value.__notes__[0].startswith("rank 1 of 4:\nTraceback")
    assert "in _fail" in caught.value.__notes__[0]


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(RuntimeError, match="rank 1 died with exit code -9"):
        run_distributed_test(_die, 2)


def test_a_hanging_rank_is_killed() -> None:
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 did not end"):
        run_distributed_test(_hang, 2, timeout_s=3)
    assert time.monotonic() - begin < 60  # long before its sleep ends, however busy the machine is


def _compute(rank: int, world_size: int, seconds: float) -> None:
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        pass


def _crash(rank: int, world_size: int) -> None:
    if rank == 1:
        ctypes.string_at(0)
    dist.barrier()


@pytest.mark.slow
def test_a_rank_that_computes_goes_on_until_it_has_used_the_cores_for_that_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    run_distributed_test(_compute, 1, 3, timeout_s=2)
    with pytest.raises(TimeoutError) as caught:
        run_distributed_test(_compute, 1, 1000, timeout_s=2)
    assert "in _compute" in caught.value.__notes__[0]


def test_a_rank_that_crashes_shows_where() -> None:
    with pytest.raises(RuntimeError, match="rank 1 died with exit code -11") as caught:
        run_distributed_test(_crash, 2)
    assert any("rank 1 was here" in note and "in _crash" in note for note in caught.value.__notes__)


def _collects(rank: int, world_size: int) -> tuple[bool, int, int]:
    """Whether a rank collects, and how many objects it leaves alone, before and after it has forked."""
    before, (receiver, sender) = gc.get_freeze_count(), os.pipe()
    if os.fork() == 0:
        os.write(sender, str(gc.get_freeze_count()).encode())
        os._exit(0)
    os.wait()
    return gc.isenabled(), before, int(os.read(receiver, 20))


def test_ranks_collect_what_is_theirs() -> None:
    """Not what the fork server has imported; and what a rank forks freezes nothing that is the rank's."""
    ((is_enabled, frozen, of_its_child),) = run_distributed_test(_collects, 1)
    assert is_enabled and of_its_child <= frozen and frozen > 100_000
