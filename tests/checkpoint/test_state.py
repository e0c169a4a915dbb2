"""state.json, and what a config takes from the checkpoint that it goes on from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from moecompile import plan as plans
from moecompile.checkpoint import folders
from moecompile.checkpoint.fingerprint import of_training, settings
from moecompile.checkpoint.fit import check_entries, check_plan
from moecompile.checkpoint.resume import State, check_settings, read_state, resumed, write_state
from moecompile.compose import compose_config
from moecompile.errors import ConfigError, PlanError
from moecompile.pipeline import make_plan
from moecompile.plan import Plan
from moecompile.plan.adapters import AdaptersPlan
from moecompile.schema import Config, validate

OVERRIDES = ["mesh=cpu_2x2", "experts.num_routed=8", "routing.top_k=2", "routing.max_nodes=1", "trainer.max_steps=9"]


def planned(overrides: list[str]) -> Plan:
    ffn = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    return make_plan(ffn, overrides, example=torch.zeros(1, 8))


def state_of(config: Config, step: int = 4) -> State:
    return State(step=step, sequences=step * 16, fixed=settings(config), world_size=4, plan_hash="x", versions={})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = folders.step_folder(folders.checkpoints_of(tmp_path / "old"), 4)
    folder.mkdir(parents=True)
    plans.save(planned(OVERRIDES), folder / folders.PLAN)
    write_state(folder, state_of(compose_config(OVERRIDES)))
    folders.seal(folder)
    return folder


def test_state_comes_back(checkpoint: Path) -> None:
    assert read_state(checkpoint) == state_of(compose_config(OVERRIDES))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "step": 3}'])
def test_another_state_is_a_mistake(text: str, checkpoint: Path) -> None:
    (checkpoint / folders.STATE).write_text(text)
    with pytest.raises(ConfigError, match=r"trainer.resume=.*its state.json cannot be read"):
        read_state(checkpoint)


def test_the_data_must_stay(checkpoint: Path) -> None:
    config = compose_config([*OVERRIDES, "seed=3"])
    with pytest.raises(ConfigError) as caught:
        check_settings(read_state(checkpoint), config, checkpoint)
    assert str(caught.value) == (
        f"trainer.resume={checkpoint}: the checkpoint does not fit this run: seed: 0 in the checkpoint, 3 here. "
        "Set these as they were, start a new run, or go on all the same with trainer.allow_changes=[seed]."
    )


def test_a_run_goes_on_to_the_same_epochs(checkpoint: Path) -> None:
    config = compose_config([*OVERRIDES, "trainer.max_steps=3"])
    with pytest.raises(
        ConfigError, match=r"^trainer.max_steps=3: the checkpoint .* has 4 steps already. Use 4 or more.$"
    ):
        check_settings(read_state(checkpoint), config, checkpoint)
    config.data.epochs = 0.5  # of which 3 are the steps
    with pytest.raises(ConfigError) as caught:
        check_settings(read_state(checkpoint), config, checkpoint)
    assert str(caught.value) == (
        f"data.epochs=0.5: are 3 steps, and the checkpoint {checkpoint} has 4 already. Use more: they count from the "
        "beginning of the run."
    )
    config.trainer.max_steps = 4
    check_settings(read_state(checkpoint), config, checkpoint)  # epochs may differ


def test_groups_stay_those_of_the_first_mesh(checkpoint: Path) -> None:
    """groups=auto is 2 on two nodes; on one node it would be 1, another router."""
    here = [*OVERRIDES, "mesh=cpu_1x2"]
    assert planned(here).layers[0].routing.groups == 1
    config = resumed(compose_config([*here, f"trainer.resume={checkpoint.parent.parent}"]), Path("new"))
    assert (config.routing.groups, config.routing.top_groups) == (2, 1)
    assert config.trainer.resume == str(checkpoint)
    validate(config)
    check_plan(planned([*here, "routing.groups=2"]), planned(OVERRIDES), checkpoint)


def test_slices_stay_in_their_order(checkpoint: Path) -> None:
    """With even groups, experts are slices one after the other: no weights of a run without them would fit."""
    slices = [*OVERRIDES, "routing.max_nodes=null", "experts=fine_grained", "routing.top_k=4"]
    plans.save(planned(slices), checkpoint / folders.PLAN)
    (checkpoint / folders.SUMS).unlink()
    folders.seal(checkpoint)
    here = [*slices, "routing.even_groups=true"]
    config = resumed(compose_config([*here, f"trainer.resume={checkpoint}"]), Path("new"))
    assert config.routing.groups == "auto"  # not the one group of the checkpoint
    with pytest.raises(PlanError) as caught:
        check_plan(planned(slices), planned(here), checkpoint, allowed=["*"])
    assert str(caught.value) == (
        f"routing.even_groups=true: the experts of  in the checkpoint {checkpoint} are the slices of its FFN in order, copy by copy. "
        "Use false, or start a new run."
    )
    random = [*OVERRIDES, "routing.max_nodes=null", "routing.groups=2"]  # experts of their own, in no order
    check_plan(planned(random), planned([*random, "routing.even_groups=true"]), checkpoint, allowed=["*"])


def test_a_promise_that_the_new_mesh_cannot_say_is_still_kept(checkpoint: Path) -> None:
    """max_nodes=2 is refused on one node, unless the groups are known already."""
    plans.save(planned([*OVERRIDES, "routing.max_nodes=2"]), checkpoint / folders.PLAN)
    (checkpoint / folders.SUMS).unlink()
    folders.seal(checkpoint)
    here = compose_config([*OVERRIDES, "mesh=cpu_1x2", "routing.max_nodes=2", f"trainer.resume={checkpoint}"])
    with pytest.raises(ConfigError, match=r"routing.max_nodes=2: the EP group spans only 1 node"):
        validate(here)
    validate(resumed(here, Path("new")))


def test_a_dense_baseline_needs_steps_that_were_all_trained_alike(checkpoint: Path) -> None:
    before = compose_config([*OVERRIDES, "optimizer.lr=0.01"])
    legs = [of_training(compose_config(OVERRIDES)), of_training(before)]
    given = [*OVERRIDES, "optimizer.lr=0.01", f"trainer.resume={checkpoint}"]

    def go_on(known: list[dict[str, str]], *overrides: str) -> None:
        write_state(checkpoint, replace(state_of(before), metrics={"trained_with": known}))
        (checkpoint / folders.SUMS).unlink()
        folders.seal(checkpoint)
        resumed(compose_config([*given, *overrides]), Path("new"))

    go_on(legs)
    go_on(legs[1:], "trainer.baseline=dense")
    go_on(legs[1:], "trainer.baseline=dense", "balance=none", "trainer.log_interval=3")
    go_on([], "trainer.baseline=dense", "trainer.max_steps=20")  # of an earlier version
    with pytest.raises(ConfigError) as caught:
        go_on(legs, "trainer.baseline=dense")
    assert str(caught.value) == (
        f"trainer.baseline=dense: steps before {checkpoint} were trained with optimizer.lr=0.001 (0.01 here); the dense "
        "model would have one setting throughout, which is no comparison. Use trainer.baseline=none, or the settings of "
        "before."
    )
    with pytest.raises(ConfigError, match=r"were trained with trainer.max_steps=9 \(20 here\); "):
        go_on(legs[1:], "trainer.baseline=dense", "trainer.max_steps=20")
    constant = of_training(compose_config([*given, "optimizer.min_lr_ratio=1"]))
    go_on([constant], "trainer.baseline=dense", "trainer.max_steps=20", "optimizer.min_lr_ratio=1")


def test_adapters_stay(checkpoint: Path) -> None:
    """One line, and not all their tensors."""
    given = [*OVERRIDES, f"trainer.resume={checkpoint}"]
    with pytest.raises(ConfigError) as caught:
        resumed(compose_config([*given, "adapters=lora"]), Path("new"))
    assert str(caught.value) == (
        f"adapters.kind=lora: the checkpoint {checkpoint} was trained without adapters. Leave adapters out, or train them "
        "on the folder that task=export writes of it."
    )
    adapters = AdaptersPlan(rank=4, alpha=8.0, dropout=0.0, linears=("0",), train_router=False)
    plans.save(replace(planned(OVERRIDES), adapters=adapters), checkpoint / folders.PLAN)
    (checkpoint / folders.SUMS).unlink()
    folders.seal(checkpoint)
    with pytest.raises(ConfigError) as caught:
        resumed(compose_config(given), Path("new"))
    assert str(caught.value) == (
        f"adapters.kind=none: the checkpoint {checkpoint} was trained with adapters. Give adapters=lora adapters.rank=4 "
        "adapters.alpha=8."
    )
    resumed(compose_config([*given, "adapters=lora"]), Path("new"))


def test_a_new_run_takes_nothing(checkpoint: Path) -> None:
    config = compose_config(OVERRIDES)
    assert resumed(config, Path("nothing here")) is config
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir=.*: holds the checkpoints of another run"):
        resumed(config, checkpoint.parent.parent)
    auto = compose_config([*OVERRIDES, "trainer.resume=auto"])
    assert resumed(auto, Path("nothing here")) is auto
    plan_task = replace(compose_config([*OVERRIDES, "task=plan", "trainer.resume=nowhere"]))
    assert resumed(plan_task, Path("nothing here")) is plan_task


def test_differences_are_listed() -> None:
    ours, theirs = planned(OVERRIDES), planned([*OVERRIDES, "experts.num_routed=16", "routing.score=sigmoid"])
    with pytest.raises(PlanError) as caught:
        check_plan(theirs, ours, Path("step-1"))
    assert str(caught.value) == (
        "trainer.resume=step-1: the checkpoint does not fit this run: .experts.num_routed: 16 in the checkpoint, 8 "
        "here; .routing.score: sigmoid in the checkpoint, softmax here. Set these as they were, start a new run, or go on "
        "all the same with trainer.allow_changes=[.experts.num_routed,.routing.score]."
    )
    other_site = replace(ours.layers[0], site=replace(ours.layers[0].site, fqn="layers.0"))
    with pytest.raises(PlanError, match=r": experts in the checkpoint, dense here; layers.0: dense in the checkpoint"):
        check_plan(ours, replace(ours, layers=(other_site,)), Path("step-1"))


def test_what_only_training_uses_may_change() -> None:
    changed = [*OVERRIDES, "routing.jitter=0.1", "routing.capacity_factor=1.5", "balance.rule=bias", "dispatch=flat"]
    check_plan(planned(OVERRIDES), planned(changed), Path("step-1"))


def test_names_and_shapes_are_compared() -> None:
    check_entries({"a": (2, 3)}, {"a": (2, 3)}, Path("step-1"))
    with pytest.raises(PlanError) as caught:
        check_entries({"a": (2, 3), "b": ()}, {"a": (2, 4), "c": (1,)}, Path("step-1"))
    assert str(caught.value) == (
        "trainer.resume=step-1: the checkpoint does not fit this run: a: [2, 3] in the checkpoint, [2, 4] here; "
        "b: [] in the checkpoint, missing here; c: missing in the checkpoint, [1] here. "
        "Set these as they were, or start a new run."
    )
