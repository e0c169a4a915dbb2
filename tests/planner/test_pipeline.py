"""Where the planner cuts a model, the layouts that it takes, and what a rank of a stage needs."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

import moecompile
from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.match.regions import Captured
from moecompile.mesh import MeshSpec
from moecompile.models.build import example_inputs
from moecompile.models.source import source_model
from moecompile.pipeline import planning_facts
from moecompile.pipeline.facts import facts_of
from moecompile.pipeline.shape import shape_of_model
from moecompile.plan import Plan
from moecompile.planner.build_plan import draft_plan
from moecompile.planner.cost_model.forecast import forecast_plan
from moecompile.planner.memory import activations, exchanged
from moecompile.planner.params import RunFacts, model_params, trained_params
from moecompile.planner.pipeline import alike, balanced, counts_of, ranks_of
from moecompile.planner.search.axes import Axes, axes_of
from moecompile.planner.search.found import Candidate, Rejected
from moecompile.planner.search.run import Search, runnable
from moecompile.report.plan_tables import Compared, differences
from tests.match.test_boundaries import boundaries, cut

TWO = ["mesh=cpu_1x4", "mesh.pp=2"]
PAIRS = ["pipeline.schedule=dualpipev", "pipeline.overlap=exchanges"]


def plan(*overrides: str, recipe: str = "deepseek_ep") -> Plan:
    chosen = compose_config([f"recipe={recipe}", *overrides])
    model = source_model(chosen)
    return moecompile.make_plan(model, chosen, example=example_inputs(model, chosen.data.seq_len))


@pytest.mark.parametrize("costs", [[1.0] * 7, [5, 1, 1, 1, 1, 9], [3, 1, 4, 1, 5, 9, 2, 6], [1, 1, 1, 20]])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_dearest_stage_is_as_cheap_as_possible(costs: list[float], number: int) -> None:
    def dearest(counts: list[int]) -> float:
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return max(sum(costs[end - count : end]) for end, count in zip(ends, counts, strict=True))

    found = balanced(costs, number)
    assert sum(found) == len(costs) and min(found) >= 1 and len(found) == number
    every = [[b - a for a, b in zip((0, *cuts), (*cuts, len(costs)), strict=True)]
             for cuts in combinations(range(1, len(costs)), number - 1)]  # fmt: skip
    assert dearest(found) == min(map(dearest, every))


@pytest.mark.parametrize(
    ("layout", "counts"),
    [
        ("Et*3|t*3L", [3, 3]), ("Ettt|tttL", [3, 3]), ("E t * 3 | t*2,t,L", [3, 3]), ("Et|(tt|)*2tL", [1, 2, 2, 1]),
        ("E(t|)*5tL", [1, 1, 1, 1, 1, 1]),
    ],
)  # fmt: skip
def test_layouts_in_the_words_of_megatron(layout: str, counts: list[int]) -> None:
    assert counts_of(layout, len(counts), 6) == counts


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        ("Et*3|t*2mL", "m is a layer that predicts further tokens, which the model does not have"),
        ("Et*3|t*3x", "x is no part of it"),
        ("Et*6L", "has 1 stages, and mesh.pp * pipeline.stages_per_rank is 2"),
        ("Et*3|t*4L", "has 7 layers, and the model has 6"),
        ("E|t*6L", "stage 0 has no layer"),
        ("t*3E|t*3L", "the embedding (E) is in the first stage, and the head (L) in the last one"),
    ],
)
def test_layouts_that_are_none(layout: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        counts_of(layout, 2, 6)
    assert f"pipeline.layout={layout}: {rule}" in str(caught.value)


def test_a_layout_is_planned_and_printed_as_it_was_given() -> None:
    planned = plan(*TWO, "pipeline.layout='Et*2|t*4L'").pipeline
    assert planned is not None and planned.layout == "Et*2|t*4L"
    assert [len(stage.layers) for stage in planned.stages] == [2, 4]


def test_a_stage_needs_less_of_all_but_what_is_in_flight() -> None:
    one, two = plan("mesh=cpu_1x2").estimate, plan(*TWO).estimate
    assert one is not None and two is not None
    assert (one.params_total, one.params_active) == (two.params_total, two.params_active)
    before, now = one.memory_bytes_per_rank, two.memory_bytes_per_rank
    assert now.weights < before.weights and now.optimizer < before.optimizer
    hidden, tokens = 128, 4 * 128
    assert two.stage_bytes_per_step == hidden * tokens * 4 * two.assumes.accumulation  # type: ignore[union-attr]


def test_a_tied_weight_has_its_own_size() -> None:
    """Not that of the config's words in the width of its layers: OPT-350m has an embedding of half of that."""
    found = boundaries("tied")
    facts = facts_of(found.model, None, Captured(boundaries=found))
    stages = Plan(mesh=MeshSpec(ranks_per_node=2, pp=2), layers=(), reductions=(), pipeline=cut(found, "layers.2"))
    assert [of.tied for of in ranks_of(stages, facts)] == [found.model.get_parameter("head.weight").numel()] * 2


def test_more_micro_batches_are_kept_on_the_first_stage() -> None:
    def kept(batches: int) -> Any:
        estimate = plan(*TWO, f"data.global_batch_size={8 * batches}", "data.vocab_size=300").estimate
        assert estimate is not None
        return estimate.memory_bytes_per_rank.activations

    assert kept(1) < kept(2) == kept(8)


def test_each_stage_keeps_the_rows_of_its_own_micro_batches() -> None:
    """Rank 0 keeps four of the first stage, which is dense, and one of the last, an MoE layer; rank 1 three and two."""
    chosen = compose_config(["recipe=deepseek_ep", *TWO, "pipeline.schedule=dualpipev", "experts.layers='3:'"])
    model = source_model(chosen)
    example = example_inputs(model, chosen.data.seq_len)
    _, facts = planning_facts(model, chosen, example)
    made = moecompile.make_plan(model, chosen, example=example)
    assert made.pipeline is not None and made.pipeline.layout == "Et*2|t*2|t|tL"  # the first three are dense
    for of, expected in zip(ranks_of(made, facts), (1, 3 + 2), strict=True):
        run = RunFacts(tokens_per_rank=512, accumulation=8)
        both = [replace(of.run(run, made.pipeline), checkpointing=each) for each in ("keep_exchanges", "full")]
        kept, sent = (activations(of.layers, of.mesh, of.facts, each).kept for each in both)
        assert kept - sent == pytest.approx(expected * exchanged(of.layers[0], of.mesh) * 512 * 4)


def test_ranks_are_alike_if_their_stages_are() -> None:
    """Ranks 1 and 2 have a dense layer and an MoE layer each, of which one keeps few and the other many."""
    chosen = compose_config([
        "recipe=deepseek_ep", "mesh=cpu_1x4", "mesh.pp=4", "pipeline.schedule=dualpipev",
        "model.config.num_hidden_layers=8", "experts.layers='2::4'",
    ])  # fmt: skip
    model = source_model(chosen)
    example = example_inputs(model, chosen.data.seq_len)
    _, facts = planning_facts(model, chosen, example)
    made = moecompile.make_plan(model, chosen, example=example)
    assert [[of.index for of in ranks] for ranks in alike(ranks_of(made, facts))] == [[0], [1], [2], [3]]


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["mesh=cpu_1x4", "pipeline.stages_per_rank=2"], "pipeline.stages_per_rank=2: there is no pipeline"),
        (["mesh=cpu_1x4", "pipeline.layout='EtL'"], "pipeline.layout=EtL: there is no pipeline"),
        (["mesh=cpu_1x4", "pipeline.schedule=interleaved"], "pipeline.schedule=interleaved: there is no pipeline"),
        (
            [*TWO, "pipeline.overlap=exchanges"],
            "pipeline.overlap=exchanges: pipeline.schedule=1f1b has no forward beside",
        ),
        ([*TWO, *PAIRS, "mesh.ep=1"], "pipeline.overlap=exchanges: mesh.ep=1: there are no exchanges"),
        (
            [*TWO, *PAIRS, "trainer.compile=regions"],
            "pipeline.overlap=exchanges: a compiled region hands over in the middle of its code (trainer.compile=regions)",
        ),
        (
            [*TWO, "pipeline.schedule=1f1b", "pipeline.stages_per_rank=2"],
            "pipeline.stages_per_rank=2: pipeline.schedule=1f1b has 1",
        ),
        (["mesh=cpu_1x4", "mesh.pp=4", "pipeline.schedule=dualpipev"], "mesh.pp=4: 8 stages need as many layers"),
        (
            [*TWO, "pipeline.stages_per_rank=4"],
            "pipeline.stages_per_rank=4: 8 stages need as many layers, and the model has 6. Use at most 3",
        ),
        (
            ["mesh=h100_8", "mesh.pp=8", "mesh.ep=1"],
            "mesh.pp=8: 8 stages need as many layers, and the model has 6. Use mesh.pp=4",
        ),
        ([*TWO, "routing.replay=record"], "routing.replay=record: a rank has the routers of its stages alone"),
    ],
)
def test_what_stages_do_not_go_with(overrides: list[str], rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(*overrides)
    assert rule in str(caught.value)


def test_a_pipeline_that_does_not_fit_has_changes_that_were_planned() -> None:
    tight = [*TWO, "hardware.memory_gib=0.05", "trainer.checkpointing=none"]
    estimate = plan(*tight).estimate
    assert estimate is not None and estimate.fits == "no" and estimate.remedies
    assert estimate.tried.startswith("tried mesh.ep, micro-batch, checkpointing, mesh.pp and stages of a rank (")
    for remedy in estimate.remedies:
        made = plan(*tight, *remedy.change.split()).estimate
        assert made is not None and made.fits == remedy.fits != "no"
        assert made.memory_bytes_per_rank.total == remedy.total


def searched(*overrides: str, recipe: str = "deepseek_ep") -> tuple[Axes, list[Candidate]]:
    """The axes, and all layouts that run, the fastest first."""
    chosen = compose_config([f"recipe={recipe}", "task=search", *overrides])
    model = source_model(chosen)
    sites, facts = planning_facts(model, chosen, example_inputs(model, chosen.data.seq_len))
    base, _ = draft_plan(sites, chosen, facts)
    axes = axes_of(chosen, base.layers, base.mesh.ep, facts)
    found = Search(
        sites=sites, facts=facts, config=chosen, layers=base.layers, shape=lambda plan: shape_of_model(model, plan),
        axes=axes, rounds=False,
    )  # fmt: skip
    return axes, sorted(runnable(found, Rejected()), key=lambda each: each.seconds)


def test_a_search_counts_stages_as_their_plan_does() -> None:
    """Seconds and both memories of layouts with one and several stages of a rank, some of them without MoE layers."""
    base = ["mesh=cpu_2x2", "experts.layers='3:'", "data.global_batch_size=24", "optimizer=muon"]
    axes, found = searched(*base, "search.axes=[ep,pp,stages,micro_batch,checkpointing]")
    assert set(axes.sharing["pp"]) == {1, 2, 4}
    assert axes.stages == [*(("auto", n, "none") for n in (1, 2, 4, 8)), ("dualpipev", 1, "exchanges")]
    of: dict[tuple[object, ...], Candidate] = {}
    for each in found:
        keys = ("mesh.pp", "pipeline.stages_per_rank", "trainer.checkpointing", "data.micro_batch_size",
                "pipeline.schedule")  # fmt: skip
        of.setdefault(tuple(each.settings.get(key) for key in keys), each)
    stages = {key: each for key, each in of.items() if key[0] != 1}
    assert {(*key[:2], key[4]) for key in stages} == {
        (2, None, None),
        (2, 2, None),
        (4, None, None),
        (2, None, "dualpipev"),
    }  # six layers
    there_and_back = [each for key, each in stages.items() if key[4]]
    assert len(there_and_back) == 9  # micro-batches of 1, 2 and 4
    at_once = {each.settings["mesh.ep"]: each.settings.get("pipeline.overlap") for each in there_and_back}
    assert at_once.items() <= {1: None, 2: "exchanges"}.items()
    assert {key[2] for key in stages} == {"none", "full", "keep_exchanges"}  # all fit with none, which is faster
    for each in (*list(stages.values())[::5], *there_and_back[::2]):
        made = plan(*base, *each.overrides.split())
        assert made.estimate is not None and made.pipeline is not None
        assert made.estimate.memory_bytes_per_rank.total == each.memory_bytes, each.overrides
        assert made.estimate.memory_bytes_uneven == each.memory_bytes_uneven
        again = compose_config(["recipe=deepseek_ep", *base, *each.overrides.split()])
        assert forecast_plan(shape_of_model(source_model(again), made), made, again).seconds == each.seconds


@pytest.mark.parametrize("schedule", [[], ["pipeline.schedule=dualpipev"]])
def test_so_it_does_where_stages_choose_what_they_compute_again(schedule: list[str]) -> None:
    """The fastest of those that fit, and all that are asked for by name."""
    base = [*TWO, *schedule, "experts.layers='3:'", "hardware.memory_gib=0.055"]
    _, found = searched(*base, "search.axes=[ep,micro_batch,checkpointing]")
    fitting = [each for each in found if each.fits == "yes"]
    assert (fitting[0].settings["trainer.checkpointing"] == "budget") is bool(schedule)  # else one fits with all kept
    _, named = searched(*base, "trainer.checkpointing=budget", "search.axes=[ep,micro_batch]")
    assert len(named) >= 4
    for each in (fitting[0], *named):
        given = [] if each is fitting[0] else ["trainer.checkpointing=budget"]
        made = plan(*base, *given, *each.overrides.split())
        assert made.estimate is not None and made.estimate.memory_bytes_per_rank.total == each.memory_bytes
        assert made.estimate.memory_bytes_uneven == each.memory_bytes_uneven
        again = compose_config(["recipe=deepseek_ep", *base, *given, *each.overrides.split()])
        assert forecast_plan(shape_of_model(source_model(again), made), made, again).seconds == each.seconds
    assert bool(plan(*base, *fitting[0].overrides.split()).recomputed) is bool(schedule)


@pytest.mark.parametrize(
    ("overrides", "recipe", "reason"),
    [
        (["routing.replay=record"], "deepseek_ep", "routing.replay=record a rank has the routers of its stages alone"),
        (["trainer.baseline=dense"], "switch_ep", "trainer.baseline=dense trains a model that is not cut"),
    ],
)
def test_a_search_says_why_it_keeps_one_stage(overrides: list[str], recipe: str, reason: str) -> None:
    axes, found = searched("mesh=cpu_1x4", *overrides, "search.axes=[pp]", recipe=recipe)
    assert axes.kept["pp"].startswith(reason)
    assert not any("mesh.pp" in each.settings for each in found)


def test_stages_are_searched_with_tp_where_it_is_given_and_with_cp() -> None:
    def sizes(*overrides: str) -> set[tuple[int, int]]:
        batch = "data.global_batch_size=64"
        axes, found = searched("mesh=h100_8", batch, *overrides, "search.axes=[tp,pp,ep]", recipe="mixtral_ep")
        assert "pp" not in axes.kept and not any(each.seconds <= 0 for each in found)
        tp = axes.sharing["tp"]
        return {(int(e.settings.get("mesh.tp", tp[0])), int(e.settings.get("mesh.pp", 1))) for e in found}

    assert sizes() == {(1, 1), (2, 1), (4, 1), (1, 2), (1, 4)}
    assert sizes("mesh.tp=2") == {(2, 1), (2, 2), (2, 4)}
    assert sizes("mesh.cp=2") == {(1, 1), (2, 1), (1, 2), (1, 4)}  # ranks of cp and tp are at most those of a stage


def test_the_size_of_a_given_pipeline_is_kept() -> None:
    axes, found = searched(*TWO, "search.axes=[ep,stages]")
    assert axes.kept["pp"] == "search.axes does not name it"
    assert {each.settings["mesh.ep"] for each in found} == {1, 2}
    assert {each.settings.get("pipeline.stages_per_rank", 1) for each in found} == {1, 2}
    assert {each.settings.get("pipeline.schedule") for each in found} == {None, "dualpipev"}
    axes, found = searched(
        *TWO, "search.axes=[ep,stages]", "pipeline.schedule=interleaved", "pipeline.stages_per_rank=2"
    )
    assert axes.stages == [("interleaved", 2, "none")] and len(found) == 2  # the number was given
    made = plan(*TWO, "mesh.ep=search")
    assert made.mesh.pp == 2 and made.estimate is not None


def test_both_ends_of_a_model_that_goes_there_and_back_are_on_one_rank() -> None:
    base = [*TWO, "pipeline.schedule=dualpipev", "model.config.num_hidden_layers=4", "trainer.checkpointing=none"]
    made = plan(*base, "pipeline.layout='Et|t|t|tL'")
    assert made.pipeline is not None and made.estimate is not None
    assert made.pipeline.schedule == "dualpipev" and made.pipeline.layout == "Et|t|t|tL"
    assert [made.is_counted(rank) for rank in range(4)] == [True, True, False, False]
    assert [plan(*TWO).is_counted(rank) for rank in range(4)] == [False, False, True, True]
    hidden, tokens = 128, 4 * 128  # two cuts of three are between ranks
    assert made.estimate.stage_bytes_per_step == 2 * hidden * tokens * 4 * made.estimate.assumes.accumulation  # type: ignore[union-attr]


@pytest.mark.parametrize(("schedule", "times"), [("dualpipev", 1), ("interleaved", 2)])
def test_a_weight_of_both_ends_is_stored_once_on_one_rank(schedule: str, times: int) -> None:
    chosen = compose_config([
        "model=llama_nano", *TWO, f"pipeline.schedule={schedule}", "pipeline.stages_per_rank=2",
        "model.config.num_hidden_layers=4",
    ])  # fmt: skip
    model = source_model(chosen)
    sites, facts = planning_facts(model, chosen, example_inputs(model, chosen.data.seq_len))
    made, facts = draft_plan(sites, chosen, facts)
    of = ranks_of(made, facts)
    tied = facts.vocab_size * facts.d_model
    assert made.pipeline is not None and made.pipeline.tied and tied > 0
    stored = sum(model_params(each.layers, each.facts).total for each in of)
    assert stored == model_params(made.layers, facts).total + (times - 1) * tied
    assert [each.tied for each in of] == [(times - 1) * tied] * 2
    assert [each.tied_here for each in of] == [(2 - times) * tied, 0]


@pytest.mark.parametrize("stages", ["1", "2"])
def test_each_rank_counts_the_adapters_of_its_own_stages(stages: str) -> None:
    chosen = compose_config([
        "model=mixtral_8x7b", *TWO, f"pipeline.stages_per_rank={stages}", "adapters=lora", "adapters.rank=2",
        "model.config.num_hidden_layers=4", "model.config.hidden_size=64", "model.config.intermediate_size=64",
        "model.config.num_attention_heads=4", "model.config.num_key_value_heads=4", "model.config.vocab_size=64",
        "data.seq_len=16", "adapters.dense='*.layers.[0-2].*.q_proj'", "adapters.train_router=true",
    ])  # fmt: skip
    model = source_model(chosen)
    sites, facts = planning_facts(model, chosen, example_inputs(model, chosen.data.seq_len))
    made, facts = draft_plan(sites, chosen, facts)
    of = ranks_of(made, facts)
    linear, router = 2 * (64 + 64), 8 * 64
    assert [each.facts.adapters for each in of] == [(2 * linear, True), (linear, True)]
    trained = [trained_params(each.layers, each.facts) for each in of]
    assert [each.dense for each in trained] == [2 * linear + 2 * router, linear + 2 * router]
    whole = trained_params(made.layers, facts)
    assert sum(each.experts for each in trained) == whole.experts > 0
    assert sum(each.dense for each in trained) == whole.dense


def test_a_model_that_cannot_be_cut_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"mesh.pp=2: the model cannot be cut before .*shared.weight is also encoder"):
        plan(*TWO, recipe="switch_ep")


def test_plans_are_compared_by_the_layouts_of_their_stages() -> None:
    one, two = (Compared(plan=plan(*words), forecast=None, config={}) for words in (["mesh=cpu_1x2"], TWO))  # type: ignore[arg-type]
    found = differences(two, one)
    assert two.plan.pipeline is not None
    assert found["pipeline.stages"] == (two.plan.pipeline.layout, None)
    assert max(len(str(value)) for pair in found.values() for value in pair) < 60
