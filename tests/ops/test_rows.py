"""Packed rows: one per (token, destination rank), by hand and against the one-device dispatch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moecompile import ops  # noqa: F401  (registers the ops)

op = torch.ops.moecompile


def rows(*firsts: float) -> Tensor:
    """One row (v, 10 v) per number."""
    return torch.tensor([[v, 10 * v] for v in firsts])


# 4 experts on 2 ranks (0 1 | 2 3); token 0 -> 2, 0; token 1 -> 3, 2; token 2 -> 1, 0
IDS_TK = torch.tensor([[2, 0], [3, 2], [1, 0]])
WEIGHTS_TK = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])


def packed_rows(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, num_ranks: int
) -> tuple[Tensor, ...]:
    """What is sent, and the counts: what comes back is taken to be as much."""
    codes, counts = op.count_rows(ids_TK, num_experts, num_ranks)
    return *op.pack_rows(x_TD, weights_TK, codes, num_experts, num_ranks, torch.stack((counts, counts))), counts


def test_pack_rows_sends_a_token_once_to_each_rank() -> None:
    packed, tokens, weights, codes, order, counts = packed_rows(rows(1, 2, 3), IDS_TK, WEIGHTS_TK, 4, 2)
    # to rank 0: token 0 (expert 0), token 2 (experts 1 and 0); to rank 1: token 0 (2), token 1 (3 and 2)
    assert torch.equal(packed, rows(1, 3, 1, 2))
    assert tokens.tolist() == [0, 2, 0, 1]
    assert order.tolist() == [1, 4, 5, 0, 2, 3]
    assert torch.equal(weights, torch.tensor([0.2, 0.5, 0.6, 0.1, 0.3, 0.4]))
    #                         2 * local expert + first of its row
    assert codes.tolist() == [1, 3, 0, 1, 3, 0]
    assert codes.dtype == torch.int16
    assert counts.tolist() == [[2, 3], [2, 3]]  # rows and assignments per rank


def test_pack_rows_does_not_send_dropped_assignments() -> None:
    ids = torch.tensor([[2, 4], [4, 4], [1, 0]])  # 4 is nobody
    packed, tokens, weights, codes, order, counts = packed_rows(rows(1, 2, 3), ids, WEIGHTS_TK, 4, 2)
    assert torch.equal(packed, rows(3, 1))  # to rank 0: token 2; to rank 1: token 0
    assert tokens.tolist() == [2, 0]
    assert order.tolist() == [4, 5, 0]
    assert torch.equal(weights, torch.tensor([0.5, 0.6, 0.1]))
    assert codes.tolist() == [3, 0, 1]
    assert counts.tolist() == [[1, 2], [1, 1]]


def test_expand_rows_stands_by_local_expert() -> None:
    received = rows(1, 3)  # what rank 0 gets of the case above
    codes = torch.tensor([1, 3, 0], dtype=torch.int16)
    copies, weights, source, order, counts = op.expand_rows(received, torch.tensor([0.2, 0.5, 0.6]), codes, 2)
    assert torch.equal(copies, rows(1, 3, 3))  # expert 0: tokens 0 and 2; expert 1: token 2
    assert source.tolist() == [0, 1, 1]
    assert order.tolist() == [0, 2, 1]
    assert torch.equal(weights, torch.tensor([0.2, 0.6, 0.5]))
    assert counts.tolist() == [2, 1]


def test_reduce_rows_weights_the_copies_of_each_row() -> None:
    out = op.reduce_rows(rows(1, 3, 7), torch.tensor([2.0, 10.0, 1.0]), torch.tensor([0, 1, 1]), rows(0, 0))
    assert torch.equal(out, rows(2, 37))


def test_combine_rows_sums_what_came_back() -> None:
    out = op.combine_rows(rows(1, 2, 4, 8).double(), torch.tensor([0, 2, 0, 1]), rows(0, 0, 0, 0))
    assert torch.equal(out, rows(5, 8, 2, 0).double())  # token 3 asked nobody


DROPS = {"some dropped": 0.4, "all dropped": 1.1}
CASES = {
    "every expert": (5, 4, 2, None),
    "some dropped": (9, 4, 3, None),
    "all dropped": (5, 4, 2, None),
    "one token": (1, 4, 2, None),
    "no token": (0, 4, 2, None),
    "one expert gets everything": (5, 4, 1, 2),
    "top-1": (5, 4, 1, None),
    "all experts": (5, 4, 4, None),
}


def choose(num_tokens: int, num_experts: int, top_k: int, only: int | None) -> Tensor:
    if only is not None:
        return torch.full((num_tokens, top_k), only)
    generator = torch.Generator().manual_seed(1)
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]


@pytest.mark.parametrize("name", CASES)
def test_with_one_rank_the_packed_path_equals_permute(name: str) -> None:
    """Outputs and gradients of both paths, with an expert that differs per row (times 1 + its id)."""
    num_tokens, num_experts, top_k, only = CASES[name]
    ids_TK = choose(num_tokens, num_experts, top_k, only)
    dropless, dropped = name not in DROPS, torch.rand(ids_TK.shape) < DROPS.get(name, 0.0)
    ids_TK = ids_TK.masked_fill(dropped, num_experts)
    results = []
    for packed in (False, True):
        generator = torch.Generator().manual_seed(0)
        x_TD = torch.randn(num_tokens, 3, dtype=torch.float64, generator=generator).requires_grad_()
        weights_TK = torch.rand(num_tokens, top_k, dtype=torch.float64, generator=generator).requires_grad_()
        if packed:
            sent, tokens, weights, codes, _, table = packed_rows(x_TD, ids_TK, weights_TK, num_experts, 1)
            assert table.tolist() == [[int((~dropped).any(1).sum()), int((~dropped).sum())]]
            copies, weights, source, _, counts = op.expand_rows(sent, weights, codes, num_experts)
            partial = op.reduce_rows(_expert(copies, counts), weights, source, sent)
            out = op.combine_rows(partial, tokens, x_TD)
        else:
            copies, order, counts = op.permute(x_TD, ids_TK, num_experts, dropless)
            out = op.unpermute(_expert(copies, counts), order, weights_TK)
        out.square().sum().backward()
        results.append((out, x_TD.grad, weights_TK.grad, counts))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def _expert(rows: Tensor, counts: Tensor) -> Tensor:
    factor = torch.arange(1, counts.numel() + 1).repeat_interleave(counts)
    return rows.sin() * factor.unsqueeze(1)
