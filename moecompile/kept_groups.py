"""Process groups that are made once, and by their members alone.

A process that compiles or trains again uses the groups of the first time: each group of gloo has a thread that wakes a
hundred times a second, and is not freed before the process group of all ranks is. Two ranks that had trained fifty
models had eight hundred, which took a seventh of two cores.

A rank makes the groups in which it is: one for each axis of a mesh. `init_device_mesh` makes those of all ranks on
every rank, 18,440 for the experts of 16,384 ranks. All members of a group must give it the same name, which torch
counts; here the mesh, the axis and the first rank name it, so that equal meshes share a group. NCCL that is bound to a
device splits an axis into all its groups in one call of all ranks, which torch does by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from math import prod
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moecompile.torch_private import group_of_members, unflattened

_Made = TypeVar("_Made")
_kept: dict[ProcessGroup | None, dict[Hashable, Any]] = {}
"""What was made, by the process group of all ranks that it belongs to; with another one, it is forgotten."""


def device_mesh(device_type: str, axes: Mapping[str, int]) -> DeviceMesh:
    """The device mesh of all ranks with these axes: sizes by name, the slowest first.

    All ranks call it with the same arguments, after the process group is initialized.
    """
    names, sizes = tuple(axes), tuple(axes.values())

    def make() -> DeviceMesh:
        if _splits_in_one_call():
            return init_device_mesh(device_type, sizes, mesh_dim_names=names)
        ranks = torch.arange(prod(sizes), dtype=torch.int).view(sizes)
        mesh_name = f"{device_type}.{'.'.join(f'{name}{size}' for name, size in axes.items())}"
        groups = _groups_along(ranks, names, mesh_name)
        return DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=names)

    return _once((device_type, names, sizes), make)


def split_axis(mesh: DeviceMesh, axis: str, sizes: Mapping[str, int]) -> dict[str, ProcessGroup]:
    """The groups of this rank along the axes of these sizes into which `axis` is split, the last one varying fastest.

    All ranks call it with the same arguments.
    """
    names = tuple(sizes)

    def make() -> tuple[DeviceMesh, dict[str, ProcessGroup]]:
        if _splits_in_one_call():
            split = unflattened(mesh, axis, dict(sizes))
            return split, {name: split.get_group(name) for name in names}
        of = mesh.mesh.movedim((mesh.mesh_dim_names or ()).index(axis), -1).unflatten(-1, tuple(sizes.values()))
        into = ".".join(f"{name}{size}" for name, size in sizes.items())
        groups = _groups_along(of, names, f"{mesh.get_group(axis).group_name}.{axis}.{into}")
        return mesh, dict(zip(names, groups, strict=True))

    return _once((id(mesh), axis, *sizes.items()), lambda: (mesh, make()))[1][1]  # keeps `mesh`, so its id


def _splits_in_one_call() -> bool:
    return dist.group.WORLD is not None and dist.group.WORLD.bound_device_id is not None


def _groups_along(ranks: Tensor, names: tuple[str, ...], mesh_name: str) -> list[ProcessGroup]:
    """The groups of this rank along the last dims of `ranks`, which are named. ranks: all global ranks, each once."""
    every = dist.group.WORLD
    assert every is not None
    place, groups = (ranks == dist.get_rank()).nonzero()[0].tolist(), list[ProcessGroup]()
    for dim, name in zip(range(ranks.dim() - len(names), ranks.dim()), names, strict=True):
        mine: list[int] = ranks.movedim(dim, -1)[tuple(place[:dim] + place[dim + 1 :])].tolist()
        if len(mine) == dist.get_world_size():
            groups.append(every)
        else:
            full, purpose = f"{mesh_name}/{name}/{mine[0]}", f"mesh_{name}"
            groups.append(_once(full, partial(group_of_members, mine, name=full, purpose=purpose)))
    return groups


def of_members(device_type: str, groups: Sequence[tuple[int, ...]], purpose: str) -> ProcessGroup | None:
    """This rank's group for one purpose. groups: by rank, the members of its group; () and None: it is in none.

    All ranks call it with the same arguments, after the process group is initialized.
    """
    mine = groups[dist.get_rank()]
    name = f"{device_type}.{purpose}/{'.'.join(map(str, mine))}"

    def make() -> ProcessGroup | None:
        if not _splits_in_one_call():
            return group_of_members(list(mine), name=name, purpose=purpose) if mine else None
        return {ranks: dist.new_group(list(ranks)) for ranks in dict.fromkeys(groups) if ranks}.get(mine)

    return _once(name, make)


def cpu_group(purpose: str, timeout: timedelta) -> ProcessGroup:
    """A gloo group of all ranks for one purpose, so that its messages never mix with those of another.

    All ranks call it with the same arguments, after the process group is initialized.
    """
    made: ProcessGroup = _once((purpose, timeout), lambda: dist.new_group(backend="gloo", timeout=timeout))
    return made


def _once(key: Hashable, make: Callable[[], _Made]) -> _Made:
    every = dist.group.WORLD
    if every not in _kept:
        _kept.clear()
        _kept[every] = {}
    if key not in _kept[every]:
        _kept[every][key] = make()
    return cast(_Made, _kept[every][key])
