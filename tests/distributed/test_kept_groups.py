"""Compiling and sharding again in one process makes no more process groups, and no more threads."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import moecompile
from moecompile import kept_groups
from moecompile.mesh import MeshSpec
from moecompile.passes.shard import dense_mesh_of, device_mesh_of, shard
from moecompile.pipeline import plan_of
from tests.distributed.harness import run_distributed_test
from tests.tiny import TinyGPT, fake_rank, ids, one_rank

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
            dist.barrier(split["ep_inter"])
            meshes.append(mesh)
    assert meshes[0] is not meshes[1]


AXES = {"dp_replicate": 2, "edp": 2, "ep": 4}


@pytest.mark.parametrize("rank", [0, 5, 15])
def test_the_groups_of_a_mesh_are_those_of_torch(rank: int) -> None:
    with fake_rank(rank, 16):
        ours = kept_groups.device_mesh("cpu", AXES)
        theirs = init_device_mesh("cpu", tuple(AXES.values()), mesh_dim_names=tuple(AXES))
        for axis in AXES:
            assert dist.get_process_group_ranks(ours.get_group(axis)) == dist.get_process_group_ranks(
                theirs.get_group(axis)
            )
            assert ours.get_group(axis).group_desc == theirs.get_group(axis).group_desc == f"mesh_{axis}"
        assert (ours.mesh == theirs.mesh).all() and ours.get_coordinate() == theirs.get_coordinate()
        first = rank // 4 * 4
        split = kept_groups.split_axis(ours, "ep", {"ep_inter": 2, "ep_intra": 2})
        place = rank - first
        assert dist.get_process_group_ranks(split["ep_inter"]) == [first + place % 2, first + place % 2 + 2]
        assert dist.get_process_group_ranks(split["ep_intra"]) == [first + place // 2 * 2, first + place // 2 * 2 + 1]


def test_a_rank_makes_its_own_groups_however_many_ranks_there_are() -> None:
    """`init_device_mesh` calls for 16,384 / 64 + 64 groups of the axes alone, and for one of each rank."""
    made = 0
    new_group = dist.new_group

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        return new_group(*args, **kwargs)

    targets = [mock.patch.object(module, "new_group", counted) for module in (dist, torch.distributed.device_mesh)]
    mesh = MeshSpec(num_nodes=2048, ranks_per_node=8, ep=64)
    with fake_rank(9, mesh.world_size), targets[0], targets[1]:
        experts = device_mesh_of(mesh, "cpu")
        dense_mesh_of(mesh, "cpu")
        kept_groups.split_axis(experts, "ep", {"ep_inter": 8, "ep_intra": 8})
    assert made == 5


def in_unequal_groups(rank: int, world_size: int) -> list[float]:
    """Sums over the axes of a mesh, after rank 0 was in more groups than the others."""
    for ranks in ([0], [0, 1]):
        dist.new_group(ranks)
    mesh = kept_groups.device_mesh("cpu", {"dp_replicate": 1, "edp": 2, "ep": 2})
    groups = [mesh.get_group(axis) for axis in ("dp_replicate", "edp", "ep")]
    sums = [torch.tensor(10.0**rank) for _ in groups]
    for value, group in zip(sums, groups, strict=True):
        dist.all_reduce(value, group=group)
    return [float(value) for value in sums]


@pytest.mark.slow
def test_members_agree_on_the_name_of_a_group_though_they_are_in_unequally_many() -> None:
    found = run_distributed_test(in_unequal_groups, 4)
    assert found == [[1, 101, 11], [10, 1010, 11], [100, 101, 1100], [1000, 1010, 1100]]
