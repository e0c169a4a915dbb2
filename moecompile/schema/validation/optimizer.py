"""Rules of `optimizer.muon` and `optimizer.groups`."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from moecompile.errors import ConfigError
from moecompile.ranges import Real
from moecompile.schema.config import Config, WeightGroupConfig
from moecompile.schema.enums import OptimizerKind

_NUM_COEFFICIENTS = 3
_LR_SCALE = Real("[0, inf)", "Use 1.0")
_WEIGHT_DECAY = Real("[0, inf)", "Use 0.1, or 0 for none")
_FINITE = Real("(-inf, inf)", "Use [3.4445, -4.775, 2.0315]")


def check_optimizer(config: Config) -> None:
    """Checks the rules that need no model; whether every pattern matches is known when the model is there.

    Raises:
        ConfigError: the first rule that is broken.
    """
    optimizer = config.optimizer
    is_muon = optimizer.kind is OptimizerKind.muon
    given = [key for key in config.given if key.startswith("optimizer.muon.")]
    if given and not is_muon:
        value = getattr(optimizer.muon, given[0].rpartition(".")[2], None)
        raise ConfigError(
            given[0], getattr(value, "value", value), "has no effect with AdamW", "Use optimizer=muon, or leave it out"
        )
    if len(optimizer.muon.coefficients) != _NUM_COEFFICIENTS:
        raise ConfigError(
            "optimizer.muon.coefficients", optimizer.muon.coefficients, "must be three numbers",
            "Use [3.4445, -4.775, 2.0315]",
        )  # fmt: skip
    for i, coefficient in enumerate(optimizer.muon.coefficients):
        _FINITE.check(f"optimizer.muon.coefficients[{i}]", coefficient)
    for i, group in enumerate(optimizer.groups):
        _LR_SCALE.check(f"optimizer.groups[{i}].lr_scale", group.lr_scale)
        if group.weight_decay is not None:
            _WEIGHT_DECAY.check(f"optimizer.groups[{i}].weight_decay", group.weight_decay)
        if group.kind is not None and not is_muon:
            raise ConfigError(
                f"optimizer.groups[{i}].kind", group.kind.value, "chooses among the two optimizers of optimizer=muon",
                "Use optimizer=muon, or leave it out",
            )  # fmt: skip


def group_of(name: str, groups: Sequence[WeightGroupConfig]) -> int | None:
    """The index of the first group whose pattern matches the name of a weight; None: no group's."""
    return next((i for i, group in enumerate(groups) if fnmatchcase(name, group.match)), None)
