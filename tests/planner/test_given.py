"""A given plan decides; what the caller set must agree with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.plan import FFNSite, Plan, save
from moecompile.planner import ModelFacts
from moecompile.planner.build_plan import build_plan
from moecompile.planner.given import given_plan, plan_file, with_plan
from moecompile.planner.params import AttentionFact
from moecompile.schema import mesh_spec

SITES = [
    FFNSite(
        fqn=f"layers.{i}.mlp", index=i, kind="gated", d_model=64, d_ff=640, activation="silu", bias_up=False, bias_down=False,
        swiglu=True,
    )
    for i in range(2)
]  # fmt: skip
FACTS = ModelFacts(params_total=100_000, num_layers=2)
CHOSEN = ["recipe=mixtral_ep", "mesh.ep=2", "dispatch.kind=dedup", "dispatch.overlap=shared", "routing.top_k=3"]


def planned(*overrides: str) -> Plan:
    return build_plan(SITES, compose_config(list(overrides)), FACTS)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save(planned(*CHOSEN), tmp_path / "plan.yaml")
    return tmp_path


def test_the_config_makes_the_given_plan(run: Path) -> None:
    plan = planned(*CHOSEN)
    assert planned("recipe=mixtral_ep").hash != plan.hash
    for path in (run, run / "plan.yaml"):
        config = with_plan(compose_config(["task=plan", "recipe=mixtral_ep", f"plan={path}"]))
        assert config.plan == str(run / "plan.yaml")
        assert given_plan(config) == plan
        assert (config.mesh.ep, config.dispatch.kind.value, config.routing.top_k) == (2, "dedup", 3)
        assert build_plan(SITES, config, FACTS).hash == plan.hash
    with_plan(compose_config([f"plan={run}", "balance.losses.micro_batch=null"]))
    assert with_plan(compose_config([f"plan={run}", "balance=auto"])).balance.losses.micro_batch == 0.01
    unchanged = compose_config(["recipe=mixtral_ep"])
    assert with_plan(unchanged) is unchanged


@pytest.mark.parametrize("recipe", ["mixtral_ep", "switch_ep", "deepseek_ep"])
def test_a_recipe_s_own_plan_can_be_given(recipe: str, tmp_path: Path) -> None:
    plan = planned(f"recipe={recipe}")
    save(plan, tmp_path / "plan.yaml")
    given = with_plan(compose_config([f"recipe={recipe}", f"plan={tmp_path}"]))
    assert build_plan(SITES, given, FACTS).hash == plan.hash


def test_every_axis_of_the_mesh_is_the_plan_s(tmp_path: Path) -> None:
    attention = AttentionFact(path="layers.0.attn", query_heads=4, key_heads=2, d_key=16, d_value=16)
    facts = replace(FACTS, attention=(attention,), no_context="")
    given = compose_config(["recipe=mixtral_ep", "mesh.cp=2"])
    plan = build_plan(SITES, given, facts)
    save(plan, tmp_path / "plan.yaml")
    config = with_plan(compose_config(["recipe=mixtral_ep", f"plan={tmp_path}"]))
    assert mesh_spec(config.mesh) == plan.mesh and plan.mesh.cp == 2
    assert build_plan(SITES, config, facts).hash == plan.hash
    with pytest.raises(ConfigError, match=r"^mesh\.cp=1: the plan of .* has 2"):
        with_plan(compose_config(["recipe=mixtral_ep", f"plan={tmp_path}", "mesh.cp=1"]))


def test_layers_that_differ_are_the_plan_s_alone(tmp_path: Path) -> None:
    plan = planned("recipe=mixtral_ep", "+per_layer.first.layers=0:1", "+per_layer.first.routing.top_k=1")
    save(plan, tmp_path / "plan.yaml")
    config = with_plan(compose_config(["recipe=mixtral_ep", f"plan={tmp_path}"]))
    assert given_plan(config) == plan
    assert config.routing.top_k == 2
    with pytest.raises(ConfigError, match=r"routing\.top_k=1: the plan of .* has 1 and 2"):
        with_plan(compose_config(["recipe=mixtral_ep", f"plan={tmp_path}", "routing.top_k=1"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mesh.ep=4", r"^mesh\.ep=4: the plan of .* has 2\. Leave it out, or plan again\.$"),
        ("mesh=cpu_1", r"^mesh\.num_nodes=1: the plan of .* has 2\."),
        ("dispatch=flat", r"^dispatch\.kind=flat: the plan of .* has dedup\."),
        ("balance.losses.micro_batch=0.5", r"^balance\.losses\.micro_batch=0\.5: the plan of .* has 0\.01\."),
        ("experts.match=x", r"^experts\.match=x: the plan of .* decides that\. Leave it out, or plan again without"),
        ("adapters=lora", r"^adapters\.kind=lora: the plan of .* has none\."),
        ("task=verify", r"^plan=.*: task=verify makes its own plan\. Use task=plan, rehearse, compile or train"),
        ("compare=x", r"^compare=x: is for task=plan\. Use task=plan"),
    ],
)
def test_a_config_that_disagrees_is_refused(run: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_plan(compose_config(["recipe=mixtral_ep", f"plan={run}", override]))


def test_a_plan_chooses_no_code_to_run_by_itself(tmp_path: Path) -> None:
    plan = planned("recipe=mixtral_ep", "dispatch.kind=dedup", "trainer.checkpointing=none")
    layers = tuple(replace(layer, dispatch=replace(layer.dispatch, backend="mine:fast")) for layer in plan.layers)
    save(replace(plan, layers=layers), tmp_path / "plan.yaml")
    words = ["recipe=mixtral_ep", f"plan={tmp_path}"]
    with pytest.raises(ConfigError, match=r"^plan=.*: names code to run, dispatch\.backend=mine:fast\. Give dispatch"):
        with_plan(compose_config(words))
    assert with_plan(compose_config([*words, "dispatch.backend='mine:fast'"])).dispatch.backend == "mine:fast"


def test_what_agrees_is_accepted(run: Path) -> None:
    for override in (
        "mesh.ep=2",
        "mesh.ep=auto",
        "dispatch.kind=dedup",
        "dispatch=auto",
        "mesh=cpu_2x2",
        "data.seq_len=64",
    ):
        assert with_plan(compose_config(["recipe=mixtral_ep", f"plan={run}", override])).mesh.ep == 2


def test_there_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^plan=.*: is neither a plan\.yaml nor a run directory with one\."):
        plan_file(str(tmp_path))
    with pytest.raises(ConfigError, match=r"^compare=nowhere: is neither"):
        plan_file("nowhere", "compare")
