"""The order in which ranks of a pipeline compute: complete, without a circle, with as much in flight as it is known for."""

from __future__ import annotations

from itertools import product

import pytest

from moecompile import stages
from moecompile.errors import PlanError
from moecompile.stages import Action, Crossing, Pipeline, Stage, Unit, simulated, stage_of


def pipeline(ranks: int, per_rank: int = 1, schedule: str | None = None) -> Pipeline:
    """Of one layer a stage."""
    made = tuple(
        Stage(
            units=(Unit(path=f"layers.{i}", is_layer=True, form="tensor"),),
            receives=(Crossing(unit=f"layers.{i - 1}", places=(0,), numbers=8.0),) if i else (),
        )
        for i in range(ranks * per_rank)
    )
    return Pipeline(schedule=schedule or ("1f1b" if per_rank == 1 else "interleaved"), ranks=ranks, stages=made)


@pytest.mark.parametrize(("ranks", "per_rank", "number"), list(product((2, 3, 4, 8), (1, 2, 3), (1, 2, 3, 4, 7, 16))))
def test_every_order_runs_to_its_end(ranks: int, per_rank: int, number: int) -> None:
    run = simulated(pipeline(ranks, per_rank), number)
    assert len(run) == len(set(run)) == 2 * ranks * per_rank * number
    assert all(index == action.stage % ranks for index, action in run)
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


def test_two_micro_batches_of_1f1b_in_full() -> None:
    two = pipeline(2)
    assert two.order(0, 2) == [Action(True, 0, 0), Action(True, 0, 1), Action(False, 0, 0), Action(False, 0, 1)]
    assert two.order(1, 2) == [Action(True, 1, 0), Action(False, 1, 0), Action(True, 1, 1), Action(False, 1, 1)]


def test_ranks_that_would_wait_for_each_other_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards_first(index: int, ranks: int, per_rank: int, number: int) -> list[Action]:
        order = stages._one_forward_one_backward(index, ranks, per_rank, number)
        return sorted(order, key=lambda action: action.is_forward)

    monkeypatch.setitem(stages.SCHEDULES, "1f1b", backwards_first)
    with pytest.raises(PlanError, match="would wait for each other after 0 of 8 steps"):
        simulated(pipeline(2), 2)


def test_an_order_that_leaves_something_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stages.SCHEDULES["1f1b"]
    monkeypatch.setitem(stages.SCHEDULES, "1f1b", lambda *of: whole(*of)[:-1])
    with pytest.raises(PlanError, match="has 6 forwards and backwards, 8 are needed"):
        simulated(pipeline(2), 2)


def test_a_path_belongs_to_the_stage_of_its_unit() -> None:
    many = pipeline(2, 6)
    assert stage_of(many, "layers.1.mlp.weight") == 1 and stage_of(many, "layers.11") == 11
    assert stage_of(many, "norm.weight") is None
    assert many.stages_of(1) == (1, 3, 5, 7, 9, 11) and many.layout == "Et|" + "t|" * 10 + "tL"


@pytest.mark.parametrize(
    ("ranks", "per_rank", "schedule", "rule"),
    [(2, 1, "gpipe", "must be 1f1b or interleaved"), (2, 2, "1f1b", "has 4 stages"), (2, 1, "interleaved", "has 2")],
)
def test_stages_that_do_not_fit_their_ranks(ranks: int, per_rank: int, schedule: str, rule: str) -> None:
    with pytest.raises(PlanError, match=rule):
        pipeline(ranks, per_rank, schedule)
