"""Two hops by hand: 8 experts on 2 nodes x 2 ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moecompile import ops  # noqa: F401  (registers the ops)

op = torch.ops.moecompile

# ranks (0 1 | 2 3) and (4 5 | 6 7); 8 is a dropped assignment
#   token 0: node 0 by 1 and 3 (both ranks), node 1 by 4
#   token 1: dropped whole
#   token 2: node 1 by 6 and 7 (one rank), and one dropped
IDS_TK = torch.tensor([[4, 1, 3], [8, 8, 8], [7, 8, 6]])
WEIGHTS_TK = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])


def rows(*firsts: float) -> Tensor:
    """One row (v, 10 v) per number."""
    return torch.tensor([[v, 10.0 * v] for v in firsts]).reshape(-1, 2)


def table(sent: list[list[int]]) -> Tensor:
    return torch.tensor([sent, [[0] * len(sent[0])] * len(sent)])


def test_counts_of_both_hops() -> None:
    codes, counts = op.count_hops(IDS_TK, 8, 2, 2)
    assert codes.tolist() == [9, 2, 6, 17, 16, 16, 15, 16, 12]
    #                         rows, assignments, then the same for position 0 and position 1
    assert counts.tolist() == [[1, 2, 1, 1, 1, 1], [2, 3, 1, 1, 1, 2]]


def test_no_token_has_no_counts() -> None:
    codes, counts = op.count_hops(IDS_TK[:0], 8, 2, 2)
    assert codes.shape == (0,)
    assert counts.tolist() == [[0] * 6] * 2


def test_onward_counts_are_summed_over_the_sources() -> None:
    received = torch.tensor([[9, 9, 1, 2, 3, 4], [9, 9, 10, 20, 30, 40]])
    assert op.onward_counts(received).tolist() == [[11, 22], [33, 44]]


def test_one_read_brings_both_tables() -> None:
    sent, received = torch.arange(12).view(2, 6), torch.arange(12).view(2, 6) + 50
    onward, arriving = torch.tensor([[1, 2]]), torch.tensor([[3, 4]])
    first, second = op.read_tables(sent, received, onward, arriving)
    assert torch.equal(first, torch.stack((sent, received)))
    assert torch.equal(second, torch.stack((onward, arriving)))


def test_the_first_hop_sends_a_token_once_to_each_node() -> None:
    codes, counts = op.count_hops(IDS_TK, 8, 2, 2)
    sent, source, weights, codes, order = op.pack_rows(rows(1, 2, 3), WEIGHTS_TK, codes, 8, 2, table(counts.tolist()))
    assert torch.equal(sent, rows(1, 1, 3))  # token 0 to node 0; tokens 0 and 2 to node 1
    assert source.tolist() == [0, 0, 2]
    assert order.tolist() == [1, 2, 0, 6, 8]
    assert torch.equal(weights, torch.tensor([0.2, 0.3, 0.1, 0.7, 0.9]))
    #                         2 * expert on its node + first of its row
    assert codes.tolist() == [3, 6, 1, 7, 4]
    assert codes.dtype == torch.int16


def test_the_second_hop_sends_it_on_once_to_each_rank() -> None:
    """What node 1 got above, from two sources that sent the same."""
    codes, weights = torch.tensor([1, 7, 4] * 2, dtype=torch.int16), torch.tensor([0.1, 0.7, 0.9, 1.1, 1.7, 1.9])
    sent, source, weights, codes, order = op.pack_rows(rows(1, 3, 5, 7), weights, codes, 4, 2, table([[2, 2], [2, 4]]))
    assert torch.equal(sent, rows(1, 5, 3, 7))  # rows 0 and 2 to position 0, rows 1 and 3 to position 1
    assert source.tolist() == [0, 2, 1, 3]
    assert order.tolist() == [0, 3, 1, 2, 4, 5]
    assert torch.equal(weights, torch.tensor([0.1, 1.1, 0.7, 0.9, 1.7, 1.9]))
    assert codes.tolist() == [1, 1, 3, 0, 3, 0]


def test_one_hop_over_all_ranks_counts_as_dedup_does() -> None:
    ids = torch.rand(7, 8, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :3]
    codes, counts = op.count_rows(ids, 8, 4)
    hop_codes, hop_counts = op.count_hops(ids, 8, 4, 1)
    assert torch.equal(hop_codes, codes)
    assert torch.equal(hop_counts[:, :2], counts)


def test_gradients_return_to_their_rows_and_assignments() -> None:
    codes, counts = op.count_hops(IDS_TK, 8, 2, 2)
    x, weights = rows(1, 2, 3).requires_grad_(), WEIGHTS_TK.clone().requires_grad_()
    sent, _, sent_weights, _, _ = op.pack_rows(x, weights, codes, 8, 2, table(counts.tolist()))
    (sent * rows(1, 10, 100)).sum().add((sent_weights * torch.arange(1.0, 6.0)).sum()).backward()
    assert torch.equal(x.grad, rows(11, 0, 100))
    assert weights.grad.tolist() == [[3, 1, 2], [0, 0, 0], [4, 0, 5]]


def test_too_many_experts_for_a_code_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 16384 experts a rank or node, not 16385"):
        op.pack_rows(rows(1), torch.ones(1), torch.tensor([1]), 2 * 16385, 2, table([[1, 1], [0, 0]]))
