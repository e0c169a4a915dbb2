"""Process groups that are made once: a process that compiles or trains again uses those of the first time.

Each group of gloo has a thread that wakes a hundred times a second, and is not freed before the process group of all
ranks is: two ranks that had trained fifty models had eight hundred, which took a seventh of two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moecompile import torch_private

_Made = TypeVar("_Made")
_kept: dict[ProcessGroup | None, dict[Hashable, Any]] = {}
"""What was made, by the process group of all ranks that it belongs to; with another one, it is forgotten."""


def device_mesh(device_type: str, axes: Mapping[str, int]) -> DeviceMesh:
    """The device mesh of all ranks with these axes: sizes by name, the slowest first.

    All ranks call it with the same arguments, after the process group is initialized.
    """
    names, sizes = tuple(axes), tuple(axes.values())
    return _once((device_type, names, sizes), lambda: init_device_mesh(device_type, sizes, mesh_dim_names=names))


def split_axis(mesh: DeviceMesh, axis: str, sizes: Mapping[str, int]) -> DeviceMesh:
    """`mesh` with `axis` split into axes of these sizes, the last one varying fastest."""
    key = (id(mesh), axis, *sizes.items())
    return _once(key, lambda: (mesh, torch_private.split_axis(mesh, axis, dict(sizes))))[1]  # keeps `mesh`, so its id


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
