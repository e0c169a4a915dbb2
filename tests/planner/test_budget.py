"""What a budget chooses: within the memory, as fast as the best of all combinations, and as the plan says."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from functools import cache
from itertools import combinations_with_replacement, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moecompile
from moecompile.compose import compose_config
from moecompile.errors import ConfigError, PlanError
from moecompile.models.build import example_inputs
from moecompile.models.source import source_model
from moecompile.pipeline.captured import planning_facts
from moecompile.pipeline.shape import shape_of_model
from moecompile.plan import FITS, TOO_LARGE, Plan, Recomputed, from_yaml, load, save, to_yaml
from moecompile.planner.budget import HEADROOM, budget_of, rank_prices
from moecompile.planner.build_plan import build_plan, draft_plan, run_facts
from moecompile.planner.cost_model.forecast import forecast_plan
from moecompile.planner.cost_model.inputs import inputs_of
from moecompile.planner.cost_model.shapes import ModelShape
from moecompile.planner.given import with_plan
from moecompile.planner.memory import Gradients, memory_of_fullest_rank
from moecompile.planner.params import ModelFacts
from moecompile.planner.pipeline import ranks_of
from moecompile.tasks.plan import planned

MODEL = ["model=qwen3_30b_a3b", "mesh=h100_2x8", "data.seq_len=4096", "data.micro_batch_size=1"]


@cache
def model() -> nn.Module:
    return source_model(compose_config(MODEL))


@cache
def of_model() -> tuple[Any, ModelFacts]:
    """Sites and facts."""
    config = compose_config(MODEL)
    return planning_facts(model(), config, example_inputs(model(), config.data.seq_len))


def shape(plan: Plan) -> ModelShape:
    return shape_of_model(model(), plan)


def made(*overrides: str) -> Plan:
    sites, facts = of_model()
    return build_plan(sites, compose_config([*MODEL, *overrides]), facts, shape)


def plan_of(*overrides: str) -> Plan:
    return made("trainer.checkpointing=budget", *overrides)


def seconds(plan: Plan, *overrides: str) -> float:
    return forecast_plan(shape(plan), plan, compose_config([*MODEL, *overrides])).seconds


@pytest.mark.slow
@pytest.mark.parametrize("gib", [45.0, 52.0, 60.0, 75.0, 200.0])
def test_more_memory_is_never_slower_and_never_overrun(gib: float) -> None:
    limit = f"hardware.memory_gib={gib}"
    plan = plan_of(limit)
    others = {}
    for name in ("none", "keep_exchanges", "full"):
        overrides = (limit, f"trainer.checkpointing={name}")
        other = made(*overrides)
        if other.estimate.memory_bytes_uneven <= (1 - HEADROOM) * gib * 2**30:
            others[name] = seconds(other, *overrides)
    assert plan.estimate.fits == FITS
    assert plan.estimate.memory_bytes_uneven <= (1 - HEADROOM) * gib * 2**30
    assert others and seconds(plan, limit, "trainer.checkpointing=budget") <= 1.0001 * min(others.values())


def test_it_recomputes_nothing_if_all_fits_and_everything_if_nothing_does() -> None:
    assert plan_of("hardware.memory_gib=1000").recomputed == ()
    least = plan_of("hardware.memory_gib=1")
    assert least.estimate.fits == TOO_LARGE
    assert [each.parts for each in least.recomputed] == [("layer",)] and least.recomputed[0].sends


def test_the_choice_is_that_of_all_combinations() -> None:
    """Four layers, every combination by brute force: at most one layer's change away in time."""
    (sites, facts), config = of_model(), compose_config([*MODEL, "trainer.checkpointing=budget"])
    plan, facts = draft_plan(sites, config, facts)
    facts = replace(facts, layers=facts.layers[:4], num_layers=4)
    layers = plan.layers[:4]
    four = shape(plan)
    four = replace(four, places=four.places[:4], layers=tuple(replace(each, count=4) for each in four.layers))
    plan = replace(plan, layers=layers)
    run = replace(run_facts(config, plan.mesh, facts), row_load=2.0, accumulation=2)
    prices = rank_prices(inputs_of(four, plan, config), 1)
    budget = budget_of(layers, plan.mesh, facts, run, four, prices)
    (choices,) = budget.choices
    of_choices = sorted({choice.seconds for choice in choices})
    whole = budget.whole[0]
    for share in (0.2, 0.4, 0.6, 0.8, 0.95):
        limit = share * whole.kept + max(whole.loss, whole.layers)
        chosen = budget.within(Gradients(), limit)
        got = sum(each.seconds for each in budget.costs(chosen.recomputed))
        assert chosen.expected.peak <= limit
        best = min(
            sum(choice.seconds for choice in some)
            for some in combinations_with_replacement(choices, 4)
            if sum(c.kept for c in some) + max(whole.loss, whole.layers + max(c.again for c in some)) <= limit
        )
        assert best <= got <= best + max(b - a for a, b in pairwise(of_choices)) + 1e-12


def test_the_estimate_is_of_what_was_chosen() -> None:
    plan = plan_of("hardware.memory_gib=54")
    estimate = plan.estimate
    assert len({(each.parts, each.sends) for each in estimate.recomputation}) > 1
    assert sum(each.layers for each in estimate.recomputation) == 48
    chosen = {path for each in plan.recomputed for path in each.layers}
    nothing = sum(each.layers for each in estimate.recomputation if not each.parts)
    assert len(chosen) == 48 - nothing
    config, (_, facts) = compose_config([*MODEL, "trainer.checkpointing=budget"]), of_model()
    run = replace(
        run_facts(config, plan.mesh, facts), reduce=plan.reduce, gather=plan.gather, recomputed=plan.recomputed
    )
    assert memory_of_fullest_rank(plan.layers, plan.mesh, facts, run) == estimate.memory_bytes_per_rank
    # The sum of prices is what the forecast of the whole plan takes longer.
    given = "trainer.checkpointing=budget"
    longer = seconds(plan, given) - seconds(replace(plan, recomputed=()), given)
    assert sum(each.seconds for each in estimate.recomputation) == pytest.approx(longer, rel=0.05)


def test_a_plan_keeps_it_and_a_given_plan_decides(tmp_path: Path) -> None:
    plan = plan_of("hardware.memory_gib=52")
    assert from_yaml(to_yaml(plan)) == plan
    assert replace(plan, recomputed=()).hash != plan.hash
    save(plan, tmp_path / "plan.yaml")
    given = [*MODEL, f"plan={tmp_path}", "hardware.memory_gib=60"]
    config = with_plan(compose_config(given))
    assert config.trainer.checkpointing.value == "budget"
    again = planned(model(), config, plan).plan
    assert (again.hash, again.recomputed) == (plan.hash, plan.recomputed)
    assert again.estimate.recomputation == plan.estimate.recomputation
    with pytest.raises(ConfigError, match=r"trainer.checkpointing=full: the plan of .* says what each layer"):
        with_plan(compose_config([*given, "trainer.checkpointing=full"]))


@pytest.mark.parametrize(
    ("parts", "modules"), [((), ("x",)), (("head",), ("x",)), (("layer", "norms"), ("",)), (("layer",), ("mlp",))]
)
def test_what_makes_no_sense_is_refused(parts: tuple[str, ...], modules: tuple[str, ...]) -> None:
    with pytest.raises(PlanError, match=r"recomputed.parts"):
        Recomputed(parts=parts, sends=False, modules=modules, layers=("model.layers.0",))
    fine = Recomputed(parts=("norms",), sends=False, modules=("norm",), layers=("model.layers.0",))
    with pytest.raises(PlanError, match=r"model.layers.0.*is listed twice"):
        replace(plan_of(), recomputed=(fine, dataclasses.replace(fine, modules=("other",))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ("model.layers.99",)}, r"recomputed.layers=model.layers.99: is no layer of the model"),
        ({"parts": ("ffn",), "modules": ("mlp",)}, r"recomputed.parts=ffn: model.layers.0 has no such part"),
    ],
)
def test_an_edited_plan_must_fit_the_model(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    plan = plan_of("hardware.memory_gib=52")
    first = replace(plan.recomputed[0], **change)
    save(replace(plan, recomputed=(first,)), tmp_path / "plan.yaml")
    config = with_plan(compose_config([*MODEL, f"plan={tmp_path}"]))
    with pytest.raises(PlanError, match=message):
        planned(model(), config, load(tmp_path / "plan.yaml"))
    if "parts" in change:  # what the search would not choose may be asked for
        save(replace(plan, recomputed=(replace(first, parts=("attention",), sends=True),)), tmp_path / "plan.yaml")
        edited = planned(model(), config, load(tmp_path / "plan.yaml")).plan
        assert edited.estimate.recomputation[0].parts == ("attention",)


def test_a_graph_has_no_layers() -> None:
    with pytest.raises(ConfigError, match=r"trainer.checkpointing=budget.*this is a graph"):
        build_plan(of_model()[0], compose_config([*MODEL, "trainer.checkpointing=budget"]), of_model()[1])
    tiny = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    with pytest.raises(ConfigError, match=r"trainer.checkpointing=budget.*no list of layers"):
        moecompile.make_plan(tiny, ["trainer.checkpointing=budget"], example=torch.ones(2, 4))


# -- stages ---------------------------------------------------------------------------------------------------------

ONCE = ("reduction", "optimizer", "stragglers")  # in a step, on all stages alike
STAGES = [*MODEL, "mesh.pp=4", "mesh.ep=4", "data.micro_batch_size=2", "data.global_batch_size=128"]


@cache
def staged(*overrides: str) -> tuple[Plan, list[int], list[float]]:
    """The plan of four stages, bytes of the ranks of each, and what they compute again, in seconds."""
    config = compose_config([*STAGES, "trainer.checkpointing=budget", *overrides])
    sites, facts = planning_facts(model(), config, example_inputs(model(), config.data.seq_len))
    plan = build_plan(sites, config, facts, shape)
    run = replace(
        run_facts(config, plan.mesh, facts), recomputed=plan.recomputed, reduce=plan.reduce, gather=plan.gather,
        row_load=plan.estimate.expected_load,
    )  # fmt: skip
    ranks = ranks_of(plan, facts)
    needed = [memory_of_fullest_rank(of.layers, of.mesh, of.facts, of.run(run, plan.pipeline)).total for of in ranks]
    again = [
        sum(each.seconds for each in plan.estimate.recomputation if stage.holds(each.site))
        for stage in plan.pipeline.stages
    ]
    return plan, needed, again


@pytest.mark.parametrize("gib", [45, 60])
def test_each_stage_chooses_for_itself(gib: int) -> None:
    """The first stages keep more micro-batches, and compute more again."""
    plan, needed, again = staged(f"hardware.memory_gib={gib}")
    limit = (1 - HEADROOM) * gib * 2**30
    assert max(needed) == plan.estimate.memory_bytes_uneven <= limit
    assert again == sorted(again, reverse=True) and again[0] > again[-1] == 0
    assert all(total > 0.97 * limit for total, seconds in zip(needed, again, strict=True) if seconds > 0)
    layers = [path for each in plan.recomputed for path in each.layers]
    assert len(set(layers)) == len(layers) > 0
    assert sum(each.layers for each in plan.estimate.recomputation) == 48
    assert from_yaml(to_yaml(plan)) == plan


def test_the_stage_that_computes_the_most_again_sets_the_pace() -> None:
    """Beside one that has memory for all: to within what launches and exchanges hide."""
    words = [*STAGES, "trainer.checkpointing=budget"]
    (plan, _, again), (free, _, nothing) = staged("hardware.memory_gib=45"), staged("hardware.memory_gib=400")
    assert nothing == [0, 0, 0, 0]
    slower, faster = (forecast_plan(shape(each), each, compose_config(words)) for each in (plan, free))
    assert slower.seconds - faster.seconds == pytest.approx(again[0], rel=0.1)
    assert again[0] > 2 * again[2]


def test_the_stage_with_the_most_layers_sets_the_pace() -> None:
    """The head of the last stage counts with its layers."""

    def parts(layout: str) -> tuple[float, float]:
        words = [*STAGES, "trainer.checkpointing=none", "hardware.memory_gib=400", f"pipeline.layout='{layout}'"]
        config = compose_config(words)
        sites, facts = planning_facts(model(), config, example_inputs(model(), config.data.seq_len))
        plan = build_plan(sites, config, facts, shape)
        found = forecast_plan(shape(plan), plan, config).parts
        whole = sum(found[name] for name in found if name not in ("uneven stages", "bubble", *ONCE))
        return found["uneven stages"] / whole, found["bubble"]

    even, long, last = parts("Et*13|t*13|t*13|t*9L"), parts("Et*20|t*10|t*10|t*8L"), parts("Et*10|t*10|t*8|t*20L")
    assert 0 <= even[0] < 0.1 < long[0] < last[0]
    # Of 48 layers and a head of h layers, 20 in place of a quarter; and 20 with the head.
    head = 4 * 20 / (1 + long[0]) - 48
    assert 0 < head < 6 and long[1] > even[1]
    assert 1 + last[0] == pytest.approx(4 * (20 + head) / (48 + head), rel=1e-3)
