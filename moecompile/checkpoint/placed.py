"""Reads and writes stacks of experts by global id, whatever order ranks hold them in, without moving any.

Torch DCP describes an entry by chunks, each at an offset in the whole tensor. Of a stack that is sharded in another
order (moecompile.nn.placement), a rank's rows are several chunks: one for each run of rows that follow one another in
the order of ids. DCP checks that the chunks of all ranks cover the tensor once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from moecompile.nn.placement import Order, expert_orders, global_rows, runs_of
from moecompile.torch_private import local_block, local_part

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
        """The plan, with the chunks of placed entries."""
        plan, items = super().create_local_plan(), list[WriteItem]()
        for item in plan.items:
            if item.index.fqn not in self._parts.orders:
                items.append(item)
                continue
            for chunk in self._parts.chunks(item.index.fqn, self.state_dict[item.index.fqn]):
                assert item.tensor_data is not None
                data = replace(item.tensor_data, chunk=chunk)
                items.append(replace(item, index=MetadataIndex(item.index.fqn, chunk.offsets), tensor_data=data))
        self.plan = replace(plan, items=items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """What a write item writes."""
        if index.fqn in self._parts.orders:
            return self._parts.part(index, self.state_dict[index.fqn])
        return super().lookup_object(index)


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
