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
    assert torch.equal(op.sum_slots(rows(1, 2, 3, 4, 5, 6), torch.tensor([1, 4, 3, 0, 2, 5]), 3, 2), rows(5, 8, 8))


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


# -- dropped assignments: id 4 is nobody -------------------------------------------------------------------------------

DROPPED_TK = torch.tensor([[2, 4], [4, 4], [0, 2]])


def test_permute_leaves_dropped_assignments_out() -> None:
    got_rows, order, counts = op.permute(X_TD, DROPPED_TK, 4, False)
    assert torch.equal(got_rows, rows(3, 1, 3))  # e0: t2   e2: t0 t2
    assert order.tolist() == [4, 0, 5]
    assert counts.tolist() == [1, 0, 2, 0]


def test_unpermute_sums_what_is_there() -> None:
    weights_TK = torch.tensor([[0.5, 9.0], [9.0, 9.0], [3.0, 1.0]])
    combined = op.unpermute(rows(100, 200, 300), torch.tensor([4, 0, 5]), weights_TK)
    assert torch.equal(combined, rows(0.5 * 200, 0, 3 * 100 + 300))


def test_gradients_of_dropped_assignments_are_zero() -> None:
    x, weights = X_TD.float().requires_grad_(), torch.full((3, 2), 0.5, requires_grad=True)
    permuted, order, _ = op.permute(x, DROPPED_TK, 4, False)
    op.unpermute(permuted * 2, order, weights).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]]))
    assert torch.equal(weights.grad, torch.tensor([[22.0, 0.0], [0.0, 0.0], [66.0, 66.0]]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_dropped_adds_zero_even_beside_values_that_are_no_numbers(value: float) -> None:
    """Neither a weight of a dropped slot nor the row of another token may reach a sum: 0 * nan would."""
    weights = torch.tensor([[0.5, value], [value, value], [1.0, 1.0]], requires_grad=True)
    outputs = torch.tensor([[value, value], [1.0, 10.0], [value, value]], requires_grad=True)  # of t2 t0 t2
    out = op.unpermute(outputs, torch.tensor([4, 0, 5]), weights)
    assert torch.equal(out[:2], torch.tensor([[0.5, 5.0], [0.0, 0.0]]))
    out[:2].sum().backward()
    assert weights.grad[:2].tolist() == [[11.0, 0.0], [0.0, 0.0]]
    assert outputs.grad.tolist() == [[0.0, 0.0], [0.5, 0.5], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_drops_equal_a_dense_sum(dtype: torch.dtype) -> None:
    """Random drops against one-hot matrices; a bf16 row is rounded once."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_experts, top_k, width = 40, 6, 3, 5
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, num_experts)
    x = torch.randn(num_tokens, width, generator=generator).to(dtype)
    weights = torch.rand(ids.shape, generator=generator).to(torch.promote_types(dtype, torch.float32))
    permuted, order, counts = op.permute(x, ids, num_experts, False)
    kept = (ids < num_experts).to(weights.dtype)
    assert counts.sum() == kept.sum() == permuted.shape[0]
    wanted = x.to(weights.dtype) * (weights * kept).sum(1, keepdim=True)
    rtol = 8e-3 if dtype == torch.bfloat16 else 1e-6
    assert torch.allclose(op.unpermute(permuted, order, weights), wanted.to(dtype), rtol=rtol)
    summed = op.sum_slots(permuted, order, num_tokens, top_k)
    assert summed.dtype == dtype
    assert torch.allclose(summed, (x.to(weights.dtype) * kept.sum(1, keepdim=True)).to(dtype))


def test_everything_is_dropped() -> None:
    ids = torch.full((3, 2), 4)
    permuted, order, counts = op.permute(X_TD, ids, 4, False)
    assert (permuted.shape, order.shape, counts.tolist()) == ((0, 2), (0,), [0, 0, 0, 0])
    assert torch.equal(op.unpermute(permuted, order, torch.ones(3, 2)), torch.zeros(3, 2))
    assert torch.equal(op.sum_slots(permuted, order, 3, 2), torch.zeros(3, 2))


def test_nothing_is_dropped_though_it_might_be() -> None:
    plain, limited = (op.permute(X_TD, IDS_TK, 4, dropless) for dropless in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(plain, limited, strict=True))
