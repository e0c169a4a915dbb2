"""Quantile balancing: the histogram against sorted values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moecompile.ops.required_bias import bounds, solved_bias

count = torch.ops.moecompile.count_required_bias
EXPERTS, TOP_K, TOKENS, BINS = 8, 3, 3000, 1000


def skewed(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores (T, E) that prefer some experts, and a bias (E,), float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    return (logits + torch.linspace(-2, 2, EXPERTS)).sigmoid(), torch.randn(EXPERTS, generator=generator).double() / 5


def counted(scores: Tensor, bias: Tensor, real: Tensor | None = None) -> Tensor:
    histogram = torch.zeros(EXPERTS, BINS, dtype=torch.int32)
    count(histogram, scores, bias, TOP_K, real)
    return histogram


def exact(scores: Tensor, bias: Tensor) -> Tensor:
    """By sorting, one token and expert at a time; not centred."""
    rows = []
    for row in scores.tolist():
        cutoff = sorted((s + b for s, b in zip(row, bias.tolist(), strict=True)), reverse=True)[TOP_K]
        rows.append([cutoff - s for s in row])
    place = len(rows) * TOP_K // EXPERTS  # as many tokens require less
    return torch.tensor([sorted(column)[place - 1] for column in zip(*rows, strict=True)], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_within_a_bin_of_the_exact_quantile(seed: int) -> None:
    scores, bias = skewed(seed)
    got, wanted = solved_bias(counted(scores, bias), bias, TOP_K / EXPERTS), exact(scores, bias)
    low, high = bounds(bias)
    error = got - wanted  # a constant, which centring subtracts, and at most a bin either way
    assert float(error.max() - error.min()) <= 2 * float(high - low) / BINS
    assert got.mean().abs() < 1e-15


def test_one_step_evens_out_a_fixed_batch() -> None:
    """The bias is solved, not nudged: three steps take a MaxVio above 1 below 0.1."""
    scores, bias = skewed()
    violations = []
    for _ in range(4):
        load = (scores + bias).topk(TOP_K).indices.flatten().bincount(minlength=EXPERTS).double()
        violations.append(float(load.max() / load.mean() - 1))
        bias = solved_bias(counted(scores, bias), bias, TOP_K / EXPERTS)
    assert violations[0] > 1.0
    assert violations[3] < 0.1


def test_parts_of_a_batch_add_up_and_padding_does_not_count() -> None:
    scores, bias = skewed()
    whole = counted(scores, bias)
    assert whole.sum(1).tolist() == [TOKENS] * EXPERTS
    real = torch.arange(TOKENS) % 3 != 0
    parts = counted(scores, bias, real) + counted(scores[~real], bias)
    assert torch.equal(parts, whole)


def test_nothing_is_counted_where_every_expert_is_chosen_or_no_token_is_there() -> None:
    histogram, (scores, bias) = torch.zeros(EXPERTS, BINS, dtype=torch.int32), skewed()
    count(histogram, scores, bias, EXPERTS)
    count(histogram, scores[:0], bias, TOP_K)
    assert not histogram.any()


def test_scores_at_the_ends_are_in_the_last_bins() -> None:
    """All scores 0 or 1, and the same bias for all: r is -1, 0 or 1, the ends of the range."""
    scores = torch.tensor([[1.0] * 4 + [0.0] * 4, [1.0, 1.0] + [0.0] * 6], dtype=torch.float64)
    histogram = counted(scores, torch.zeros(EXPERTS, dtype=torch.float64))
    assert histogram[0].nonzero().flatten().tolist() == [0, BINS // 2]  # the cutoffs are 1 and 0
    assert histogram[7].nonzero().flatten().tolist() == [BINS // 2, BINS - 1]
