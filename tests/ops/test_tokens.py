"""Token reshapes, and load counts that are counted once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moecompile.nn import Router
from moecompile.ops.tokens import expert_counts
from tests.models import tokens

op = torch.ops.moecompile


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 4), (2, 3, 4), (2, 1, 3, 4)])
def test_flatten_and_unflatten(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    flat = op.flatten_tokens(x)
    assert flat.shape == (x.numel() // 4, 4)
    assert torch.equal(op.unflatten_tokens(flat, x), x)


def test_flatten_copies_only_where_the_strides_ask_for_it() -> None:
    x = torch.randn(2, 3, 4)
    assert op.flatten_tokens(x).data_ptr() == x.data_ptr()
    turned = x.transpose(0, 1)
    assert torch.equal(op.flatten_tokens(turned), turned.reshape(-1, 4))


def test_expert_counts_by_hand() -> None:
    assert expert_counts(torch.tensor([[2, 0], [2, 3]]), 5).tolist() == [1, 0, 2, 1, 0]
    assert expert_counts(torch.zeros(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]


def test_count_load_adds_up() -> None:
    load = torch.zeros(3, dtype=torch.int64)
    for _ in range(2):
        op.count_load(load, torch.tensor([[0, 2], [2, 1]]))
    assert load.tolist() == [2, 2, 4]


def router() -> Router:
    made = Router(8, 4, top_k=2)
    nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(0))
    return made


def test_the_router_counts_in_training_only() -> None:
    layer = router()
    layer.eval()(tokens())
    assert layer.load.sum() == 0
    layer.train()(tokens())
    assert layer.load.sum() == 6 * 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_forward_is_not_counted(use_reentrant: bool) -> None:
    layer, x = router(), tokens().requires_grad_()
    runs = []
    layer.register_forward_pre_hook(lambda *_: runs.append(1))
    weights = checkpoint(lambda x: layer(x)[0], x, use_reentrant=use_reentrant)
    weights.square().sum().backward()
    assert len(runs) == 2  # it did run again
    assert layer.load.sum() == 6 * 2


def test_load_is_not_in_the_state_dict_but_the_bias_is() -> None:
    assert set(router().state_dict()) == {"weight", "correction_bias"}
