"""Reads the optimizer state of a checkpoint that keeps it in another way than this run: moments are converted.

Algorithm:
  1. For each moment whose entries have another dtype or other blocks in the checkpoint, zeros are made as they are
     there, cut as the weight is.
  2. They are read in the place of the run's own.                                               (torch DCP)
  3. Their numbers are rounded to what the run keeps.
A fp32 copy of a weight that is not in the checkpoint is made of the weight; one that the run does not keep is left out,
as the weight is that number rounded. Beside what the run keeps, memory for what the checkpoint has is needed meanwhile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from moecompile.checkpoint.fit import check_entries
from moecompile.checkpoint.placed import orders_of
from moecompile.checkpoint.tensors import Entry, read_tensors, shapes_of
from moecompile.errors import PlanError
from moecompile.nn.stages import tied_names
from moecompile.runtime.moments import MASTER, MOMENTS_OF, MOMENTUM, SCALE, STEP, Keeping, new_moment
from moecompile.schema import StateKind
from moecompile.torch_private import local_part


@dataclass(kw_only=True)
class Reading:
    """What is read of a checkpoint, which is checked.

    tensors: by entry. made: (weight, name of the moment, its own state, as it is in the checkpoint). copies: (weight,
    its state) whose fp32 copies are made of the weights. seen: what is converted, and how often.
    """

    folder: Path
    model: nn.Module
    tensors: dict[str, Tensor]
    made: list[tuple[Tensor, str, Mapping[str, Any], dict[str, Any]]] = field(default_factory=list)
    copies: list[tuple[Tensor, Mapping[str, Any]]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)

    @torch.no_grad()
    def fill(self) -> None:
        """Reads and converts. All ranks call it."""
        read_tensors(self.folder, self.tensors, orders=orders_of(self.model, self.tensors))  # Step 2
        keeping = Keeping(state=StateKind.fp32)
        for parameter, name, state, theirs in self.made:  # Step 3
            given = keeping.moment_of(parameter, name, theirs)
            keeping.moment_of(parameter, name, state).take(given, local_part(parameter).shape)
        for parameter, state in self.copies:
            local_part(state[MASTER]).copy_(local_part(parameter))
        if not dist.is_initialized() or dist.get_rank() == 0:
            for text, number in self.seen.items():
                print(f"optimizer state of {self.folder.name} is converted: {number} moments from {text}", flush=True)


def reading_of(
    folder: Path, model: nn.Module, optimizers: Iterable[Optimizer], tensors: Mapping[str, Tensor],
    saved: Mapping[str, Entry], *, stages: dist.ProcessGroup | None = None, key: str = "trainer.resume",
) -> Reading:  # fmt: skip
    """What fills `tensors`, the entries of a model and its optimizers, from a checkpoint. All ranks call it.

    Args:
        saved: the entries of the checkpoint that are to be read. stages: ranks with other stages of a pipeline.
        key: what named the checkpoint.

    Raises:
        PlanError: entries are missing or have other shapes, or blocks do not fit the mesh.
    """
    reading, tied = Reading(folder=folder, model=model, tensors=dict(tensors)), tied_names(model)
    named = {tied.get(name, name): parameter for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for name, parameter in named.items():
            if state := optimizer.state.get(parameter):
                _as_saved(reading, f"optimizer.{name}.", parameter, state, saved, key)  # Step 1
    ours = shapes_of(reading.tensors, stages)
    theirs = {name: shape for name, (shape, _) in saved.items()}
    for name in [name for name in ours.keys() ^ theirs.keys() if _may_differ(name, ours, theirs)]:
        for entries in (ours, theirs, reading.tensors):
            entries.pop(name, None)
    check_entries(theirs, ours, folder, key=key)
    return reading


def _may_differ(name: str, *sides: Mapping[str, object]) -> bool:
    """Whether one of the two sides needs not have an entry: a fp32 copy, or the number of steps with a momentum."""
    weight, _, kind = name.rpartition(".")
    moments = {MASTER: MOMENTS_OF, STEP: (MOMENTUM,)}.get(kind, ())
    return any(all(f"{weight}.{moment}" in side for side in sides) for moment in moments)


def _as_saved(
    reading: Reading, prefix: str, parameter: Tensor, state: Mapping[str, Any], saved: Mapping[str, Entry], key: str
) -> None:  # fmt: skip
    for name in (each for each in MOMENTS_OF if each in state and prefix + each in saved):
        (_, dtype), scales = saved[prefix + name], saved.get(prefix + name + SCALE)
        own = state.get(name + SCALE)
        if dtype == state[name].dtype and (None if own is None else tuple(own.shape)) == (scales and scales[0]):
            continue
        block, width = None, local_part(parameter).shape[-1] if parameter.ndim else 1
        if scales is not None:
            block = parameter.shape[-1] // scales[0][-1]
            if width % block:
                raise PlanError(
                    key, reading.folder, f"{prefix}{name} has blocks of {block} numbers, and a rank rows of {width}",
                    "Go on with a mesh that cuts rows as the checkpoint's did",
                )  # fmt: skip
        theirs: dict[str, Any] = {}
        new_moment(theirs, name, parameter, dtype, block)
        reading.made.append((parameter, name, state, theirs))
        reading.seen[f"{_words(dtype, block)} to {_words(state[name].dtype, own is not None)}"] += 1
        for suffix in ("", SCALE):
            reading.tensors.pop(prefix + name + suffix, None)
        reading.tensors |= {prefix + entry: value for entry, value in theirs.items()}
    if MASTER in state and prefix + MASTER not in saved:
        reading.copies.append((parameter, state))


def _words(dtype: torch.dtype, in_blocks: object) -> str:
    return "int8" if in_blocks else {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}[dtype]
