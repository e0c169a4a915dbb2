"""Compiling and sharding again in one process makes no more process groups, and no more threads."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import moecompile
from moecompile import kept_groups
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import plan_of
from tests.distributed.harness import run_distributed_test
from tests.tiny import TinyGPT, ids, one_rank

MESH = ["mesh.num_nodes=2", "mesh.ranks_per_node=2", "mesh.ep=4", "dispatch=hierarchical"]


def compiles_thrice(rank: int, world_size: int) -> list[int]:
    """Threads of the process after each of three models."""
    threads = []
    for _ in range(3):
        torch.manual_seed(0)
        model = moecompile.compile_model(TinyGPT(), MESH, example=ids())
        plan = plan_of(model)
        shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
        model(ids()).sum().backward()
        threads.append(len(os.listdir("/proc/self/task")))
    return threads


@pytest.mark.slow
def test_three_models_have_the_threads_of_one() -> None:
    for first, *later in run_distributed_test(compiles_thrice, 4):
        assert later == [first, first]


def test_a_group_is_kept_by_what_it_is_for_and_not_longer_than_the_others(tmp_path: Path) -> None:
    soon, later = timedelta(seconds=5), timedelta(seconds=6)
    meshes = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        with one_rank(tmp_path / name):
            mesh = kept_groups.device_mesh("cpu", {"edp": 1, "ep": 1})
            assert mesh is kept_groups.device_mesh("cpu", {"edp": 1, "ep": 1})
            assert mesh is not kept_groups.device_mesh("cpu", {"ep": 1, "edp": 1})
            split = kept_groups.split_axis(mesh, "ep", {"ep_inter": 1, "ep_intra": 1})
            assert split is kept_groups.split_axis(mesh, "ep", {"ep_inter": 1, "ep_intra": 1})
            group = kept_groups.cpu_group("a", soon)
            assert group is kept_groups.cpu_group("a", soon)
            assert group is not kept_groups.cpu_group("b", soon)
            assert group is not kept_groups.cpu_group("a", later)
            dist.barrier(group)
            dist.barrier(split.get_group("ep_inter"))
            meshes.append(mesh)
    assert meshes[0] is not meshes[1]
