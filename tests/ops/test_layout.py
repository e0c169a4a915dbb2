"""Permutations with indices that were written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moecompile import ops  # noqa: F401  (registers the ops)

op = torch.ops.moecompile


def rows(*firsts: float) -> Tensor:
    """One row (v, 10 v) per number."""
    return torch.tensor([[v, 10 * v] for v in firsts])


X_TD = rows(1, 2, 3)
IDS_TK = torch.tensor([[2, 0], [2, 1], [0, 2]])


def test_permute_stands_by_expert_and_keeps_token_order() -> None:
    got_rows, order, counts = op.permute(X_TD, IDS_TK, 4)
    #                             e0: t0 t2   e1: t1   e2: t0 t1 t2   e3: nobody
    assert torch.equal(got_rows, rows(1, 3, 2, 1, 2, 3))
    assert order.tolist() == [1, 4, 3, 0, 2, 5]  # assignment = token * 2 + slot
    assert counts.tolist() == [2, 1, 3, 0]


def test_unpermute_weights_the_slots() -> None:
    weights_TK = torch.tensor([[0.5, 2.0], [1.0, 0.0], [3.0, 1.0]])
    outputs = rows(100, 200, 300, 400, 500, 600)  # of assignments 1 4 3 0 2 5
    combined = op.unpermute(outputs, torch.tensor([1, 4, 3, 0, 2, 5]), weights_TK)
    assert torch.equal(combined, rows(0.5 * 400 + 2 * 100, 500, 3 * 200 + 600))


def test_sum_slots_is_the_gradient_of_permute() -> None:
    assert torch.equal(op.sum_slots(rows(1, 2, 3, 4, 5, 6), torch.tensor([1, 4, 3, 0, 2, 5]), 2), rows(5, 8, 8))


def test_unpermute_undoes_permute_with_weights_that_sum_to_one() -> None:
    permuted, order, _ = op.permute(X_TD, IDS_TK, 4)
    assert torch.allclose(op.unpermute(permuted, order, torch.tensor([[0.25, 0.75]] * 3)), X_TD)


def test_unpermute_sums_in_the_precision_of_the_weights() -> None:
    """1 + 2^-9 is lost in bf16: the two halves must meet in fp32 and be rounded once."""
    halves = torch.tensor([[1.0], [1.0]], dtype=torch.bfloat16)
    weights = torch.tensor([[1.0, 2**-8 + 2**-9]])
    out = op.unpermute(halves, torch.tensor([0, 1]), weights)
    assert out.dtype == torch.bfloat16
    assert out.item() == torch.tensor(1 + 2**-8 + 2**-9).to(torch.bfloat16).item() == 1 + 2**-7


@pytest.mark.parametrize(
    ("counts_re", "by_expert"),
    [
        ([[1, 2], [2, 1]], [0, 3, 4, 1, 2, 5]),  # rank 0: a bb, rank 1: AA B -> a AA bb B
        ([[0, 3], [3, 0]], [3, 4, 5, 0, 1, 2]),
        ([[0, 0], [6, 0]], [0, 1, 2, 3, 4, 5]),
        ([[0, 0, 1], [0, 0, 0], [4, 0, 1]], [1, 2, 3, 4, 0, 5]),
    ],
)
def test_regroup_stands_by_expert_then_by_source(counts_re: list[list[int]], by_expert: list[int]) -> None:
    received = rows(0, 1, 2, 3, 4, 5)
    grouped, order, counts = op.regroup(received, torch.tensor(counts_re))
    assert order.tolist() == by_expert
    assert torch.equal(grouped, rows(*map(float, by_expert)))
    assert counts.tolist() == torch.tensor(counts_re).sum(0).tolist()
    assert torch.equal(op.ungroup(grouped, order), received)


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("expert", [0, 3])
def test_few_tokens_and_one_busy_expert(num_tokens: int, expert: int) -> None:
    x_TD, ids_TK = torch.rand(num_tokens, 2), torch.full((num_tokens, 1), expert)
    permuted, order, counts = op.permute(x_TD, ids_TK, 4)
    assert torch.equal(permuted, x_TD)
    assert counts.tolist() == [num_tokens * (e == expert) for e in range(4)]
    assert torch.equal(op.unpermute(permuted, order, torch.ones(num_tokens, 1)), x_TD)


def test_one_expert_gets_everything() -> None:
    permuted, order, counts = op.permute(X_TD, torch.full((3, 1), 2), 4)
    assert torch.equal(permuted, X_TD)
    assert (order.tolist(), counts.tolist()) == ([0, 1, 2], [0, 0, 3, 0])


def test_regroup_of_nothing() -> None:
    grouped, order, counts = op.regroup(torch.zeros(0, 2), torch.zeros(2, 3, dtype=torch.int64))
    assert (grouped.shape, order.shape, counts.tolist()) == ((0, 2), (0,), [0, 0, 0])
