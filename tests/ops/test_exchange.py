"""Exchanges over a process group of one rank, and over an axis that nobody bound."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moecompile import ops  # noqa: F401  (registers the ops)
from moecompile.errors import UnboundAxisError
from moecompile.ops import traffic
from tests.tiny import fake_rank

op = torch.ops.moecompile


def table(*numbers: int) -> torch.Tensor:
    """table_2rn of one rank that sends itself `numbers`."""
    return torch.tensor([[numbers], [numbers]])


def test_counts_come_back_with_the_table(axis: str) -> None:
    received, both = op.exchange_counts(torch.tensor([3, 0, 2]), axis)
    assert received.tolist() == [[3, 0, 2]]
    assert both.tolist() == [[[3, 0, 2]], [[3, 0, 2]]]


@pytest.mark.parametrize(("column", "num_rows"), [(0, 1), (1, 4), (-1, 5)])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_column_or_the_sum_says_how_many_rows(axis: str, column: int, num_rows: int, reverse: bool) -> None:
    rows = torch.randn(num_rows, 3, requires_grad=True)
    out = op.all_to_all(rows, table(1, 4), column, reverse, axis)
    assert torch.equal(out, rows)
    out.backward(torch.ones_like(out) * 2)
    assert torch.equal(rows.grad, torch.full_like(rows, 2))


@pytest.mark.parametrize("num_rows", [0, 1])
def test_few_rows(axis: str, num_rows: int) -> None:
    rows = torch.randn(num_rows, 3, requires_grad=True)
    out = op.all_to_all(rows, table(num_rows), 0, False, axis)
    out.sum().backward()
    assert out.shape == rows.grad.shape == (num_rows, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_assignments", [0, 1, 7])
def test_assignments_survive_the_bytes(axis: str, num_assignments: int, dtype: torch.dtype) -> None:
    weights = torch.randn(num_assignments).to(dtype).requires_grad_()
    codes = torch.arange(num_assignments, dtype=torch.int16) * 301 - 5
    got_weights, got_codes = op.exchange_assignments(weights, codes, table(2, num_assignments), 1, axis)
    assert torch.equal(got_weights, weights)
    assert torch.equal(got_codes, codes)
    assert (got_weights.dtype, got_codes.dtype) == (dtype, torch.int16)
    got_weights.sum().backward()
    assert torch.equal(weights.grad, torch.ones_like(weights))


def test_forward_bytes_are_counted_once(axis: str) -> None:
    traffic.take()
    rows = torch.randn(4, 3, requires_grad=True)
    weights, codes = torch.randn(5, requires_grad=True), torch.zeros(5, dtype=torch.int16)
    op.exchange_counts(torch.tensor([4, 5]), axis)
    out = op.all_to_all(rows, table(4, 5), 0, False, axis)
    sent, _ = op.exchange_assignments(weights, codes, table(4, 5), 1, axis)
    (out.sum() + sent.sum()).backward()
    assert traffic.take() == {0: 2 * 8 + 4 * 3 * 4 + 5 * (4 + 2)}
    assert traffic.take() == {}


def test_gathered_bytes_are_counted_once(axis: str) -> None:
    traffic.take()
    rows, weights = torch.randn(4, 3, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    op.send_counts(torch.tensor([4, 5]), axis)
    gathered = op.all_gather(rows, axis)
    sent, ids = op.gather_assignments(weights, torch.arange(8, dtype=torch.int16).view(4, 2), axis)
    assert torch.equal(gathered, rows)
    assert torch.equal(sent, weights)
    assert ids.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    (op.reduce_scatter(gathered, axis).sum() + sent.sum()).backward()
    assert traffic.take() == {0: 2 * 8 + 2 * 4 * 3 * 4 + 8 * (4 + 2)}
    assert traffic.take() == {}


def test_blocks_are_summed_wide_and_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks bring 1 and three times 1/256: bf16 has 8 bits, so that adding them one by one would lose all three."""
    monkeypatch.setattr("moecompile.ops.exchange.group_of", lambda axis: SimpleNamespace(size=lambda: 4))
    monkeypatch.setattr("moecompile.ops.exchange._count_blocks", lambda *args: None)
    monkeypatch.setattr(
        "torch.distributed.all_to_all_single", lambda out, rows, group, async_op: (out.copy_(rows), None)[1]
    )
    blocks = torch.tensor([[1.0], [1 / 256], [1 / 256], [1 / 256]], dtype=torch.bfloat16)
    assert (((blocks[0] + blocks[1]) + blocks[2]) + blocks[3]).item() == 1
    assert op.reduce_scatter(blocks, "ep").item() == torch.tensor(1 + 3 / 256).bfloat16().item() > 1


class Wire:
    """Stands in for the collective: notes the splits and answers with rows of ones."""

    def __init__(self) -> None:
        self.splits: list[tuple[list[int], list[int]]] = []

    def __call__(
        self, rows: torch.Tensor, sent: list[int], received: list[int], axis: str, *, hands_over: bool = True
    ) -> torch.Tensor:
        assert rows.shape[0] == sum(sent)
        self.splits.append((sent, received))
        return rows.new_ones(sum(received), *rows.shape[1:])


@pytest.mark.parametrize("reverse", [False, True])
def test_backward_travels_the_other_way(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, of which this one sends 3 + 1 rows and receives 2 + 4: on one rank the two could not differ."""
    wire = Wire()
    monkeypatch.setattr("moecompile.ops.exchange.exchange_rows", wire)
    numbers = torch.tensor([[[3, 9], [1, 9]], [[2, 9], [4, 9]]])
    there, back = ([2, 4], [3, 1]) if reverse else ([3, 1], [2, 4])
    rows = torch.randn(sum(there), 5, requires_grad=True)
    out = op.all_to_all(rows, numbers, 0, reverse, "ep")
    assert out.shape == (sum(back), 5)
    out.sum().backward()
    assert rows.grad.shape == (sum(there), 5)
    assert wire.splits == [(there, back), (back, there)]


def test_assignments_come_back_the_other_way_too(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire()
    monkeypatch.setattr("moecompile.ops.exchange.exchange_rows", wire)
    numbers = torch.tensor([[[9, 3], [9, 1]], [[9, 2], [9, 4]]])
    weights = torch.randn(4, requires_grad=True)
    sent, codes = op.exchange_assignments(weights, torch.zeros(4, dtype=torch.int16), numbers, 1, "ep")
    assert sent.shape == codes.shape == (6,)
    sent.sum().backward()
    assert weights.grad.shape == (4,)
    assert wire.splits == [([3, 1], [2, 4]), ([2, 4], [3, 1])]


UNBOUND: dict[str, Callable[[], Any]] = {
    "exchange_counts": lambda: op.exchange_counts(torch.tensor([1]), "ep"),
    "all_to_all": lambda: op.all_to_all(torch.zeros(1, 2), table(1), 0, False, "ep"),
    "exchange_assignments": lambda: op.exchange_assignments(
        torch.zeros(1), torch.zeros(1, dtype=torch.int16), table(1), 0, "ep"
    ),
    "send_counts": lambda: op.send_counts(torch.tensor([1]), "ep"),
    "all_gather": lambda: op.all_gather(torch.zeros(1, 2), "ep"),
    "reduce_scatter": lambda: op.reduce_scatter(torch.zeros(1, 2), "ep"),
    "gather_assignments": lambda: op.gather_assignments(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int16), "ep"),
}


@pytest.mark.parametrize("name", UNBOUND)
def test_an_unbound_axis_raises_and_says_what_to_do(name: str) -> None:
    message = (
        "mesh axis 'ep' is not bound to a process group: run shard (compile_model(..., until='shard') or "
        "ExpertParallelStrategy) before the model"
    )
    with pytest.raises(UnboundAxisError, match=re.escape(message)):
        UNBOUND[name]()


def test_an_unbound_axis_raises_beside_a_bound_one(axis: str) -> None:
    with pytest.raises(UnboundAxisError, match="'ep'"):
        op.all_to_all(torch.zeros(1, 2), table(1), 0, False, "ep")


def test_bytes_are_counted_for_the_ranks_of_the_group_that_sends() -> None:
    """Also in a process that had another world before, whose group had the same name."""
    for size in (2, 3):
        with fake_rank(0, size):
            traffic.add(dist.group.WORLD, [1] * size)
            assert traffic.take() == dict.fromkeys(range(size), 1)
