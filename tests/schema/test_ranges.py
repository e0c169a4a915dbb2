"""Ranges of numbers: every one in the schema has one, and its ends hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

import pytest

from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.ranges import Real, Whole
from moecompile.schema import Config, validate
from moecompile.schema.ranges import NUMBERS, check_numbers

ELSEWHERE = {"mesh.tp", "mesh.pp", "mesh.cp"}  # checked by the mesh; pp must be 1


def numbers(owner: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the schema that hold one number."""
    for name, hint in get_type_hints(owner).items():
        if is_dataclass(hint):
            yield from numbers(hint, f"{prefix}{name}.")
        elif {int, float} & {hint, *get_args(hint)} and str not in get_args(hint) and "ist" not in str(hint):
            yield f"{prefix}{name}"


def with_value(path: str, value: Any) -> Config:
    config = Config()
    *groups, key = path.split(".")
    owner: Any = config
    for group in groups:
        owner = getattr(owner, group)
    setattr(owner, key, value)
    return config


def test_every_number_has_a_range() -> None:
    assert set(numbers(Config)) == NUMBERS.keys() | ELSEWHERE


@pytest.mark.parametrize("path", NUMBERS)
def test_a_range_holds_at_its_ends(path: str) -> None:
    allowed = NUMBERS[path]
    if isinstance(allowed, Whole):
        good, bad = [allowed.low, allowed.high], [allowed.low - 1, allowed.high + 1, 1.5, True, "3"]
    else:
        low, high = (float(end) for end in allowed.interval[1:-1].split(","))
        inside = min(high, low + 1) / 2 if low == 0 else low
        good, bad = [inside], [-1.0, math.nan, math.inf, -math.inf, "fast"]
        for end, bracket in ((low, allowed.interval[0]), (high, allowed.interval[-1])):
            (good if bracket in "[]" else bad).append(end)
    for value in good:
        check_numbers(with_value(path, value))
    for value in bad:
        with pytest.raises(ConfigError, match=path) as raised:
            check_numbers(with_value(path, value))
        assert raised.value.path == path
        assert raised.value.value is value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr=-1"], "optimizer.lr=-1.0: must not be negative. Use 0.001."),
        (["optimizer.lr=nan"], "optimizer.lr=nan: must be a finite number. Use 0.001."),
        (["optimizer.betas=[0.9]"], "optimizer.betas=[0.9]: must be two numbers. Use [0.9, 0.95]."),
        (["optimizer.betas=[0.9,1]"], "optimizer.betas[1]=1.0: must lie in [0, 1). Use [0.9, 0.95]."),
        (["optimizer.betas=[nan,0.9]"], "optimizer.betas[0]=nan: must be a finite number. Use [0.9, 0.95]."),
        (
            ["optimizer=muon", "optimizer.muon.lr=-1"],
            "optimizer.muon.lr=-1.0: must not be negative. Use 0.02, or null for optimizer.lr.",
        ),
        (["optimizer=muon", "optimizer.muon.momentum=1"], "optimizer.muon.momentum=1.0: must lie in [0, 1). Use 0.95."),
        (
            ["optimizer=muon", "optimizer.muon.coefficients=[1,2]"],
            "optimizer.muon.coefficients=[1.0, 2.0]: must be three numbers. Use [3.4445, -4.775, 2.0315].",
        ),
        (
            ["optimizer=muon", "optimizer.muon.coefficients=[1,2,nan]"],
            "optimizer.muon.coefficients[2]=nan: must be a finite number. Use [3.4445, -4.775, 2.0315].",
        ),
        (
            ["optimizer.muon.steps=3"],
            "optimizer.muon.steps=3: has no effect with AdamW. Use optimizer=muon, or leave it out.",
        ),
        (
            ["optimizer.muon.scale=original"],
            "optimizer.muon.scale=original: has no effect with AdamW. Use optimizer=muon, or leave it out.",
        ),
        (["optimizer.groups=[{lr_scale: -1}]"], "optimizer.groups[0].lr_scale=-1.0: must not be negative. Use 1.0."),
        (
            ["optimizer.groups=[{match: a}, {weight_decay: nan}]"],
            "optimizer.groups[1].weight_decay=nan: must be a finite number. Use 0.1, or 0 for none.",
        ),
        (
            ["optimizer.groups=[{kind: muon}]"],
            "optimizer.groups[0].kind=muon: chooses among the two optimizers of optimizer=muon. Use optimizer=muon, or leave "
            "it out.",
        ),
        (["optimizer.clip_norm=0"], "optimizer.clip_norm=0.0: must be positive. Use 1.0, or null for no clipping."),
        (["seed=-1"], "seed=-1: must be at least 0. Use 0 or more."),
        (
            ["optimizer.warmup_steps=101"],
            "optimizer.warmup_steps=101: the run ends after trainer.max_steps=100, before optimizer.lr is reached. "
            "Use at most 100, or raise trainer.max_steps.",
        ),
    ],
)
def test_what_training_cannot_use(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        validate(compose_config(overrides))
    assert str(raised.value) == message


def test_a_limit_of_nodes_must_mean_something_on_the_mesh() -> None:
    groups = ["routing.groups=4", "mesh=cpu_2x2"]
    with pytest.raises(ConfigError) as raised:
        validate(compose_config([*groups, "routing.max_nodes=3"]))
    assert str(raised.value) == ("routing.max_nodes=3: the mesh has 2 nodes. Use at most 2, or a mesh with more nodes.")
    validate(compose_config([*groups, "routing.max_nodes=2"]))
    validate(
        compose_config(["routing.groups=4", "routing.max_nodes=3", "trainer.resume=auto"])
    )  # groups are the model's


@pytest.mark.slow
def test_a_short_run_keeps_the_warm_up_of_its_recipe() -> None:
    validate(compose_config(["trainer.max_steps=3"]))


def test_numbers_of_a_model_that_is_moe_already_are_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"^experts\.num_routed=0: must be at least 1"):
        validate(compose_config(["model=deepseek_v3", "task=plan", "experts.num_routed=0"]))


def test_real_intervals_are_written_as_in_mathematics() -> None:
    assert all(
        r.interval[0] in "[(" and r.interval[-1] in "])" and r.interval.count(",") == 1
        for r in NUMBERS.values()
        if isinstance(r, Real)
    )
