"""Entries are found again however weights are cut, and differences between ranks are explained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moecompile.errors import ArgumentError
from moecompile.verify import certify
from moecompile.verify.diagnosis import Axes, difference
from moecompile.verify.entries import NOWHERE, PADDING, Entries, make_distinct
from tests.verify.by_hand import ExpertParallel, Model, tokens

AXES = Axes({"dp": 2, "ep": 3})
NAN = float("nan")


def model() -> nn.Module:
    """Weights that repeat themselves."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(6, 8))
    nn.init.zeros_(layer[1].bias)
    layer[2].weight.data.copy_(layer[1].weight.data)
    return layer.double()


def test_no_two_entries_are_equal_and_none_is_zero_in_float32() -> None:
    made = model()
    make_distinct(made, seed=0)
    values = torch.cat([weight.detach().flatten() for weight in made.parameters()])
    assert torch.equal(values, values.float().double())
    assert len(values.unique()) == len(values) and bool((values != 0).all())
    again = model()
    make_distinct(again, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))


def test_entries_that_collide_are_moved_apart() -> None:
    crowded = nn.ParameterList([nn.Parameter(torch.full((400, 500), 3e-38))]).double()
    make_distinct(crowded, seed=0)  # 200,000 numbers of float32 around 0.02, among which many would be equal
    values = crowded[0].detach().flatten()
    assert len(values.unique()) == len(values)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w[2:5],
        lambda w: w.T.contiguous(),
        lambda w: torch.cat([w[::2], w[1::2]]),
        lambda w: w.flatten()[7:31],
        lambda w: torch.nn.functional.pad(w, (0, 3)),
        lambda w: w.float(),
    ],
)
def test_an_entry_is_found_wherever_it_was_moved(change: object) -> None:
    made = model()
    make_distinct(made, seed=0)
    entries = Entries(made)
    weight = made[2].weight.detach()
    moved: Tensor = change(weight)  # type: ignore[operator]
    numbers = entries.locate(moved)
    assert NOWHERE not in numbers and ((numbers == PADDING) == (moved.flatten() == 0)).all()
    ((name, here, there),) = entries.parts(numbers)
    assert name == "2.weight" and torch.equal(moved.flatten()[here].double(), weight.flatten()[there])


def test_what_is_not_the_models_is_nowhere() -> None:
    made = model()
    make_distinct(made, seed=0)
    assert (Entries(made).locate(torch.randn(5)) == NOWHERE).all()


def _copies(value: Tensor) -> Tensor:
    return value.repeat(AXES.num_ranks, 1)


def _cut(value: Tensor) -> Tensor:
    """Over ep: two entries of six on each rank."""
    held = torch.full((AXES.num_ranks, 6), NAN).double()
    for rank in range(AXES.num_ranks):
        first = 2 * AXES.place(rank)["ep"]
        held[rank, first : first + 2] = value[first : first + 2]
    return held


@pytest.mark.parametrize("hold", [_copies, _cut])
@pytest.mark.parametrize(
    ("factor", "axes", "text"),
    [
        (3.0, ("ep",), "3 x on `ep`: summed twice, or not averaged"),
        (0.5, ("dp",), "0.5 x on `dp`: averaged twice, or not summed"),
        (6.0, ("dp", "ep"), "6 x on `dp` and `ep`: summed twice, or not averaged"),
        (1.7, (), "1.7 x on every rank"),
        (0.0, (), "zero on every rank"),
    ],
)
def test_a_factor_is_named_by_the_axes_of_its_size(
    hold: object, factor: float, axes: tuple[str, ...], text: str
) -> None:
    value = torch.randn(6).double()
    found = difference(hold(factor * value), value, AXES, 1e-10)  # type: ignore[operator]
    assert (found.axes, found.text) == (axes, text)


def test_parts_that_were_not_summed_are_named_by_their_axis() -> None:
    parts = torch.randn(3, 6).double()
    held = parts.repeat(2, 1)  # by the place on ep
    assert difference(held, parts.sum(0), AXES, 1e-10).text == "each rank has its own on `ep`: not summed"
    assert difference(held, parts.mean(0), AXES, 1e-10).text == "each rank has its own on `ep`: not averaged"


def test_ranks_are_named_where_no_factor_explains() -> None:
    value = torch.randn(6).double()
    held = _copies(value)
    held[4, 2] += 1
    assert difference(held, value, AXES, 1e-10).text == "no multiple of that of one process, on rank 4"
    held[4, 2] = float("inf")
    assert difference(held, value, AXES, 1e-10).text == "not finite on rank 4"
    assert difference(_copies(value), value, AXES, 1e-10).text == ""


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"mesh": {}}, "mesh"),
        ({"mesh": {"ep": 0}}, "mesh"),
        ({"reduction": "average"}, "reduction"),
        ({"same_batch": ["tp"]}, "same_batch"),
        ({"dtype": torch.bfloat16}, "dtype"),
        ({"accumulation": 0}, "accumulation"),
        ({"batch": lambda number: {}}, "build, parallelize, batch, loss"),
    ],
)
def test_arguments_that_break_a_rule_are_told(options: dict[str, object], path: str) -> None:
    arguments = {"build": Model, "parallelize": ExpertParallel, "batch": tokens, "mesh": {"ep": 2}, **options}
    with pytest.raises(ArgumentError) as error:
        certify(**arguments)
    assert error.value.path == path
