"""From `optimizer` in the config to torch's optimizer: which weight is stepped how.

Algorithm:
  1. By default, matrices of hidden layers are Muon's if it is asked for (moecompile.nn.matrices), all others AdamW's;
     what has more than one dim decays, vectors (norms, biases, also stacked ones: of experts, heads, positions) do not.
  2. The first of `optimizer.groups` that matches a weight's name changes that for it.
  3. Weights with the same settings are one group, in the order of the config; frozen ones are in none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moecompile.arguments import check_overrides
from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.nn.matrices import are_vectors, hidden_matrices
from moecompile.nn.stages import passage_of, tied_names
from moecompile.passes.lookups import tables_of
from moecompile.runtime.moments import BY_ROWS, AdamW, KeepsItsState, keeping_of
from moecompile.runtime.muon import Muon
from moecompile.schema import (
    Bf16Weights,
    Config,
    OptimizerConfig,
    OptimizerKind,
    check_moments,
    check_numbers,
    check_optimizer,
    group_of,
)

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class WeightGroup:
    """Weights with the same settings.

    match: the pattern that selected them; None: no pattern. kind: `muon`, `adamw`, or a rule of tables
    (moecompile.schema.RowRule). lr: at its peak.
    """

    match: str | None
    kind: str
    lr: float
    weight_decay: float
    weights: list[nn.Parameter] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """The entry in result.json; parameters are those of all ranks."""
        return {
            "optimizer": self.kind,
            "weights": len(self.weights),
            "parameters": sum(parameter.numel() for parameter in self.weights),
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "match": self.match,
        }


def weight_groups(model: nn.Module, config: OptimizerConfig) -> list[WeightGroup]:
    """The groups of a model's trained weights; each weight is in one of them.

    Raises:
        ConfigError: a pattern matches nothing, or what Muon cannot step, or there is nothing for Muon; or there is
            nothing to train in the stages of this rank.
    """
    is_muon = config.kind is OptimizerKind.muon
    layouts = hidden_matrices(model) if is_muon or any(group.kind for group in config.groups) else {}
    by_rows = {name: rule for name, rule in tables_of(model).items() if rule}
    layouts = {name: layout for name, layout in layouts.items() if name not in by_rows}
    tied = tied_names(model)
    trained = [(tied.get(name, name), p) for name, p in model.named_parameters() if p.requires_grad]
    groups: dict[tuple[int, str, bool, bool], WeightGroup] = {}
    for name, parameter in trained:
        index = group_of(name, config.groups)
        chosen = None if index is None else config.groups[index]
        with_muon = is_muon and name in layouts  # Step 1
        decays = parameter.ndim > 1 and not are_vectors(name)
        if chosen is not None and chosen.kind is not None:  # Step 2
            with_muon = chosen.kind is OptimizerKind.muon
            if with_muon and name not in layouts:
                raise ConfigError(
                    f"optimizer.groups[{index}].kind", "muon",
                    f"{name} is no matrix of a hidden layer: {_why(parameter)}", "Change the pattern, or use adamw",
                )  # fmt: skip
        order = len(config.groups) if index is None else index
        base = config.muon.lr if with_muon and config.muon.lr is not None else config.lr
        decay = config.weight_decay if decays else 0.0
        made = WeightGroup(
            match=None if chosen is None else chosen.match,
            kind=by_rows.get(name, "muon" if with_muon else "adamw"),
            lr=base * (chosen.lr_scale if chosen else 1.0),
            weight_decay=decay if chosen is None or chosen.weight_decay is None else chosen.weight_decay,
        )  # fmt: skip
        key = (order, by_rows.get(name, ""), not with_muon, not decays)
        groups.setdefault(key, made).weights.append(parameter)
    if (passage := passage_of(model)) is not None:  # a stage may have none that a pattern matches
        if not trained:
            raise ConfigError(
                "mesh.pp", passage.pipeline.ranks, "a rank has stages without a weight that is trained",
                "Train some of each stage (adapters.dense, adapters.experts), or use fewer stages",
            )  # fmt: skip
        return [group for _, group in sorted(groups.items(), key=lambda item: item[0])]
    _check_patterns(config, {order for order, *_ in groups}, [name for name, _ in trained])
    if is_muon and trained and not any(group.kind == "muon" for group in groups.values()):
        raise ConfigError(
            "optimizer.kind", "muon", "no matrix of a hidden layer is trained with it", "Use optimizer=adamw"
        )
    return [group for _, group in sorted(groups.items(), key=lambda item: item[0])]


def for_dense(model: nn.Module, config: OptimizerConfig) -> OptimizerConfig:
    """The optimizer of a dense model: without groups that are for experts or routers, so for none of its weights.

    The first match decides, so the settings of no other weight change.

    Args:
        model: the dense model, before it is compiled or after.

    Raises:
        ConfigError: nothing is trained, or Muon cannot step what is left.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        raise ConfigError("requires_grad", "false", "no weight is trained", "Train some of them")
    used = {group_of(name, config.groups) for name in names}
    config = replace(config, groups=[group for i, group in enumerate(config.groups) if i in used])
    weight_groups(model, config)
    return config


def _why(parameter: nn.Parameter) -> str:
    if parameter.ndim > 1 and min(parameter.shape) > 1:
        return "embeddings, heads, routers, convolutions and stacked vectors are not"
    return f"its shape is {list(parameter.shape)}"


def _check_patterns(config: OptimizerConfig, used: set[int], names: Sequence[str]) -> None:
    for i, group in enumerate(config.groups):
        if i not in used:
            taken = any(group_of(name, [group]) is not None for name in names)
            rule = "are all in earlier groups" if taken else f"matches none of the {len(names)} trained weights"
            shown = ", ".join(names[:_SHOWN])
            raise ConfigError(
                f"optimizer.groups[{i}].match", group.match,
                f"the weights that it matches {rule}" if taken else f"{rule} ({shown}, ...)",
                "Put it before these" if taken else "Change the pattern, or remove the group",
            )  # fmt: skip


def make_optimizer(model: nn.Module, settings: Sequence[str] | Config | OptimizerConfig = ()) -> Optimizer:
    """torch's AdamW, or Muon with AdamW for the weights that are not its; call it when the weights are sharded.

    With `optimizer.state` or `optimizer.bf16_weights`, AdamW is that of moecompile.runtime.moments.

    Args:
        model: a compiled model, after `shard`; or any other one.
        settings: overrides such as `optimizer=muon`, or a config. Of its schedule and clipping nothing is used.

    Raises:
        ConfigError: a setting is out of range, or a pattern matches nothing.
    """
    if isinstance(settings, OptimizerConfig):
        config = settings
    else:
        check_overrides(settings)
        whole = settings if isinstance(settings, Config) else compose_config(settings)
        check_numbers(whole)
        check_optimizer(whole)
        check_moments(whole)
        config = whole.optimizer
    groups = weight_groups(model, config)
    betas = (config.betas[0], config.betas[1])
    keeping = keeping_of(model, config, [weight for group in groups for weight in group.weights])
    tables = {weight: group.kind for group in groups if group.kind in BY_ROWS for weight in group.weights}
    narrow = [kind for weight, kind in tables.items() if weight.dtype == torch.bfloat16]
    if narrow and config.bf16_weights is not Bf16Weights.nearest:
        raise ConfigError(
            "embeddings.optimizer", narrow[0],
            f"rounds bf16 tables to nearest, and optimizer.bf16_weights={config.bf16_weights.value} asks for more",
            "Use embeddings.optimizer=same",
        )  # fmt: skip
    if config.kind is OptimizerKind.adamw and (tables or not keeping.is_torchs):
        return AdamW(_by_mesh(groups), keeping, lr=config.lr, betas=betas, eps=config.eps)
    if config.kind is OptimizerKind.adamw:
        return torch.optim.AdamW(_by_mesh(groups), lr=config.lr, betas=betas, eps=config.eps, fused=True)
    muon, by_name = config.muon, hidden_matrices(model)
    layouts = {parameter: by_name[name] for name, parameter in model.named_parameters() if name in by_name}
    return Muon(
        [
            {"params": group.weights, "kind": group.kind, "lr": group.lr, "weight_decay": group.weight_decay}
            for group in groups
        ],
        layouts, lr=config.lr, betas=betas, eps=config.eps, momentum=muon.momentum, nesterov=muon.nesterov,
        scale=muon.scale.value, steps=muon.steps, coefficients=(muon.coefficients[0], muon.coefficients[1],
        muon.coefficients[2]), precision=muon.precision.value, keeping=keeping,
    )  # fmt: skip


def _by_mesh(groups: Sequence[WeightGroup]) -> list[dict[str, Any]]:
    """Groups with weights of one device mesh only: the fused step (one kernel per group) cannot mix meshes."""
    made: list[dict[str, Any]] = []
    for group in groups:
        of_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}
        for parameter in group.weights:
            of_mesh.setdefault(_mesh_of(parameter), []).append(parameter)
        kind = {"kind": group.kind} if group.kind in BY_ROWS else {}
        made += [{"params": p, "lr": group.lr, "weight_decay": group.weight_decay, **kind} for p in of_mesh.values()]
    return made


def check_rows_are_stepped(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Gradients of tables that are stepped by rows are not in `.grad`: another optimizer would leave them as they are.

    Args:
        model: a compiled model. optimizers: all that step its weights.

    Raises:
        ConfigError: none of them steps a trained table by its rule.
    """
    groups = [group for each in optimizers if isinstance(each, KeepsItsState) for group in each.param_groups]
    stepped = {(id(weight), group.get("kind")) for group in groups for weight in group["params"]}
    for name, rule in tables_of(model).items():
        table = model.get_parameter(name) if rule else None
        if table is not None and table.requires_grad and (id(table), rule) not in stepped:
            given = ", ".join(type(each).__name__ for each in optimizers)
            raise ConfigError(
                "embeddings.optimizer", rule, f"{name} is stepped by rows, which {given} would not do",
                "Return moecompile.make_optimizer(self.model, overrides) from configure_optimizers, or use "
                "embeddings.optimizer=same",
            )  # fmt: skip


def step_meshes_apart(optimizer: Optimizer) -> None:
    """Lets an optimizer of torch's step weights of several device meshes: one at a time, where a group has such.

    On a GPU, torch would step all weights of a group at once (`foreach`), which it cannot for several meshes.

    Raises:
        ConfigError: the optimizer is told to do that.
    """
    at_once = ("foreach", "fused")
    for group in optimizer.param_groups:
        if (told := next((each for each in at_once if group.get(each)), None)) and _mixes_meshes(group):
            raise ConfigError(
                "configure_optimizers", f"{type(optimizer).__name__}({told}=True)",
                "would step all weights of a group at once, and this one has weights of several device meshes",
                f"Use moecompile.make_optimizer, leave {told} out, or give each device mesh a group of its own",
            )  # fmt: skip
    apart: list[dict[str, Any]] = []

    def before(optimizer: Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            if group.get("foreach", False) is None and not group.get("fused") and _mixes_meshes(group):
                group["foreach"] = False
                apart.append(group)

    def after(*_: object) -> None:  # checkpoints have the groups as they were made
        while apart:
            apart.pop()["foreach"] = None

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _mixes_meshes(group: Mapping[str, Any]) -> bool:
    return len({_mesh_of(parameter) for parameter in group["params"] if parameter.requires_grad}) > 1


def _mesh_of(parameter: Tensor) -> DeviceMesh | None:
    return parameter.device_mesh if isinstance(parameter, DTensor) else None
