"""Saving on two ranks: killed at random moments, in the background, and when it cannot be written."""

from __future__ import annotations

import itertools
import os
import random
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from moecompile.checkpoint import folders
from moecompile.checkpoint.resume import State, read_state
from moecompile.checkpoint.tensors import read_tensors, shapes
from moecompile.checkpoint.writer import Writer
from moecompile.errors import UserError
from moecompile.mesh import MeshSpec
from moecompile.plan import Plan
from tests.distributed.harness import run_distributed_test

PLAN = Plan(mesh=MeshSpec(ranks_per_node=2), layers=(), reductions=())
SIZE, NUM_TENSORS, TRIALS = 20_000, 8, 20


def writer(folder: Path, *, background: bool = True, keep_last: int = 2) -> Writer:
    group = dist.new_group(backend="gloo")
    return Writer(folder, PLAN, keep_last=keep_last, background=background, group=group)


def state(step: int) -> State:
    return State(step=step, sequences=0, fixed={}, world_size=2, plan_hash=PLAN.hash, versions={})


def tensors(step: int) -> dict[str, Tensor]:
    """Every value of every entry is the step, so that a mix of two saves shows; half of each on either rank."""
    mesh = init_device_mesh("cpu", (2,))
    local = torch.full((SIZE // 2,), float(step))
    return {f"model.{i}": DTensor.from_local(local.clone(), mesh, [Shard(0)]) for i in range(NUM_TENSORS)}


def whole_step(folder: Path) -> int:
    """The step of the latest checkpoint, after every value in it was looked at. Read without a process group."""
    latest = folders.find("auto", folder.parent)
    if latest is None:
        return 0
    step = read_state(latest).step
    found = {name: torch.zeros(shape) for name, shape in shapes(latest).items()}
    read_tensors(latest, found, orders={})
    assert len(found) == NUM_TENSORS and all(bool((value == step).all()) for value in found.values())
    return step


# -- kill -9 at any moment -----------------------------------------------------------------------------------------------


def save_without_end(rank: int, world_size: int, run_dir: str) -> None:
    checkpoints = folders.checkpoints_of(Path(run_dir))
    first = 0 if (latest := folders.latest(checkpoints)) is None else read_state(latest).step
    dist.barrier()
    if rank == 0:
        folders.set_aside(Path(run_dir), first)
    saves = writer(checkpoints)
    dist.barrier()
    Path(run_dir, f"pid_{rank}").write_text(str(os.getpid()))
    for step in itertools.count(first + 1):
        saves.save(tensors(step), state(step), {})


def kill_one(run_dir: Path, rank: int, num_saves: int, delay: float) -> None:
    """Kills `rank` a moment after so many more checkpoints are there."""
    checkpoints = folders.checkpoints_of(run_dir)
    wanted = num_saves + max([0, *folders.steps(checkpoints)])
    path = run_dir / f"pid_{rank}"
    while not path.exists() or not path.read_text() or max([0, *folders.steps(checkpoints)]) < wanted:
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.mark.slow
def test_killed_at_any_moment_a_whole_checkpoint_is_found(tmp_path: Path) -> None:
    """20 times, one of two ranks that do nothing but save; each attempt goes on from what the one before has left."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # shown if it fails
    generator, steps, moments = random.Random(seed), [0], []
    for _ in range(TRIALS):
        for path in tmp_path.glob("pid_*"):
            path.unlink()
        what = generator.randrange(2), generator.randrange(3), generator.uniform(0.0, 0.1)
        killer = threading.Thread(target=kill_one, args=(tmp_path, *what))
        killer.start()
        with pytest.raises(RuntimeError):  # the killed rank's exit code, or its peer's broken connection
            run_distributed_test(save_without_end, 2, str(tmp_path), timeout_s=60)
        killer.join()
        steps.append(whole_step(folders.checkpoints_of(tmp_path)))
        moments.append(bool(list(folders.checkpoints_of(tmp_path).glob("*.tmp"))))
    assert steps == sorted(steps) and steps[-1] >= TRIALS // 2  # nothing that was once saved is lost
    assert any(moments)  # some were killed within a save


# -- in the background ---------------------------------------------------------------------------------------------------


def in_the_background(rank: int, world_size: int, run_dir: str) -> tuple[int, float]:
    """Tensors change right after `save`; later saves wait for earlier ones."""
    saves, checkpoints = writer(folders.checkpoints_of(Path(run_dir))), folders.checkpoints_of(Path(run_dir))
    values = tensors(1)
    for step in (1, 2, 3):
        for value in values.values():
            value.to_local().fill_(step)
        saves.save(values, state(step), {})
        for value in values.values():
            value.to_local().fill_(-1.0)
    saves.wait()
    saves.check()  # nothing is pending
    dist.barrier()
    return whole_step(checkpoints), float(len(folders.steps(checkpoints)))


def full(rank: int, world_size: int, run_dir: str) -> list[str]:
    """Rank 1 may write no file as large as its shard: as on a full disk."""
    checkpoints = folders.checkpoints_of(Path(run_dir))
    writer(checkpoints, background=False).save(tensors(1), state(1), {})
    told = []
    for background in (False, True):
        saves = writer(checkpoints, background=background)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            saves.save(tensors(2), state(2), {})
            saves.wait()
        except UserError as error:
            told.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        dist.barrier()
        assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-1"]
    return told


def both(rank: int, world_size: int, folder: str) -> tuple[tuple[int, float], list[str]]:
    return in_the_background(rank, world_size, f"{folder}/background"), full(rank, world_size, f"{folder}/full")


@pytest.mark.slow
def test_in_the_background_and_on_a_full_disk(tmp_path: Path) -> None:
    for background, told in run_distributed_test(both, 2, str(tmp_path), timeout_s=60):
        assert background == (3, 2)
        assert (
            told
            == [
                f"the checkpoint of step 2 could not be written to {tmp_path}/full/checkpoints on rank 1: [Errno 27] File "
                "too large. The checkpoints before it are whole, the latest is step-1. Make room, lower trainer.keep_last, "
                "or use another hydra.run.dir, and resume with trainer.resume."
            ]
            * 2
        )
    assert whole_step(folders.checkpoints_of(tmp_path / "full")) == 1
