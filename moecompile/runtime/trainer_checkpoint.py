"""Checkpoints of a Trainer: a folder of shards (torch DCP), complete or absent, for any mesh, and free of code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.serialization import get_unsafe_globals_in_checkpoint

from moecompile import plan as plans
from moecompile.checkpoint.folders import PLAN, STATE, check, whole_folder
from moecompile.checkpoint.placed import orders_of
from moecompile.checkpoint.tensors import entries_of, forget_unused, tensors_of, write_tensors, written
from moecompile.errors import PlanError
from moecompile.nn.stages import tied_names
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
    names = _names(model)
    groups = [[_settings(group) for group in optimizer.param_groups] for optimizer in optimizers]
    weights = [[_weights(group, names) for group in optimizer.param_groups] for optimizer in optimizers]
    rest = {name: value for name, value in checkpoint.items() if name != "state_dict"}
    if optimizers:
        gathered: list[Any] = [(groups, weights)]
        if stages is not None:
            gathered = [None] * dist.get_world_size(stages)
            dist.all_gather_object(gathered, (groups, weights), group=stages)
            rest[_OF_STAGES] = [each for each, _ in gathered]
        rest[_WEIGHTS] = [each for _, each in gathered]
    with whole_folder(path, is_first_rank=is_first_rank, barrier=barrier) as folder:
        tensors = written(model, tensors_of(model, optimizers))
        write_tensors(folder, tensors, orders=orders_of(model, tensors))
        if is_first_rank:
            plans.save(plan_of(model), folder / PLAN)
            torch.save({**rest, "optimizer_states": groups} if optimizers else rest, folder / LIGHTNING)


def load(
    path: Path, model: nn.Module, optimizers: Sequence[Optimizer], stages: dist.ProcessGroup | None = None, *,
    goes_on: bool = False,
) -> tuple[dict[str, Any], bool]:  # fmt: skip
    """Reads such a folder, written on any mesh, into model and optimizers; all ranks call it.

    It makes missing optimizer state by a step with zeros. Arguments are those of `save`.

    Args:
        goes_on: whether training goes on from it, which takes more than weights.

    Returns:
        Lightning's checkpoint without tensors, and whether it is of the same parameter groups; if not, schedulers are
        to be fitted (`fit_scheduler`).

    Raises:
        ConfigError: files are damaged.
        PlanError: it is no such folder, entries are missing or have other shapes, a parameter group has weights with
            several settings, something beside tensors has a class of its own, or training goes on from weights alone.
    """
    check(path, [LIGHTNING, PLAN], key="ckpt_path")
    if not (path / LIGHTNING).is_file():
        rule = "is not what a Trainer with ExpertParallelStrategy saved" + (
            "; it is of task=train, which reads it by trainer.resume" if (path / STATE).is_file() else ""
        )
        raise PlanError("ckpt_path", path, rule, "Give a folder of trainer.save_checkpoint or of ModelCheckpoint")
    rest = _beside_tensors(path)
    if goes_on and "optimizer_states" not in rest:
        raise PlanError(
            "ckpt_path", path, "holds weights alone (weights_only), and fit goes on with optimizers and schedulers too",
            "Save without weights_only; or begin with these weights: trainer.validate(module, ckpt_path=...), then "
            "trainer.fit(module)",
        )  # fmt: skip
    groups = rest.get("optimizer_states", [])
    optimizers = optimizers if groups else []
    entries = {name: entry for name, entry in entries_of(path).items() if optimizers or name.startswith("model.")}
    tensors = tensors_of(model, optimizers, to_read=True)
    tensors = forget_unused(model, optimizers, tensors, entries, had_steps=not _are_alike(optimizers, groups))
    reading = reading_of(path, model, optimizers, tensors, entries, stages=stages, key="ckpt_path")
    of_stages, weights = rest.pop(_OF_STAGES, [groups]), rest.pop(_WEIGHTS, None)
    names = _names(model)
    number, index = (1, 0) if stages is None else (dist.get_world_size(stages), dist.get_rank(stages))
    for i, optimizer in enumerate(optimizers):
        saved = [group for of_stage in of_stages for group in of_stage[i]]
        if weights is not None:
            _set_by_weights(optimizer, saved, [each for of_stage in weights for each in of_stage[i]], names, path)
        elif len(of_stages) == number and len(of_stages[index][i]) == len(optimizer.param_groups):  # of 0.2.0
            for group, values in zip(optimizer.param_groups, of_stages[index][i], strict=True):
                group.update(values)
        else:
            _set_alike(optimizer, saved, path)
    reading.fill()
    mine = [[_weights(group, names) for group in optimizer.param_groups] for optimizer in optimizers]
    are_same = weights == [mine] if weights is not None else [*map(len, groups)] == [*map(len, mine)]
    return rest, are_same and stages is None


def _beside_tensors(path: Path) -> dict[str, Any]:
    try:
        rest: dict[str, Any] = torch.load(path / LIGHTNING, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        names = ", ".join(sorted(set(get_unsafe_globals_in_checkpoint(path / LIGHTNING)))) or "an unknown class"
        raise PlanError(
            "ckpt_path", path, f"{LIGHTNING} needs {names} (of save_hyperparameters, a callback or a scheduler), and a "
            "file cannot choose code",
            "Allow it by torch.serialization.add_safe_globals([...]) before; or save numbers, texts, lists and dicts",
        ) from error  # fmt: skip
    return rest


def fit_scheduler(scheduler: Any, state: dict[str, Any]) -> None:
    """Makes the state of a saved scheduler one of the parameter groups here, of which there may be more or fewer."""
    for inner, its in zip(getattr(scheduler, "_schedulers", ()), state.get("_schedulers", ()), strict=False):
        fit_scheduler(inner, its)
    groups = scheduler.optimizer.param_groups
    by_group = {name: getattr(scheduler, name, None) for name in _BY_GROUP} | {
        "base_lrs": [group.get("initial_lr", group["lr"]) for group in groups],
        "_last_lr": [group["lr"] for group in groups],
    }
    state.update({name: values for name, values in by_group.items() if name in state})
    if "lr_lambdas" in state:  # what callable objects keep
        del state["lr_lambdas"][len(groups) :]


_OF_STAGES, _WEIGHTS = "optimizer_groups_of_stages", "optimizer_weights_of_stages"
_BY_GROUP = ("min_lrs", "max_lrs", "base_momentums", "max_momentums")
"""Arguments of schedulers, one for each group."""
_SCHEDULED = ("params", "lr", "betas", "momentum", "max_lr", "min_lr", "max_momentum", "base_momentum")


def _are_alike(optimizers: Sequence[Optimizer], saved: Sequence[Sequence[Mapping[str, Any]]]) -> bool:
    """Whether saved groups have the settings of these optimizers, so that they are of the same kind."""
    pairs = zip(optimizers, saved, strict=False)
    return all(optimizer.defaults.keys() <= group.keys() for optimizer, groups in pairs for group in groups)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _names(model: nn.Module) -> dict[Tensor, str]:
    """The names of a model's weights on every mesh."""
    tied = tied_names(model)
    return {parameter: tied.get(name, name) for name, parameter in model.named_parameters()}


def _weights(group: Mapping[str, Any], names: Mapping[Tensor, str]) -> list[str]:
    return [names[parameter] for parameter in group["params"] if parameter in names]


def _set_by_weights(
    optimizer: Optimizer, saved: Sequence[dict[str, Any]], weights: Sequence[Sequence[str]],
    names: Mapping[Tensor, str], path: Path,
) -> None:  # fmt: skip
    """Restores the options of parameter groups, each from those that had its weights, which another mesh may cut.

    Args:
        saved: groups of all stages. weights: the names of the weights of each.
    """
    of = {name: group for group, each in zip(saved, weights, strict=True) for name in each}
    for group in optimizer.param_groups:
        first, *others = [of[name] for name in _weights(group, names) if name in of] or [{}]
        if differ := [name for name in first if any(each.get(name) != first[name] for each in others)]:
            had = " and ".join(dict.fromkeys(str(each.get(differ[0])) for each in (first, *others)))
            raise PlanError(
                "ckpt_path", path, f"weights of one parameter group of the optimizer had {differ[0]} {had}",
                "Make groups of weights that had the same settings",
            )  # fmt: skip
        group.update(first)


def _set_alike(optimizer: Optimizer, saved: list[dict[str, Any]], path: Path) -> None:
    """Restores the options of parameter groups, each from a saved one that has the same settings, of any stage."""
    for group in optimizer.param_groups:
        mine = {name: value for name, value in group.items() if name not in _SCHEDULED}
        alike = [each for each in saved if mine == {n: v for n, v in each.items() if n not in _SCHEDULED}]
        if len(rates := {each["lr"] for each in alike}) != 1:
            rule = f"the optimizer's group with {mine} had {len(rates)} learning rates, one is needed"
            raise PlanError("ckpt_path", path, rule, "Make the same groups on every mesh")
        group.update(alike[0])
