"""What ranks offer to the one that coordinates a checkpoint, and how it checks them; no rank is started."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor, Replicate, Shard

from moecompile import kept_groups
from moecompile.checkpoint.placed import SaveById, is_tiled
from tests.tiny import fake_rank

NAMES = tuple(f"weight{i}" for i in range(16))


def part(rank: int, world_size: int, rows: int) -> tuple[SavePlan, SaveById]:
    """Of a rank: entries of `rows` rows, with a replica in each half of the ranks."""
    with fake_rank(rank, world_size):
        mesh = kept_groups.device_mesh("cpu", {"dp_replicate": 2, "dp_shard": world_size // 2})
        place = mesh.get_local_rank("dp_shard")
        size = -(-rows // (world_size // 2))
        local = torch.empty(max(0, min(size, rows - place * size)), 4)
        tensor = DTensor.from_local(
            local, mesh, [Replicate(), Shard(0)], run_check=False, shape=torch.Size((rows, 4)), stride=(4, 1)
        )
        planner = SaveById({})
        planner.set_up_planner(dict.fromkeys(NAMES, tensor), is_coordinator=rank == 0)
        return planner.create_local_plan(), planner


def test_of_two_replicas_one_offers_a_shard_and_they_share_the_work() -> None:
    parts = [part(rank, 8, rows=8)[0] for rank in range(8)]
    offered = Counter((item.index.fqn, item.index.offset) for each in parts for item in each.items)
    assert len(offered) == 4 * len(NAMES) and set(offered.values()) == {1}
    assert all(4 <= len(each.items) <= 12 for each in parts)


def test_an_empty_shard_is_not_offered_and_the_index_is_whole() -> None:
    parts, planners = zip(*(part(rank, 16, rows=3) for rank in range(16)), strict=True)
    assert sum(len(each.items) for each in parts) == 3 * len(NAMES)
    _, index = planners[0].create_global_plan(list(parts))
    chunks = [each.chunks for each in index.state_dict_metadata.values() if isinstance(each, TensorStorageMetadata)]
    assert len(chunks) == len(NAMES) and all(len(each) == 3 for each in chunks)
    with pytest.raises(ValueError, match="Failed to validate global plan"):
        planners[0].create_global_plan([replace(parts[0], items=parts[0].items[1:]), *parts[1:]])


def stack(num: int, *, moved: int = 0) -> TensorStorageMetadata:
    """Experts of 8 ranks, each of which `num` ranks cut along the shorter dim; one chunk may lie elsewhere."""
    size = torch.Size((8, num, 4 * num))
    chunks = [
        ChunkStorageMetadata(offsets=torch.Size((e, i, 0)), sizes=torch.Size((1, 1, 4 * num)))
        for e in range(8)
        for i in range(num)
    ]
    if moved:
        chunks[-1] = ChunkStorageMetadata(offsets=chunks[-1 - moved].offsets, sizes=chunks[-1].sizes)
    return TensorStorageMetadata(properties=TensorProperties(), size=size, chunks=chunks)


def compared(num: int) -> int:
    """How many pairs of chunks are compared where `num` ranks share an expert."""
    entry = stack(num)
    metadata = default_planner.Metadata({"experts": entry})
    planner = SaveById({})
    planner.flatten_state_dict = False
    with (
        mock.patch.object(default_planner, "create_default_global_save_plan", lambda plans: (plans, metadata)),
        mock.patch.object(default_planner, "_check_box_overlap", return_value=False) as compares,
    ):
        planner.create_global_plan([SavePlan([]), SavePlan([])])
    return compares.call_count


def test_chunks_that_tile_a_stack_are_not_compared_with_one_another() -> None:
    """torch compares those with all that share their rows of the longest dim: 2,016 pairs at 8 times 8 ranks."""
    assert [compared(num) for num in (2, 8, 32)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "tiles"),
    [
        ({}, True),
        ({"moved": 1}, False),
        ({"moved": 9}, False),
    ],
)
def test_what_is_not_tiled_is_left_to_torch(change: Any, tiles: bool) -> None:
    entry = stack(8, **change)
    assert is_tiled(entry) is tiles
    if change:
        found = default_planner._validate_global_plan([], default_planner.Metadata({"experts": entry}))
        assert found not in (True, [])  # what is wrong, or before torch 2.12 False


def test_a_gap_and_uneven_cells_are_not_tiles() -> None:
    def entry(*chunks: tuple[int, int], size: int = 4) -> TensorStorageMetadata:
        found = [ChunkStorageMetadata(offsets=torch.Size([a]), sizes=torch.Size([n])) for a, n in chunks]
        return TensorStorageMetadata(properties=TensorProperties(), size=torch.Size([size]), chunks=found)

    assert is_tiled(entry((0, 3), (3, 1)))
    for chunks in ([(0, 3)], [(0, 3), (2, 2)], [(1, 3)], [(0, 2), (2, 2), (2, 2)], [(0, 2), (2, 3)], []):
        assert not is_tiled(entry(*chunks))


def test_a_tensor_without_a_mesh_is_offered_by_all_of_its_ranks() -> None:
    """A rank may be the only one that has it; DCP takes one."""
    planner = SaveById({})
    state: dict[str, Tensor] = {"step": torch.tensor(1.0)}
    planner.set_up_planner(state, is_coordinator=False)
    assert [item.index.fqn for item in planner.create_local_plan().items] == ["step"]
