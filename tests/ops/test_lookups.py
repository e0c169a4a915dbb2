"""The ops of lookups in spread tables, on one rank; tests/distributed/test_lookups.py has several."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moecompile.ops import lookups
from moecompile.ops.lookups import read_rows, row_gradients, rows_of_a_rank


def both(ids: torch.Tensor, padding: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    table = torch.randn(10, 3, dtype=dtype)
    ours, theirs = table.clone().requires_grad_(), table.clone().requires_grad_()
    out, wanted = (
        read_rows(ours, ids, padding, dtype=dtype),
        F.embedding(ids, theirs, padding if padding >= 0 else None),
    )
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted.backward(grad)
    return out, wanted, ours.grad, theirs.grad  # type: ignore[return-value]


@pytest.mark.parametrize("ids", [[[1, 2, 2], [0, 9, 3]], [[]], [7]])
@pytest.mark.parametrize("padding", [-1, 2])
def test_rows_and_gradients_are_those_of_an_embedding(ids: list[int], padding: int) -> None:
    out, wanted, grad, wanted_grad = both(torch.tensor(ids, dtype=torch.long), padding)
    assert torch.equal(out, wanted)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-15, atol=1e-15)


def test_gradients_of_bf16_rows_are_summed_in_fp32() -> None:
    table = torch.zeros(1, 1, dtype=torch.bfloat16).requires_grad_()
    read_rows(table, torch.zeros(300, dtype=torch.long), -1).sum().backward()
    assert table.grad is not None and table.grad.item() == 300  # bf16 ends at 256


def test_gradients_by_rows_are_no_grad() -> None:
    table = torch.randn(10, 3, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([[4, 4], [1, 7]])
    for _ in range(2):
        read_rows(table, ids, 7, by_rows="lazy_adamw").sum().backward()
    kept = row_gradients(table)
    assert table.grad is None and kept is not None
    assert kept.rows_V.tolist() == [1, 4, 7]
    assert kept.summed_VD[:, 0].tolist() == [2, 4, 0]
    dense = table.detach().clone().requires_grad_()
    for _ in range(2):
        F.embedding(ids, dense, 7).sum().backward()
    assert dense.grad is not None and torch.equal(kept.whole(table), dense.grad)
    kept.clear()
    assert not kept.exist


@pytest.mark.parametrize("wrong", [-1, 10])
def test_a_row_that_is_not_there_is_named(wrong: int) -> None:
    with pytest.raises(IndexError, match=f"has 10 rows, and a token asks for row {wrong}"):
        torch.ops.moecompile.unique_ids(torch.tensor([3, wrong]), 10)


def test_the_last_rank_may_have_fewer_rows() -> None:
    assert [rows_of_a_rank(rows, 4) for rows in (8, 9, 3)] == [2, 3, 1]
    assert lookups._index_dtype(2**31) is torch.int64
