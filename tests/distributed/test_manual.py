"""Manual optimization equals one process in float64: every gradient before every step, and the weights at the end."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
from torch import Tensor

from moecompile.verify import worst
from tests.distributed import manual_job as job
from tests.distributed.harness import run_distributed_test

pytestmark = pytest.mark.slow

MESHES = {"ep2": ["mesh.ranks_per_node=2"], "ep1x2": ["mesh.ranks_per_node=2", "mesh.ep=1"]}


def plain(side: Any, i: int, *, mean: bool) -> None:
    """One backward, one step of each optimizer."""
    for optimizer in side.optimizers():
        optimizer.zero_grad()
    side.backward(partial(job.cross_entropy, mean=mean), mean=mean)
    side.module.keep_grads()
    for number in range(len(side.optimizers())):
        side.step(number)


def accumulated(side: Any, i: int, *, mean: bool) -> None:
    """A step every second batch, clipped; zeroed in place."""
    side.backward(partial(job.cross_entropy, mean=mean), mean=mean)
    side.module.keep_grads()
    if i % 2:
        for number in range(len(side.optimizers())):
            side.clip(number, 0.1)
            side.step(number)
        for optimizer in side.optimizers():
            optimizer.zero_grad(set_to_none=i != 1)


def gan(side: Any, i: int, *, mean: bool, toggles: bool) -> None:
    """The compiled model against the plain one; both losses go through the compiled model."""
    for number, detach in ((0, False), (1, True)):
        if toggles:
            side.toggle(number)
        side.optimizers()[number].zero_grad()
        loss = partial(job.adversary, mean=mean, detach=detach)
        loss.through_model = not detach
        side.backward(loss, mean=mean)
        side.module.keep_grads()
        side.step(number)
        if toggles:
            side.untoggle(number)


def several(side: Any, i: int, *, mean: bool) -> None:
    """Two losses over the same tokens, each with a backward; then a step that zeroes one optimizer's gradients alone."""
    losses = [partial(job.cross_entropy, mean=mean), partial(job.adversary, mean=mean, detach=False)]
    side.backward_each(losses, mean=mean)
    side.module.keep_grads()
    side.clip(i % 2, 1.0)
    side.step(i % 2)
    side.optimizers()[i % 2].zero_grad()


def late(side: Any, i: int, *, mean: bool) -> None:
    """All is zeroed, and the other optimizer's weights are frozen, between forward and backward."""
    side.between = lambda: (side.module.zero_grad(), side.toggle(i % 2))
    side.backward(partial(job.adversary, mean=mean, detach=False), mean=mean)
    side.untoggle(i % 2)
    side.module.keep_grads()
    side.step(i % 2)


def recipes() -> dict[str, job.Recipe]:
    found: dict[str, job.Recipe] = {}
    for name, mean in (("mean", True), ("sum", False)):
        for optimizers in (job.one_optimizer, job.disjoint):
            found[f"plain-{name}-{optimizers.__name__}"] = job.Recipe(partial(plain, mean=mean), optimizers, name)
        found[f"accumulated-{name}"] = job.Recipe(partial(accumulated, mean=mean), job.disjoint, name)
        found[f"gan-{name}"] = job.Recipe(partial(gan, mean=mean, toggles=False), job.two_models, name)
        found[f"gan-toggled-{name}"] = job.Recipe(partial(gan, mean=mean, toggles=True), job.two_models, name)
        found[f"late-{name}"] = job.Recipe(partial(late, mean=mean), job.two_models, name)
        found[f"several-{name}"] = job.Recipe(partial(several, mean=mean), job.two_models, name)
    return found


RECIPES = recipes()


def every_recipe(rank: int, world_size: int) -> dict[str, Any]:
    return {
        (name, mesh): job.on_ranks(recipe, world_size, MESHES[mesh])
        for name, recipe in RECIPES.items()
        for mesh in MESHES
    }


@cache
def results() -> list[dict[Any, Any]]:
    return run_distributed_test(every_recipe, 2, timeout_s=300)


def check(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert len(got["grads"]) == len(wanted["grads"])
    for ours, theirs in zip(got["grads"], wanted["grads"], strict=True):
        for name in theirs:
            assert (ours[name] is None) == (theirs[name] is None), name
        assert worst(present(ours), present(theirs)) < (1e-10, "")
    assert worst(got["weights"], wanted["weights"]) < (1e-10, "")


def present(grads: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: grad for name, grad in grads.items() if grad is not None}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", RECIPES)
def test_equals_one_process(name: str, mesh: str) -> None:
    wanted = job.on_one(RECIPES[name], 2)
    assert wanted["weights"]["model.blocks.0.router.correction_bias"].abs().max() > 0
    for result in results():
        check(result[name, mesh], wanted)
