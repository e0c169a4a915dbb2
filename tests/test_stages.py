"""The order in which ranks of a pipeline compute: complete, without a circle, with as much in flight as it is known for."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining.schedules import ScheduleDualPipeV

from moecompile import stages
from moecompile.errors import ConfigError, PlanError
from moecompile.stages import AUTO, Action, Crossing, Pipeline, Stage, Unit, schedule_of, simulated, stage_of


def pipeline(ranks: int, per_rank: int = 1, schedule: str | None = None) -> Pipeline:
    """Of one layer a stage."""
    made = tuple(
        Stage(
            units=(Unit(path=f"layers.{i}", is_layer=True, form="tensor"),),
            receives=(Crossing(unit=f"layers.{i - 1}", places=(0,), numbers=8.0),) if i else (),
        )
        for i in range(ranks * per_rank)
    )
    return Pipeline(schedule=schedule_of(schedule or AUTO, per_rank)[0], ranks=ranks, stages=made)


@pytest.mark.parametrize(
    ("ranks", "per_rank", "number", "schedule"),
    [
        *product((2, 3, 4, 8), (1, 2, 3), (1, 2, 3, 4, 7, 16), (AUTO,)),
        *product((2, 3, 4, 8), (2,), (1, 2, 3, 4, 7, 16, 19), ("dualpipev",)),
    ],
)
def test_every_order_runs_to_its_end(ranks: int, per_rank: int, number: int, schedule: str) -> None:
    of = pipeline(ranks, per_rank, schedule)
    run = simulated(of, number)
    assert len(run) == len(set(run)) == 2 * ranks * per_rank * number
    places = [*range(ranks), *reversed(range(ranks))] if schedule == "dualpipev" else [*range(ranks)] * per_rank
    assert all(index == places[action.stage] for index, action in run)
    assert [of.stages_of(i) for i in range(ranks)] == [
        tuple(stage for stage, place in enumerate(places) if place == i) for i in range(ranks)
    ]
    for stage in range(ranks * per_rank):  # each stage takes micro-batches in the order of one process
        forwards = [action.micro_batch for _, action in run if action.is_forward and action.stage == stage]
        backwards = [action.micro_batch for _, action in run if not action.is_forward and action.stage == stage]
        assert forwards == backwards == list(range(number))


def test_1f1b_keeps_as_many_micro_batches_as_there_are_stages_behind() -> None:
    four = pipeline(4)
    assert [four.in_flight(index, 16) for index in range(4)] == [(4,), (3,), (2,), (1,)]
    assert [four.in_flight(index, 2) for index in range(4)] == [(2,), (2,), (2,), (1,)]  # there are no more


def test_interleaved_keeps_what_its_order_says() -> None:
    # Megatron-LM (arXiv 2104.04473): p (1 + (p - 1) / (p v)) of a rank's layers: 4 + 3 / 2 micro-batches of two stages
    assert sum(pipeline(4, 2).in_flight(0, 16)) == 2 * 4 + 3


def test_dualpipev_is_in_the_order_of_torch_s() -> None:
    """Whose weight gradients are split off: the rest is the same, and so are the pairs."""
    for ranks in (2, 3, 4, 8):
        for number, index in product((2 * ranks, 2 * ranks + 1, 5 * ranks), range(ranks)):
            of = SimpleNamespace(pp_group_size=ranks, _n_microbatches=number)
            theirs = [
                tuple(
                    Action(each.computation_type.name == "FORWARD", each.stage_index, each.microbatch_index)
                    for each in action.sub_actions or (action,)
                    if each.computation_type.name != "BACKWARD_WEIGHT"
                )
                for action in ScheduleDualPipeV._calculate_single_rank_operations(of, index)
            ]
            assert pipeline(ranks, 2, "dualpipev").groups(index, number) == [group for group in theirs if group]


def test_ranks_of_dualpipev_keep_equally_much() -> None:
    four = pipeline(4, 2, "dualpipev")
    assert [four.in_flight(index, 16) for index in range(4)] == [(8, 1), (7, 2), (6, 3), (5, 4)]
    assert [four.in_flight(index, 3) for index in range(4)] == [(3, 1), (3, 2), (3, 3), (3, 3)]


@pytest.mark.parametrize(("per_rank", "schedule"), [(1, AUTO), (2, AUTO), (3, AUTO), (8, AUTO), (2, "dualpipev")])
def test_what_is_kept_of_many_micro_batches_is_that_of_fewer(per_rank: int, schedule: str) -> None:
    for ranks in (2, 3, 5):
        of = pipeline(ranks, per_rank, schedule)
        for index, number in product(range(ranks), (*range(1, 7 * ranks + 1), 20 * ranks + 1)):
            kept = dict.fromkeys(of.stages_of(index), 0)
            counts = []
            for action in of.order(index, number):
                kept[action.stage] += 1 if action.is_forward else -1
                counts.append(tuple(kept.values()))
            assert of.in_flight(index, number) == max(counts, key=sum), (ranks, index, number)


@pytest.mark.parametrize(("per_rank", "schedule"), [(2, AUTO), (3, AUTO), (2, "dualpipev")])
def test_of_unequal_stages_the_moment_with_the_most_layers_counts(per_rank: int, schedule: str) -> None:
    for ranks in (2, 3):
        of = pipeline(ranks, per_rank, schedule)
        sizes = [1 + 7 * i % 5 for i in range(len(of.stages))]
        units = [tuple(Unit(path=f"{i}.{j}", is_layer=True, form="") for j in range(n)) for i, n in enumerate(sizes)]
        of = replace(of, stages=tuple(Stage(units=each) for each in units))
        for index, number in product(range(ranks), (1, 2, 5, 4 * ranks, 20 * ranks + 1)):
            kept, most = dict.fromkeys(of.stages_of(index), 0), 0
            for action in of.order(index, number):
                kept[action.stage] += 1 if action.is_forward else -1
                most = max(most, sum(times * sizes[stage] for stage, times in kept.items()))
            found = zip(of.stages_of(index), of.in_flight(index, number), strict=True)
            assert sum(times * sizes[stage] for stage, times in found) == most, (ranks, index, number)


@pytest.mark.parametrize(("ranks", "per_rank"), [(2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (4, 3)])
def test_how_long_ranks_wait(ranks: int, per_rank: int) -> None:
    """What is in closed form, beside the order that is run."""
    of = pipeline(ranks, per_rank)
    for number, backward in product((2 * ranks, 5 * ranks), (1.0, 2.0, 3.0)):
        wanted = stages.waits_of(of.schedule, ranks, per_rank, number, backward)
        assert of.waits(number, backward) == pytest.approx(wanted) and wanted > 0


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_dualpipev_waits_as_its_order_says(ranks: int) -> None:
    """By hand, of 2 P micro-batches and more: 2 (P - 1) backwards, less what the last rank begins alone."""
    of = pipeline(ranks, 2, "dualpipev")
    for number, backward in product((2 * ranks, 2 * ranks + 1, 5 * ranks), (1.0, 2.0, 3.0)):
        wanted = (2 * (ranks - 1) * backward - min(1.0, backward - 1)) / (2 * (1 + backward))
        assert of.waits(number, backward) == pytest.approx(wanted)
        assert stages.waits_of("dualpipev", ranks, 2, number, backward) == pytest.approx(wanted)
    assert of.waits(1, 2.0) == pytest.approx(ranks - 1)  # one micro-batch goes there and back


def test_of_a_pair_neither_needs_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """On its rank, and over others: with each pair the other way round the order runs to its end too."""
    whole = stages.SCHEDULES["dualpipev"]
    turned = replace(whole, order=lambda *of: [group[::-1] for group in whole.order(*of)])
    for ranks, number in product((2, 4, 8), (1, 3, 5, 16, 19)):
        of = pipeline(ranks, 2, "dualpipev")
        pairs = [group for index in range(ranks) for group in of.groups(index, number) if len(group) > 1]
        assert (number < 2 * ranks) or len(pairs) > number
        for forward, backward in pairs:
            assert forward.is_forward and not backward.is_forward and forward.stage != backward.stage
        with monkeypatch.context() as patch:
            patch.setitem(stages.SCHEDULES, "dualpipev", turned)
            assert len(simulated(of, number)) == 4 * ranks * number


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("number", [1, 2, 3, 7, 16, 19])
def test_pairs_run_to_their_end_if_both_receive_before_either_computes(ranks: int, number: int) -> None:
    at_once = replace(pipeline(ranks, 2, "dualpipev"), overlap="exchanges")
    assert len(set(simulated(at_once, number))) == 4 * ranks * number
    pairs = [group for index in range(ranks) for group in at_once.groups(index, number) if len(group) == 2]
    assert all((ahead.is_forward, back.is_forward) == (True, False) for ahead, back in pairs)
    assert at_once.paired(number) == 2 * len(pairs) / (4 * ranks * number)
    assert replace(at_once, overlap="none").paired(number) == 0
    assert pairs or number < 2 * ranks + (ranks == 1)


def test_a_schedule_without_pairs_has_none_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        replace(pipeline(2), overlap="exchanges")
    assert str(caught.value) == "pipeline.overlap=exchanges: is not possible with the schedule 1f1b. Use none."


def test_two_micro_batches_of_1f1b_in_full() -> None:
    two = pipeline(2)
    assert two.order(0, 2) == [Action(True, 0, 0), Action(True, 0, 1), Action(False, 0, 0), Action(False, 0, 1)]
    assert two.order(1, 2) == [Action(True, 1, 0), Action(False, 1, 0), Action(True, 1, 1), Action(False, 1, 1)]


def test_ranks_that_would_wait_for_each_other_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards_first(index: int, ranks: int, per_rank: int, number: int) -> stages.Groups:
        order = stages._one_forward_one_backward(index, ranks, per_rank, number)
        return sorted(order, key=lambda group: group[0].is_forward)

    of = stages.SCHEDULES["1f1b"]
    monkeypatch.setitem(stages.SCHEDULES, "1f1b", replace(of, order=backwards_first))
    with pytest.raises(PlanError, match="would wait for each other after 0 of 8 steps"):
        simulated(pipeline(2), 2)


def test_an_order_that_leaves_something_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stages.SCHEDULES["1f1b"]
    monkeypatch.setitem(stages.SCHEDULES, "1f1b", replace(whole, order=lambda *of: whole.order(*of)[:-1]))
    with pytest.raises(PlanError, match="has 6 forwards and backwards, 8 are needed"):
        simulated(pipeline(2), 2)


def test_a_path_belongs_to_the_stage_of_its_unit() -> None:
    many = pipeline(2, 6)
    assert stage_of(many, "layers.1.mlp.weight") == 1 and stage_of(many, "layers.11") == 11
    assert stage_of(many, "norm.weight") is None
    assert many.stages_of(1) == (1, 3, 5, 7, 9, 11) and many.layout == "Et|" + "t|" * 10 + "tL"


@pytest.mark.parametrize(
    ("ranks", "per_rank", "schedule", "rule"),
    [
        (2, 1, "gpipe", "must be 1f1b or interleaved or dualpipev"), (2, 2, "1f1b", "has 4 stages"),
        (2, 1, "interleaved", "has 2"), (2, 3, "dualpipev", "has 6 stages"),
    ],
)  # fmt: skip
def test_stages_that_do_not_fit_their_ranks(ranks: int, per_rank: int, schedule: str, rule: str) -> None:
    with pytest.raises(PlanError, match=rule):
        Pipeline(schedule=schedule, ranks=ranks, stages=pipeline(ranks, per_rank).stages)


@pytest.mark.parametrize(
    ("word", "per_rank", "found"),
    [
        (AUTO, 1, ("1f1b", 1)), (AUTO, 2, ("interleaved", 2)), ("1f1b", 1, ("1f1b", 1)),
        ("interleaved", 4, ("interleaved", 4)), ("dualpipev", 1, ("dualpipev", 2)), ("dualpipev", 2, ("dualpipev", 2)),
    ],
)  # fmt: skip
def test_the_schedule_of_a_config(word: str, per_rank: int, found: tuple[str, int]) -> None:
    assert schedule_of(word, per_rank) == found


@pytest.mark.parametrize(
    ("word", "per_rank", "rule"),
    [("1f1b", 2, "has 1. Use"), ("interleaved", 1, "has 2 or more. Use"), ("dualpipev", 3, "has 2. Use")],
)
def test_a_schedule_that_contradicts_the_stages_of_a_rank(word: str, per_rank: int, rule: str) -> None:
    with pytest.raises(ConfigError, match=f"pipeline.stages_per_rank={per_rank}: pipeline.schedule={word} {rule}"):
        schedule_of(word, per_rank)
