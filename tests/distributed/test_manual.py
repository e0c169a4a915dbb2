"""Manual optimization equals one process in float64: every gradient before every step, and the weights at the end."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

import moecompile
from moecompile.errors import ConfigError
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


def closures(side: Any, i: int, *, mean: bool) -> None:
    """Each step runs its own backward in a closure; raw optimizers step in the second half."""
    for number, detach in ((0, False), (1, True)):
        loss = partial(job.adversary, mean=mean, detach=detach)
        loss.through_model = not detach

        def closure(number: int = number, loss: Any = loss) -> None:
            side.optimizers()[number].zero_grad()
            side.backward(loss, mean=mean)
            side.module.keep_grads()

        side.step_by(number, closure, is_raw=i >= 2)


def unsynced(side: Any, i: int, *, mean: bool) -> None:
    """Lightning's `toggle_model(sync_grad=False)`; what one backward has left is zeroed before the next."""
    with side.toggled(0, sync_grad=i % 2 == 1):
        side.backward(partial(job.adversary, mean=mean, detach=False), mean=mean)
        if i == 2:
            side.optimizers()[0].zero_grad()
        side.module.keep_grads()
        if i % 2:
            side.step(0)
            side.optimizers()[0].zero_grad()


def skipped(side: Any, i: int, *, mean: bool) -> None:
    """A step without a backward, a batch without both, two steps after one backward."""
    if i in (1, 3):
        side.optimizers()[0].zero_grad()
        side.backward(partial(job.cross_entropy, mean=mean), mean=mean)
    side.module.keep_grads()
    if i != 2:
        side.step(0)
        side.step(0)


def recipes() -> dict[str, job.Recipe]:
    found: dict[str, job.Recipe] = {}
    for name, mean in (("mean", True), ("sum", False)):
        for optimizers in (job.one_optimizer, job.disjoint):
            found[f"plain-{name}-{optimizers.__name__}"] = job.Recipe(partial(plain, mean=mean), optimizers, name)
        found[f"accumulated-{name}"] = job.Recipe(partial(accumulated, mean=mean), job.disjoint, name)
        found[f"gan-{name}"] = job.Recipe(partial(gan, mean=mean, toggles=False), job.two_models, name)
        found[f"gan-toggled-{name}"] = job.Recipe(partial(gan, mean=mean, toggles=True), job.two_models, name)
        found[f"late-{name}"] = job.Recipe(partial(late, mean=mean), job.two_models, name)
        for step in (closures, unsynced, skipped):
            found[f"{step.__name__}-{name}"] = job.Recipe(partial(step, mean=mean), job.two_models, name)
        found[f"several-{name}"] = job.Recipe(partial(several, mean=mean), job.two_models, name)
    return found


RECIPES = recipes()


MISTAKES: dict[str, tuple[str, Any]] = {}


def mistake(loss: str) -> Any:
    """A step that must be refused, under a strategy for `loss`."""
    return lambda step: MISTAKES.setdefault(step.__name__, (loss, step)) and step


@mistake("mean")
def passed_by(side: Any, i: int) -> None:
    job.cross_entropy(side.module, *side.batch, mean=True).backward()


@mistake("mean")
def passed_by_in_the_end(side: Any, i: int) -> None:
    side.backward(partial(job.cross_entropy, mean=True), mean=True)
    if i == 3:
        job.cross_entropy(side.module, *side.batch, mean=True).backward()


@mistake("mean")
def passed_by_frozen_routers(side: Any, i: int) -> None:
    for parameter in side.module.parameters():
        parameter.requires_grad_(type(parameter) is not torch.nn.Parameter)  # shards alone
    job.cross_entropy(side.module, *side.batch, mean=True).backward()
    side.step(0)


@mistake("sum")
def not_counted(side: Any, i: int) -> None:
    if i == 0:
        side.module.trainer.strategy.count_tokens(4)  # says nothing of the next batch
    side.module.manual_backward(job.cross_entropy(side.module, *side.batch, mean=False))


@mistake("mean")
def counted_for_means(side: Any, i: int) -> None:
    side.module.trainer.strategy.count_tokens(4)


def refused(name: str, world_size: int) -> str:
    loss, step = MISTAKES[name]
    try:
        job.on_ranks(job.Recipe(step, job.two_models, loss), world_size, MESHES["ep2"])
    except ConfigError as error:
        return str(error)
    return ""


def refused_on_nan(world_size: int) -> str:
    strategy = moecompile.ExpertParallelStrategy(on_nan="stop")
    module = job.Pair(MESHES["ep2"], job.Recipe(lambda side, i: None, job.two_models))
    try:
        Trainer(strategy=strategy, devices=world_size, max_epochs=1, **job.CPU).fit(module)
    except ConfigError as error:
        return str(error)
    return ""


def every_mistake(rank: int, world_size: int) -> dict[str, str]:
    return {name: refused(name, world_size) for name in MISTAKES} | {"on_nan": refused_on_nan(world_size)}


def test_mistakes_are_told() -> None:
    by = (
        "automatic_optimization=False: a backward did not go through the strategy, so its gradients are not summed over "
        "ranks. Call self.manual_backward(loss) instead of loss.backward()."
    )
    for told in run_distributed_test(every_mistake, 2, timeout_s=120):
        assert told == {
            "passed_by": by,
            "passed_by_in_the_end": by,
            "passed_by_frozen_routers": by,
            "not_counted": "loss=sum: under manual optimization the tokens of a backward must be counted before it. Call "
            "self.trainer.strategy.count_tokens(num_tokens) before manual_backward, or use loss='mean'.",
            "counted_for_means": "count_tokens=4: is for manual optimization with loss=sum. With automatic optimization, "
            "return {'loss': sum, 'num_tokens': n} from training_step; a mean needs no count.",
            "on_nan": "on_nan=stop: is only for automatic optimization. Use on_nan=None, and check losses in "
            "training_step.",
        }


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
        if present(theirs):
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
