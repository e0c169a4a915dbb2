"""Token reshapes, and load counts that are counted once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moecompile.nn import Router
from moecompile.ops.tokens import expert_counts
from tests.tiny import a_router, tokens

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
    assert expert_counts(torch.tensor([[2, 3], [3, 0]]), 3).tolist() == [1, 0, 1]  # 3 is nobody


def test_ids_become_positions() -> None:
    ids = torch.tensor([[0, 3], [2, 4]])  # 4 is nobody
    assert op.place_ids(ids, [2, 0, 3, 1]).tolist() == [[2, 1], [3, 4]]
    assert op.place_ids(ids[:0], [2, 0, 3, 1]).shape == (0, 2)


def test_count_routing_adds_up() -> None:
    """3 experts on 3 nodes; 3 is nobody."""
    load, nodes = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    sums = torch.zeros(3, dtype=torch.float64)
    chosen, kept = torch.tensor([[0, 2], [2, 1]]), torch.tensor([[0, 3], [2, 1]])
    probs = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    for _ in range(2):
        op.count_routing(load, nodes, sums, chosen, kept, probs)
    assert load.tolist() == [2, 2, 4]
    assert nodes.tolist() == [2, 2, 2]
    assert sums.tolist() == pytest.approx([4, 2, 2 * math.log(2)])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_router_logits_are_wide(dtype: torch.dtype, bias: bool) -> None:
    x, weight, shift = torch.randn(2, 3, 4).to(dtype), torch.randn(5, 4).to(dtype), torch.randn(5).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    wanted = x.to(wide) @ weight.to(wide).T + (shift.to(wide) if bias else 0)
    with torch.autocast("cpu", torch.bfloat16):
        logits = op.router_logits(x, weight, shift if bias else None)
    assert logits.dtype == wide
    assert torch.allclose(logits, wanted, atol=1e-6)


def router() -> Router:
    made = a_router(8, 4, top_k=2)
    nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(0))
    return made


def test_the_router_counts_in_training_only() -> None:
    layer = router()
    layer.eval()(tokens())
    assert layer.meter.load.sum() == 0
    layer.train()(tokens())
    assert layer.meter.load.sum() == 6 * 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_forward_is_not_counted(use_reentrant: bool) -> None:
    layer, x = router(), tokens().requires_grad_()
    runs = []
    layer.register_forward_pre_hook(lambda *_: runs.append(1))
    weights = checkpoint(lambda x: layer(x)[0], x, use_reentrant=use_reentrant)
    weights.square().sum().backward()
    assert len(runs) == 2  # it did run again
    assert layer.meter.load.sum() == 6 * 2


def test_load_is_not_in_the_state_dict_but_the_bias_is() -> None:
    assert set(router().state_dict()) == {"weight", "correction_bias"}
