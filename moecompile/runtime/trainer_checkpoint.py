"""Checkpoints of a Trainer: a folder of shards (torch DCP), complete or absent, for any mesh, and free of code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from moecompile import plan as plans
from moecompile.checkpoint.folders import PLAN, check, whole_folder
from moecompile.checkpoint.placed import orders_of
from moecompile.checkpoint.tensors import entries_of, forget_unused, tensors_of, write_tensors, written
from moecompile.errors import PlanError
from moecompile.pipeline import plan_of
from moecompile.runtime.converted import reading_of

LIGHTNING = "lightning.pt"
"""Lightning's checkpoint without tensors."""


def save(
    path: Path, checkpoint: dict[str, Any], model: nn.Module, optimizers: Sequence[Optimizer], *, is_first_rank: bool,
    barrier: Callable[[], object], stages: dist.ProcessGroup | None = None,
) -> None:  # fmt: skip
    """Writes the folder `path`; all ranks call it.

    Args:
        checkpoint: Lightning's. model: the LightningModule. optimizers: whose state is saved, too.
        stages: ranks with other stages of a pipeline, whose optimizers may have other groups.
    """
    groups = [[_settings(group) for group in optimizer.param_groups] for optimizer in optimizers]
    rest = {name: value for name, value in checkpoint.items() if name != "state_dict"}
    if stages is not None and optimizers:
        gathered: list[Any] = [None] * dist.get_world_size(stages)
        dist.all_gather_object(gathered, groups, group=stages)
        rest[_OF_STAGES] = gathered
    with whole_folder(path, is_first_rank=is_first_rank, barrier=barrier) as folder:
        tensors = written(model, tensors_of(model, optimizers))
        write_tensors(folder, tensors, orders=orders_of(model, tensors))
        if is_first_rank:
            plans.save(plan_of(model), folder / PLAN)
            torch.save({**rest, "optimizer_states": groups} if optimizers else rest, folder / LIGHTNING)


def load(
    path: Path, model: nn.Module, optimizers: Sequence[Optimizer], stages: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """Reads such a folder, written on any mesh, into model and optimizers; all ranks call it.

    It makes missing optimizer state by a step with zeros. Arguments are those of `save`.

    Returns:
        Lightning's checkpoint without tensors.

    Raises:
        PlanError: entries are missing or have other shapes, or the optimizers have other parameter groups.
    """
    check(path, [LIGHTNING, PLAN], key="ckpt_path")
    rest: dict[str, Any] = torch.load(path / LIGHTNING, map_location="cpu", weights_only=True)
    groups = rest.get("optimizer_states", [])
    optimizers = optimizers if groups else []
    entries = {name: entry for name, entry in entries_of(path).items() if optimizers or name.startswith("model.")}
    tensors = tensors_of(model, optimizers, to_read=True)
    tensors = forget_unused(model, optimizers, tensors, entries, had_steps=not _are_alike(optimizers, groups))
    reading = reading_of(path, model, optimizers, tensors, entries, stages=stages, key="ckpt_path")
    of_stages = rest.pop(_OF_STAGES, [groups])
    for i, optimizer in enumerate(optimizers):
        number, index = (1, 0) if stages is None else (dist.get_world_size(stages), dist.get_rank(stages))
        if len(of_stages) == number:
            _set_groups(optimizer, of_stages[index][i], path)
        else:
            _set_alike(optimizer, [group for of_stage in of_stages for group in of_stage[i]], path)
    reading.fill()
    return rest


_OF_STAGES = "optimizer_groups_of_stages"
_SCHEDULED = ("params", "lr", "betas", "momentum", "max_lr", "min_lr", "max_momentum", "base_momentum")


def _are_alike(optimizers: Sequence[Optimizer], saved: Sequence[Sequence[Mapping[str, Any]]]) -> bool:
    """Whether saved groups have the settings of these optimizers, so that they are of the same kind."""
    pairs = zip(optimizers, saved, strict=False)
    return all(optimizer.defaults.keys() <= group.keys() for optimizer, groups in pairs for group in groups)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _set_alike(optimizer: Optimizer, saved: list[dict[str, Any]], path: Path) -> None:
    """Restores the options of parameter groups, each from a saved one that has the same settings, of any stage."""
    for group in optimizer.param_groups:
        mine = {name: value for name, value in group.items() if name not in _SCHEDULED}
        alike = [each for each in saved if mine == {n: v for n, v in each.items() if n not in _SCHEDULED}]
        if len(rates := {each["lr"] for each in alike}) != 1:
            rule = f"the optimizer's group with {mine} had {len(rates)} learning rates, one is needed"
            raise PlanError("ckpt_path", path, rule, "Make the same groups on every mesh")
        group.update(alike[0])


def _set_groups(optimizer: Optimizer, saved: list[dict[str, Any]], path: Path) -> None:
    """Restores the options of parameter groups, such as learning rates."""
    if len(saved) != len(optimizer.param_groups):
        raise PlanError(
            "ckpt_path", path, f"the optimizer had {len(saved)} parameter groups, it has {len(optimizer.param_groups)}",
            "Make the same groups on every mesh",
        )  # fmt: skip
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        group.update(values)
