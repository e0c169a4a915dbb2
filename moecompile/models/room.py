"""Whether a model that is built or loaded whole fits into the memory that is free here, asked before it is built.

The weights alone are counted, on the meta device: less than a run needs, so that nothing is refused which would run.
Shards are looked at where they are made (sharded.py), and a model on the meta device needs no memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from moecompile.errors import ConfigError
from moecompile.models.build import build_empty, build_model
from moecompile.models.packages import check_package
from moecompile.models.sharded import loads_sharded
from moecompile.schema import Config, ExpertInit, ModelDevice

_ROOT = Path("/")
_FILES = (("memory.max", "memory.current", "inactive_file"), ("memory.limit_in_bytes", "memory.usage_in_bytes",
          "total_inactive_file"))  # fmt: skip
"""Limit, use, and what of it can be given back: of cgroup v2, and of v1."""
_GiB = 2**30


def free_memory(root: Path = _ROOT) -> int | None:
    """Bytes that can be had: what the machine has available, within the limits of this process's cgroups; None: not
    known. root: of the file system, in tests."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text())
    except OSError:
        found = None
    return min([*([int(found[1]) * 1024] if found else []), *_of_cgroups(root)], default=None)


def _of_cgroups(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            yield from _left(folder)
            if folder == top:
                break


def _left(folder: Path) -> Iterator[int]:
    """What a cgroup may still take; nothing: it has no limit."""
    for limit, used, cached in _FILES:
        try:
            most, now = int((folder / limit).read_text()), int((folder / used).read_text())
            given_back = re.search(rf"^{cached} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
        except (OSError, ValueError):  # not of this version, or `max`
            continue
        yield max(0, most - now + (int(given_back[1]) if given_back else 0))


def check_room(config: Config, ranks: int) -> None:
    """Refuses a model that `ranks` processes of this machine would make whole, and that does not fit.

    Args:
        ranks: processes on this machine, all of the mesh if no launcher spreads them; 1: one process.

    Raises:
        ConfigError: it does not fit.
    """
    model = config.model
    is_sharded = ranks > 1 and config.experts.init is not ExpertInit.widen and loads_sharded(config, ranks)
    if model.factory or model.device is ModelDevice.meta or is_sharded:
        return
    free, structure = free_memory(), _structure(config)
    if free is None or structure is None:
        return
    tensors = {id(tensor): tensor for tensor in (*structure.parameters(), *structure.buffers())}.values()
    needed = sum(tensor.nbytes for tensor in tensors)
    if needed * ranks <= free:
        return
    count = sum(parameter.numel() for parameter in structure.parameters())
    key = "architecture" if model.architecture else "package" if model.package else "pretrained"
    each = f" on each of {ranks} ranks of this machine" if ranks > 1 else ""
    rule = (
        f"needs {needed / _GiB:,.1f} GiB for {count / 1e9:,.2f} B weights{each}, and {free / _GiB:,.1f} GiB of memory "
        "are free here"
    )
    smaller = "Give its widths (model.config.hidden_size, model.config.num_hidden_layers)"
    first = smaller if model.architecture else "Use a smaller model"
    fewer = ", fewer ranks" * (ranks > 1)
    raise ConfigError(
        f"model.{key}", getattr(model, key), rule, f"{first}{fewer} or a larger machine; model.device=meta needs none"
    )


def _structure(config: Config) -> nn.Module | None:
    """The model on the meta device; None: it cannot be made there, which is said where it is built."""
    model = config.model
    try:
        if model.architecture:
            return build_model(replace(model, device=ModelDevice.meta), config.seed)
        if model.package and check_package(model.package) is None:  # a file that is converted first
            return None
        return build_empty(model, torch.float32) if model.pretrained or model.package else None
    except ConfigError:
        return None
