"""What is compared when a run goes on: every key of the schema and of a plan, unless it is listed as one that may differ."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import field, make_dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from moecompile.checkpoint import fingerprint, fit
from moecompile.checkpoint.fingerprint import settings
from moecompile.checkpoint.fit import check_plan, plan_differences
from moecompile.checkpoint.resume import State, check_settings, not_compared
from moecompile.compose import compose_config
from moecompile.errors import PlanError
from moecompile.plan import Plan, Recomputed
from moecompile.schema import Config
from tests.plan.plans import a_plan
from tests.planner.test_adapters import planned

LISTED = [
    *fingerprint.IN_THE_PLAN, *fingerprint.IN_THE_MODEL, *fingerprint.IN_THE_DATA, *fingerprint.MAY_DIFFER,
]  # fmt: skip
COMPARED = {
    "data.corpus", "data.global_batch_size", "data.objective", "data.path", "data.seq_len", "data.val_fraction",
    "data.vocab_size", "model.factory", "plugins", "seed",
}  # fmt: skip


def keys_of(kind: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of all keys, from the annotations."""
    for name, hint in typing.get_type_hints(kind).items():
        whole = f"{path}.{name}" if path else name
        if dataclasses.is_dataclass(hint):
            yield from keys_of(hint, whole)
        else:
            yield whole


def test_every_key_of_the_schema_is_compared_or_listed_once() -> None:
    keys = set(keys_of(Config))
    lists = {key: [each for each in LISTED if fnmatchcase(key, each)] for key in keys}
    assert {key for key, found in lists.items() if not found} == COMPARED == set(settings(Config()))
    assert {key: found for key, found in lists.items() if len(found) > 1} == {}
    assert [each for each in LISTED if not any(fnmatchcase(key, each) for key in keys)] == []  # of a key that is gone


@pytest.mark.parametrize("group", ["", "data", "model", "experts", "experts.widen", "routing", "adapters", "trainer"])
def test_a_new_key_is_compared(group: str) -> None:
    """Until somebody lists it; a checkpoint from before it is still read, and what was not compared is said."""
    config = compose_config(["trainer.max_steps=9"])

    def widened(noun: Any, keys: list[str], value: int) -> Any:
        if keys:
            return replace(noun, **{keys[0]: widened(getattr(noun, keys[0]), keys[1:], value)})
        wider = make_dataclass("Wider", [("brand_new", int, field(default=0))], bases=(type(noun),), kw_only=True)
        values = {entry.name: getattr(noun, entry.name) for entry in dataclasses.fields(noun)}
        return wider(**values, brand_new=value)

    path = f"{group}.brand_new".lstrip(".")
    before, now = (widened(config, group.split(".") if group else [], value) for value in (1, 2))
    state = State(
        step=1, sequences=1, fixed=settings(before), world_size=1, plan_hash="", versions={}, fingerprint={"x": 1}
    )
    check_settings(state, before, Path("step-1"))
    with pytest.raises(PlanError, match=rf"{path}: 1 in the checkpoint, 2 here\..*allow_changes=\[{path}\]"):
        check_settings(state, now, Path("step-1"))
    older = replace(state, fixed=settings(config))
    check_settings(older, now, Path("step-1"))
    assert not_compared(older, now) == [path] and not_compared(state, now) == []
    assert not_compared(replace(older, fingerprint={}), now) == ["the model's config", "the text's content", path]


def leaves(noun: Any, path: str = "") -> Iterator[tuple[Any, str, str]]:
    """(owner, name of the field, dotted path) of everything in a plan that is not a noun itself."""
    for entry in dataclasses.fields(noun):
        value, whole = getattr(noun, entry.name), f"{path}.{entry.name}" if path else entry.name
        if whole == "layers":
            yield from leaves(value[0], whole)
        elif dataclasses.is_dataclass(value):
            yield from leaves(value, whole)
        else:
            yield noun, entry.name, whole


@pytest.mark.parametrize("make", [a_plan, planned], ids=["upcycled", "adapters"])
def test_whatever_changes_in_a_plan_is_a_difference(make: Any) -> None:
    plan: Plan = make()
    assert list(plan_differences(plan, copy.deepcopy(plan))) == []
    unseen = set()
    for number, (_, name, path) in enumerate(leaves(plan)):
        other = copy.deepcopy(plan)
        other = replace(other, layers=tuple(map(copy.deepcopy, other.layers)))  # layers may share what is alike
        owner = list(leaves(other))[number][0]
        if path == "layers.site.fqn":
            continue  # another layer, which test_state.py looks at
        object.__setattr__(owner, name, "something else")  # no rule of the plan is asked
        found = [key for key, _, now in plan_differences(plan, other) if now == "something else"]
        assert len(found) < 2
        unseen |= set() if found else {path}
    free = {path for _, _, path in leaves(plan) if any(fnmatchcase(path, each) for each in fit.MAY_DIFFER)}
    assert unseen == free
    assert "layers.routing.jitter" in unseen and "layers.experts.num_routed" not in unseen


def test_what_is_computed_again_is_free() -> None:
    """A run goes on with other memory, so with another budget, or with none."""
    again = Recomputed(parts=("norms",), sends=False, modules=("norm",), layers=("layers.0",))
    plan: Plan = a_plan()
    budgeted = replace(plan, recomputed=(again,))
    assert budgeted.hash != plan.hash
    check_plan(budgeted, plan, Path("step-1"))
    check_plan(plan, budgeted, Path("step-1"))


def test_another_alpha_is_another_function() -> None:
    saved, now = planned("adapters.alpha=8"), planned("adapters.alpha=64")
    with pytest.raises(PlanError) as caught:
        check_plan(saved, now, Path("step-1"))
    assert str(caught.value) == (
        "trainer.resume=step-1: the checkpoint does not fit this run: adapters.alpha: 8.0 in the checkpoint, 64.0 here; "
        "layers.0.mlp.experts.adapters.alpha: 8.0 in the checkpoint, 64.0 here. Set these as they were, start a new run, "
        "or go on all the same with trainer.allow_changes=[adapters.alpha,layers.0.mlp.experts.adapters.alpha]."
    )
    check_plan(saved, now, Path("step-1"), ["*adapters.alpha"])
    check_plan(saved, planned("adapters.alpha=8", "adapters.experts=null"), Path("step-1"), ["layers.*"])
    with pytest.raises(PlanError, match=r"layers\.0\.mlp\.experts\.adapters\.rank: 4 in the checkpoint, null here"):
        check_plan(saved, planned("adapters.alpha=8", "adapters.experts=null"), Path("step-1"))


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["model.class"], r"or go on all the same with trainer.allow_changes=\[model.class\]\."),
        (["data.seq_len"], r"or go on all the same with trainer.allow_changes=\[data.seq_len\]\."),
        ([f"key{i}" for i in range(9)], r"; and 1 more\. .* go on all the same with trainer.allow_changes=\['\*'\]\."),
        (
            ["model.class", *(f"key{i}" for i in range(50))],
            r"; and 43 more\. Give the options of that run again \(its overrides.txt\), or start a new run\.",
        ),
    ],
)
def test_what_to_change_is_said_in_one_line(names: list[str], wanted: str) -> None:
    with pytest.raises(PlanError, match=wanted + "$"):
        fit.refuse([(name, 1, 2) for name in names], [], Path("run"))
    fit.refuse([(name, 1, 2) for name in names], ["*"], Path("run"))
