"""What an all-gather needs around it, by hand: 4 experts on 2 ranks, 3 and 1 tokens that have an expert."""

from __future__ import annotations

import torch
from torch import Tensor

from moecompile import ops  # noqa: F401  (registers the ops)

op = torch.ops.moecompile

IDS_TK = torch.tensor([[0, 3], [4, 1], [2, 3]])  # 4 is a dropped assignment
WEIGHTS_TK = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
OTHER_IDS, OTHER_WEIGHTS = torch.tensor([[1, 0]]), torch.tensor([[0.7, 0.8]])
#                       tokens, assignments to this rank, its first expert: from rank 0, from rank 1
RECEIVED = torch.tensor([[[3, 2, 0], [1, 2, 0]], [[3, 3, 2], [1, 0, 2]]])


def rows(*firsts: float) -> Tensor:
    """One row (v, 10 v) per number."""
    return torch.tensor([[v, 10.0 * v] for v in firsts]).reshape(-1, 2)


def table(rank: int) -> Tensor:
    return torch.stack((torch.zeros_like(RECEIVED[rank]), RECEIVED[rank]))


def test_counts_say_what_each_rank_must_know() -> None:
    for source, ids in enumerate((IDS_TK, OTHER_IDS)):
        assert torch.equal(op.count_gathered(ids, 4, 2), RECEIVED[:, source])


def test_a_short_micro_batch_is_padded_with_tokens_that_choose_nobody() -> None:
    own = torch.tensor([0])
    x, weights, ids = op.pad_tokens(rows(9), OTHER_WEIGHTS, OTHER_IDS, own, table(1))
    assert torch.equal(x, rows(9, 0, 0))
    assert torch.equal(weights, torch.tensor([[0.7, 0.8], [0, 0], [0, 0]]))
    assert ids.tolist() == [[1, 0], [-1, -1], [-1, -1]]
    assert ids.dtype == torch.int16
    assert torch.equal(op.spread_tokens(x, own, rows(9)), rows(9))


def test_tokens_without_an_expert_stay_at_home() -> None:
    ids_TK = torch.tensor([[4, 4], [1, 0], [4, 4], [4, 3], [4, 4]])
    counts = op.count_gathered(ids_TK, 4, 2)
    assert counts.tolist() == [[2, 2, 0], [2, 1, 2]]
    sizes = torch.stack((counts, torch.tensor([[2, 2, 0], [3, 2, 0]])))  # the other rank has three
    own = op.own_tokens(ids_TK, sizes, 4)
    assert own.tolist() == [1, 3]
    x = rows(5, 6, 7, 8, 9).requires_grad_()
    weights = torch.arange(10.0).view(5, 2).requires_grad_()
    taken, taken_weights, taken_ids = op.pad_tokens(x, weights, ids_TK, own, sizes)
    assert torch.equal(taken, rows(6, 8, 0))
    assert taken_weights.tolist() == [[2, 3], [6, 7], [0, 0]]
    assert taken_ids.tolist() == [[1, 0], [4, 3], [-1, -1]]
    back = op.spread_tokens(taken, own, x.detach())
    assert torch.equal(back, rows(0, 6, 0, 8, 0))
    (back.sum() + taken_weights.sum()).backward()
    assert torch.equal(x.grad, torch.tensor([[0.0], [1], [0], [1], [0]]).expand(5, 2))
    assert torch.equal(weights.grad, torch.tensor([[0.0], [1], [0], [1], [0]]).expand(5, 2))


def test_a_rank_without_tokens_sends_padding_alone() -> None:
    ids_TK = torch.full((2, 2), 4)
    own = op.own_tokens(ids_TK, torch.tensor([[[0, 0, 0], [0, 0, 2]]] * 2), 4)
    taken, _, ids = op.pad_tokens(rows(5, 6), torch.ones(2, 2), ids_TK, own, table(1))
    assert (own.tolist(), ids.tolist()) == ([], [[-1, -1]] * 3)
    assert torch.equal(taken, rows(0, 0, 0))
    assert torch.equal(op.spread_tokens(taken, own, rows(5, 6)), rows(0, 0))


def test_each_rank_takes_its_own_assignments() -> None:
    x = torch.cat((rows(1, 2, 3), rows(9, 0, 0)))
    weights = torch.cat((WEIGHTS_TK, OTHER_WEIGHTS, torch.zeros(2, 2)))
    ids = torch.cat((IDS_TK, OTHER_IDS, torch.full((2, 2), -1))).to(torch.int16)
    taken = [op.take_local(x, weights, ids, RECEIVED[rank], table(rank), 2) for rank in (0, 1)]
    copies, copy_weights, source, order, counts = taken[0]
    assert torch.equal(copies, rows(1, 9, 2, 9))  # expert 0: tokens 0 and 3; expert 1: tokens 1 and 3
    assert torch.equal(copy_weights, torch.tensor([0.1, 0.8, 0.4, 0.7]))
    assert (source.tolist(), order.tolist(), counts.tolist()) == ([0, 3, 1, 3], [0, 7, 3, 6], [2, 2])
    copies, copy_weights, source, order, counts = taken[1]
    assert torch.equal(copies, rows(3, 1, 3))  # expert 2: token 2; expert 3: tokens 0 and 2
    assert torch.equal(copy_weights, torch.tensor([0.5, 0.2, 0.6]))
    assert (source.tolist(), order.tolist(), counts.tolist()) == ([2, 0, 2], [4, 1, 5], [1, 2])


def test_gradients_of_padding_are_dropped_and_those_of_taken_rows_summed() -> None:
    x, weights = rows(9).requires_grad_(), OTHER_WEIGHTS.clone().requires_grad_()
    padded, padded_weights, ids = op.pad_tokens(x, weights, OTHER_IDS, torch.tensor([0]), table(0))
    received = torch.tensor([[3, 0, 0], [1, 2, 0]])
    copies, copy_weights, *_ = op.take_local(
        padded, padded_weights, ids, received, torch.stack((received, received)), 2
    )
    (copies * rows(1, 10)).sum().add((copy_weights * torch.tensor([1.0, 2.0])).sum()).backward()
    assert torch.equal(x.grad, rows(11))
    assert weights.grad.tolist() == [[2, 1]]
