"""Tensors that say they are on a device, and a count of how often the host had to wait for their values.

A `DeviceTensor` holds a CPU tensor. Whatever the ops of moecompile do inside is seen, because they run in Python with
such tensors; only collectives are handed what is held. A copy to pinned memory that nobody need wait for has not arrived
before its event was waited for: who reads too early reads `_NOT_YET`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from moecompile.ops import (
    choice,
    collect,
    exchange,
    expert_ffn,
    gather,
    grouped,
    layout,
    lending,
    rows,
    sorting,
    tokens,
    workload,
)

DEVICE = "meta"  # the one other device that autograd knows in every build of torch
_MODULES = (
    choice, collect, exchange, expert_ffn, gather, grouped, layout, lending, rows,
    sorting, tokens,
    workload,
)  # fmt: skip
_OURS = {
    f"moecompile::{name}": op._init_fn
    for module in _MODULES
    for name, op in vars(module).items()
    if isinstance(op, CustomOpDef)
}
# What cannot be answered without the values; sizes that depend on them.
_WAITS = {
 "aten::item", "aten::is_nonzero", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::bincount",
          "aten::unique_dim", "aten::_unique2"}  # fmt: skip


class DeviceTensor(Tensor):
    """A CPU tensor that says it is somewhere else."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> DeviceTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        """Values on the host."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called outside `HostWaits`")


_NOT_YET = -(2**40)
_under_way: list[tuple[Tensor, Tensor, HostWaits]] = []  # to, from, who saw it


class CopyEvent:
    """Stands for `torch.Event`: after it the copies that were started before it have arrived."""

    def __init__(self, device: torch.device) -> None:
        assert torch.device(device).type == DEVICE
        self._number = 0

    def record(self, stream: torch.device) -> None:
        """Stands behind the copies that are under way now."""
        assert torch.device(stream).type == DEVICE
        self._number = len(_under_way)

    def synchronize(self) -> None:
        """A wait, if something is under way."""
        if _under_way:
            _under_way[0][2].found.append("event")
        for target, values, _ in _under_way[: self._number]:
            target.copy_(values)
        del _under_way[: self._number]


class HostWaits(TorchDispatchMode):
    """Runs ops on device tensors; `found` names those that made the host wait, `meanwhile` what ran on the device
    while copies were under way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.meanwhile: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if name in _OURS:
            with self:
                return _OURS[name](*args, **kwargs)
        on_device = any(isinstance(leaf, DeviceTensor) for leaf in torch.utils._pytree.tree_leaves((args, kwargs)))
        if on_device and _under_way:
            self.meanwhile.append(name)
        if name == "aten::copy_" and not isinstance(args[0], DeviceTensor) and isinstance(args[1], DeviceTensor):
            return self._copy_to_host(*args, **kwargs)
        if kwargs.get("pin_memory"):
            pinned = func(*args, **kwargs | {"pin_memory": False})
            pinned.is_pinned_here = True
            return pinned
        target = kwargs.get("device")
        if on_device and (name in _WAITS or self._copies_to_host(name, kwargs) or self._masks(name, args, kwargs)):
            self.found.append(name)
        made_here = target is not None and torch.device(target).type == DEVICE
        if made_here:
            kwargs = kwargs | {"device": torch.device("cpu")}
        out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        to_host = target is not None and torch.device(target).type == "cpu"
        if name.startswith("c10d::") or to_host or not (on_device or made_here):
            return out
        return tree_map(lambda leaf: DeviceTensor(leaf) if isinstance(leaf, Tensor) else leaf, out)

    def _copy_to_host(self, target: Tensor, values: DeviceTensor, non_blocking: bool = False) -> Tensor:
        if not (non_blocking and getattr(target, "is_pinned_here", False)):
            self.found.append("aten::copy_")
            return target.copy_(values.held)
        _under_way.append((target, values.held, self))
        return target.fill_(_NOT_YET)

    @staticmethod
    def _copies_to_host(name: str, kwargs: Any) -> bool:
        return name in ("aten::_to_copy", "aten::to") and str(kwargs.get("device", DEVICE)).startswith("cpu")

    @staticmethod
    def _masks(name: str, args: Any, kwargs: Any) -> bool:
        """Boolean indexing; `repeat_interleave` without an output size."""
        if name == "aten::index":
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return name == "aten::repeat_interleave" and kwargs.get("output_size") is None


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, DeviceTensor) else leaf
