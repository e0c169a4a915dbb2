"""Expert matmuls against a loop over rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moecompile import ops  # noqa: F401  (registers the ops)

op = torch.ops.moecompile
COUNTS = [[2, 1, 3, 0], [0, 0, 6, 0], [0, 0, 0, 0], [1, 0, 0, 0], [6, 0, 0, 0], [0, 0, 0, 6]]


def case(counts: list[int]) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(counts), 3, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(4, 5, 3, dtype=torch.float64, generator=generator).requires_grad_()
    return rows, weight, torch.tensor(counts), [e for e, count in enumerate(counts) for _ in range(count)]


@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_mm_is_one_matmul_per_row(counts: list[int]) -> None:
    rows, weight, counts_E, expert_of = case(counts)
    out = op.grouped_mm(rows, [weight], counts_E, None, 0)
    assert out.shape == (sum(counts), 5)
    for i, expert in enumerate(expert_of):
        assert torch.allclose(out[i], weight[expert] @ rows[i], atol=1e-12)
    out.square().sum().backward()
    rows_ref, weight_ref, _, _ = case(counts)
    sum(
        ((weight_ref[e] @ rows_ref[i]).square().sum() for i, e in enumerate(expert_of)), start=rows_ref.sum() * 0
    ).backward()
    assert torch.allclose(rows.grad, rows_ref.grad, atol=1e-12)
    expected = torch.zeros_like(weight) if weight_ref.grad is None else weight_ref.grad
    assert torch.allclose(weight.grad, expected, atol=1e-12)


def test_an_expert_without_rows_has_zero_gradient_not_none() -> None:
    rows, weight, counts_E, _ = case([2, 1, 3, 0])
    op.grouped_mm(rows, [weight], counts_E, None, 0).sum().backward()
    assert weight.grad[3].abs().max() == 0
    assert weight.grad[:3].abs().amin((1, 2)).min() > 0


def test_only_the_gradients_that_are_needed() -> None:
    rows, weight, counts_E, _ = case([2, 1, 3, 0])
    weight.requires_grad_(False)
    op.grouped_mm(rows, [weight], counts_E, None, 0).sum().backward()
    assert rows.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("counts", COUNTS)
def test_expert_bias_repeats_and_sums(counts: list[int]) -> None:
    _, _, counts_E, expert_of = case(counts)
    bias = torch.arange(8.0).view(4, 2).requires_grad_()
    out = op.expert_bias(bias, counts_E, torch.zeros(sum(counts), 3))
    assert out.tolist() == [bias[e].tolist() for e in expert_of]
    out.sum().backward()
    assert bias.grad.tolist() == [[float(count)] * 2 for count in counts]


def test_bias_gradients_are_not_added_up_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """`index_add_` of a GPU adds in the dtype of the rows, and 256 + 1 is 256 in bf16."""
    monkeypatch.setattr(torch.Tensor, "index_add_", None, raising=False)
    rows = torch.ones(600, 2, dtype=torch.bfloat16)
    assert op.sum_experts(rows, torch.tensor([512, 0, 88])).tolist() == [[512.0] * 2, [0.0] * 2, [88.0] * 2]


def test_bf16_rows_are_multiplied_in_bf16() -> None:
    rows, weight = torch.randn(3, 4).bfloat16(), torch.randn(2, 5, 4).bfloat16()
    out = op.grouped_mm(rows, [weight], torch.tensor([1, 2]), None, 0)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[:1], rows[:1] @ weight[0].T)
