"""Reads and writes stacks of experts by global id, whatever order ranks hold them in, without moving any.

Torch DCP describes an entry by chunks, each at an offset in the whole tensor. Of a stack that is sharded in another
order (moecompile.nn.placement), a rank's rows are several chunks: one for each run of rows that follow one another in
the order of ids. DCP checks that the chunks of all ranks cover the tensor once.

The rank that coordinates handles each chunk that a rank offers. So a chunk that several ranks hold is offered by one of
them, and an empty one by none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from moecompile.collector import uncollected
from moecompile.nn.placement import Order, expert_orders, global_rows, runs_of
from moecompile.torch_private import checked_already, local_block, local_part

Orders = Mapping[str, Order]
BY_ID: Orders = {}


def orders_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Order]:
    """Entry of a checkpoint -> the expert at each position, for entries whose experts are not sorted by id."""
    orders, found = expert_orders(model), dict[str, Order]()
    for entry, tensor in tensors.items():
        kind, _, name = entry.partition(".")
        order = orders.get(name if kind == "model" else name.rpartition(".")[0])
        if order is not None and isinstance(tensor, DTensor) and "ep" in (tensor.device_mesh.mesh_dim_names or ()):
            found[entry] = order
    return found


class _Parts:
    """The chunks of this rank's part of each placed entry: where they are in the whole and in the part."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self._starts: dict[tuple[str, torch.Size], tuple[int, int]] = {}

    def chunks(self, entry: str, tensor: Tensor) -> list[ChunkStorageMetadata]:
        """The chunks of a placed entry."""
        chunks, within = [], local_block(tensor)[1:]
        for start, rows in runs_of(global_rows(tensor, self.orders[entry])):
            offsets = torch.Size([rows.start, *(cut.start for cut in within)])
            sizes = torch.Size([len(rows), *(cut.stop - cut.start for cut in within)])
            self._starts[entry, offsets] = (start, len(rows))
            chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=sizes))
        return chunks

    def part(self, index: MetadataIndex, tensor: Tensor) -> Tensor:
        """The rows of a chunk, as a view of this rank's part."""
        assert index.offset is not None
        start, length = self._starts[index.fqn, index.offset]
        return local_part(tensor).narrow(0, start, length)


class SaveById(DefaultSavePlanner):
    """Writes each row to where its global id says."""

    def __init__(self, orders: Orders) -> None:
        super().__init__()
        self._parts = _Parts(orders)

    def create_local_plan(self) -> SavePlan:
        """The plan of what this rank writes, with the chunks of placed entries."""
        plan, items = super().create_local_plan(), list[WriteItem]()
        for item in plan.items:
            if not _writes(item, self.state_dict[item.index.fqn]):
                continue
            if item.index.fqn not in self._parts.orders:
                items.append(item)
                continue
            for chunk in self._parts.chunks(item.index.fqn, self.state_dict[item.index.fqn]):
                assert item.tensor_data is not None
                data = replace(item.tensor_data, chunk=chunk)
                items.append(replace(item, index=MetadataIndex(item.index.fqn, chunk.offsets), tensor_data=data))
        self.plan = replace(plan, items=items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """On the rank that coordinates: what each rank writes, and the index."""
        with checked_already(is_tiled), uncollected():
            return super().create_global_plan(all_plans)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """What a write item writes."""
        if index.fqn in self._parts.orders:
            return self._parts.part(index, self.state_dict[index.fqn])
        return super().lookup_object(index)


def is_tiled(entry: TensorStorageMetadata) -> bool:
    """Whether the chunks of an entry are all the cells of a grid, each once.

    torch compares each chunk with those that share its rows of the longest dim: of a stack that is cut along another
    one, all with all. Of cells it is enough to look at the cuts along each dim.
    """
    if not entry.size:
        return False
    num_cells = 1
    for dim, size in enumerate(entry.size):
        cuts = sorted({(chunk.offsets[dim], chunk.sizes[dim]) for chunk in entry.chunks})
        end = 0
        for offset, length in cuts:
            if offset != end or not length:
                return False
            end += length
        if end != size:
            return False
        num_cells *= len(cuts)
    return num_cells == len(entry.chunks) == len({chunk.offsets for chunk in entry.chunks})


def _writes(item: WriteItem, entry: Tensor) -> bool:
    """Whether this rank writes its part of an entry: of its replicas, one does, which the entry's name decides."""
    assert item.tensor_data is not None
    if not isinstance(entry, DTensor):  # DCP finds one of the ranks that have it
        return True
    if 0 in item.tensor_data.chunk.sizes and entry.numel():
        return False
    place, number, index = entry.device_mesh.get_coordinate(), 1, 0
    assert place is not None
    for placement, size, here in zip(entry.placements, entry.device_mesh.shape, place, strict=True):
        if placement.is_replicate():
            number, index = number * size, index * size + here
    return crc32(item.index.fqn.encode()) % number == index


class LoadById(DefaultLoadPlanner):
    """Reads each row from where its global id says."""

    def __init__(self, orders: Orders) -> None:
        super().__init__()
        self._parts = _Parts(orders)

    def create_local_plan(self) -> LoadPlan:
        """The plan, with the chunks of placed entries."""
        plan = super().create_local_plan()
        items = [item for item in plan.items if item.dest_index.fqn not in self._parts.orders]
        for entry in self._parts.orders:
            assert self.metadata is not None
            saved = self.metadata.state_dict_metadata[entry]
            assert isinstance(saved, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(entry, saved, self._parts.chunks(entry, self.state_dict[entry]))
        return replace(plan, items=items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """What a read item is read into."""
        if index.fqn in self._parts.orders:
            return self._parts.part(index, self.state_dict[index.fqn])
        return super().lookup_tensor(index)
