"""What a run counts, from figures written by hand."""

from __future__ import annotations

import pytest
import torch

from moecompile.runtime.metrics import LayerMeans, LossSums, RunTotals, over_layers
from tests.runtime.test_metrics import layer


def test_a_step_over_layers() -> None:
    """MaxVio 0.5 and 0, drops 4 of 16 and none; only the second layer knows its entropy."""
    step = over_layers([layer("a", [6, 2, 4, 4], dropped=4, entropy=None), layer("b", [4, 4, 4, 4], entropy=0.25)])
    assert step == {
        "max_violation": 0.25, "max_violation_bound": 1.0, "max_violation_share": 0.5, "least_mean_load": 4.0,
        "entropy": 0.25, "nodes_per_token": 1.5, "drop_rate": 0.125,
    }  # fmt: skip
    assert "entropy" not in over_layers([layer("a", [1, 1], entropy=None)])


@pytest.mark.parametrize(("num_steps", "mean"), [(1, 0.0), (10, 9.0), (11, 9.5), (30, 28.0)])
def test_the_last_tenth_is_at_least_one_step(num_steps: int, mean: float) -> None:
    means = LayerMeans()
    assert means.mean_of_last("drop_rate") is None
    for step in range(num_steps):
        means.add({"drop_rate": float(step)})
    assert means.mean_of_last("drop_rate") == mean
    assert means.mean_of_last("entropy") is None


def test_an_expert_without_a_token_in_the_last_tenth_is_dead() -> None:
    """Of 20 steps the last two count: expert 2 of `a` had its last token in step 18, expert 3 never one; `b` has none."""
    tally, other = RunTotals(), RunTotals()
    for step in range(1, 21):
        if step == 12:  # a run that goes on knows what was before
            other.restore(tally.state(), is_first_rank=True)
            tally = other
        loads = [layer("a", [80, 80, 80 * (step <= 18), 0]), layer("b", [80, 80 * (step == 19), 80, 80])]
        add(tally.sums, 1.0, 1, 0.0)
        tally.end_step(loads, skipped=False)
    assert tally.dead_experts == {"a": [2, 3]}
    few = RunTotals()
    add(few.sums, 1.0, 1, 0.0)
    few.end_step([layer("a", [4, 4, 0, 4])], skipped=False)
    assert few.dead_experts == {}  # chance


def add(sums: LossSums, loss: float, num_tokens: int, aux: float) -> None:
    sums.add(torch.tensor(loss), torch.tensor(num_tokens), {"z": torch.tensor(aux)})


def test_a_row_over_two_steps_of_two_micro_batches() -> None:
    """Auxiliary losses are per token: 0.5 x 2 + 1 x 4, and nothing of a step that was dropped."""
    sums = LossSums()
    add(sums, 3.0, 2, 0.5)
    add(sums, 5.0, 4, 1.0)
    assert sums.over_ranks() is None  # no step is done
    sums.end_step(dropped=False)
    add(sums, float("nan"), 8, 9.0)
    sums.end_step(dropped=True)
    assert sums.over_ranks() == [8.0, 6.0, 5.0]
    assert sums.take() == (8.0, 6.0, {"z": 5.0})
    assert sums.over_ranks() is None


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        ("z", "sequence", {"z": 2.0, "sequence": 1.0}),
        ("z", "sequence z", {"z": 4.0, "sequence": 1.0}),
        ("sequence z", "z", {"z": 4.0, "sequence": 1.0}),
        ("z", "", {"z": 2.0}),
        ("", "z", {"z": 2.0}),
    ],
)
def test_a_run_may_go_on_with_other_losses_in_the_middle_of_a_row(
    before: str, after: str, wanted: dict[str, float]
) -> None:
    """A step of two micro-batches before and one after: each loss has its own sum, and the next row no old ones."""
    aux = {"z": torch.tensor(0.5), "sequence": torch.tensor(0.25)}

    def step(tally: RunTotals, kinds: str) -> None:
        for _ in range(2):
            tally.sums.add(torch.tensor(3.0), torch.tensor(2), {kind: aux[kind] for kind in kinds.split()})
        tally.end_step([], skipped=False)

    saved, again = RunTotals(), RunTotals()
    step(saved, before)
    again.restore(saved.state(), is_first_rank=True)
    step(again, after)
    assert again.sums.take() == (12.0, 8.0, wanted)
    step(again, after)
    assert again.sums.take()[2].keys() == set(after.split())


def test_sums_without_names_are_those_of_the_plan_or_left_out() -> None:
    for kinds, wanted in ((["z"], {"z": 5.0}), ([], {}), (["z", "sequence"], {})):
        sums = LossSums()
        sums.restore([8.0, 6.0, 5.0], kinds, is_first_rank=True)
        assert sums.take() == (8.0, 6.0, wanted)


def test_speed_is_that_of_the_rows_after_the_first() -> None:
    """Rows of 6, 10 and 20 tokens in 3, 1 and 2 s; then one whose steps were all dropped."""
    tally = RunTotals()
    assert tally.end_row(12.0, 6, 3.0) == {"tokens_per_second": 2.0, "loss": 2.0}
    assert tally.tokens_per_second is None
    tally.end_row(10.0, 10, 1.0)
    tally.end_row(10.0, 20, 2.0)
    add(tally.sums, 1.0, 1, 0.0)
    tally.end_step([], skipped=True)
    assert tally.end_row(0.0, 0, 4.0) == {"tokens_per_second": 0.0, "steps_skipped": 1.0}
    assert (tally.loss_first, tally.loss_last, tally.tokens_per_second) == (2.0, 0.5, 10.0)


def test_speed_of_a_run_that_goes_on_is_that_of_its_own_tokens() -> None:
    """40 tokens of an open row are from before: 4 and the warm-up are of this process. Then 10 in 1 s."""
    before, after = RunTotals(), RunTotals()
    before.end_row(12.0, 6, 3.0)
    before.end_row(20.0, 20, 1.0)
    add(before.sums, 20.0, 40, 0.0)
    before.end_step([], skipped=False)
    after.restore(before.state(), is_first_rank=True)
    assert after.tokens_per_second == 20.0  # there may be no more steps
    add(after.sums, 2.0, 4, 0.0)
    after.end_step([], skipped=False)
    loss, num_tokens, _ = after.sums.take()
    assert after.end_row(loss, num_tokens, 2.0) == {"tokens_per_second": 2.0, "loss": 0.5}
    assert after.tokens_per_second == 20.0
    assert after.end_row(10.0, 10, 1.0)["tokens_per_second"] == 10.0
    assert after.tokens_per_second == (20 + 10) / 2
    older = {name: value for name, value in before.state().items() if name != "timed"}
    after.restore(older, is_first_rank=True)
    assert after.tokens_per_second is None


def test_a_run_that_goes_on_has_the_same_rows_and_the_same_last_tenth() -> None:
    """12 steps are done, a row is open: one rank of the new run holds its sums, and 2 of the 12 steps are kept."""
    before, first, other = RunTotals(), RunTotals(), RunTotals()
    for step in range(12):
        add(before.sums, 2.0 * step, 2, 0.0)
        before.end_step([layer("a", [6 + step, 2, 4, 4])], skipped=False)
    before.end_row(4.0, 2, 1.0)
    state = before.state()
    first.restore(state, is_first_rank=True)
    other.restore(state, is_first_rank=False)
    assert first.state() == state
    assert other.sums.over_ranks() == [0.0, 0.0, 0.0]
    for tally in (before, first):
        for step in range(9):
            tally.sums.add(torch.tensor(1.0), torch.tensor(1), {"z": torch.tensor(0.0)})
            tally.end_step([layer("a", [9 + step, 2, 4, 4])], skipped=False)
    assert first.steps.mean_of_last("max_violation") == before.steps.mean_of_last("max_violation")
    assert first.steps.count == 21
