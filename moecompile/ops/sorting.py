"""Sorts assignments by expert without copying rows, for `expert_ffn`, which gathers the rows itself.

Each op here is the counterpart of one that copies rows: permute, expand_rows, take_local.

Legend: T tokens, K top-k, E experts, e local experts, R kept assignments, V rows received, B assignments received,
G rows gathered.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from moecompile.ops import sizes
from moecompile.ops.gather import local_assignments
from moecompile.ops.layout import by_assignment, sorted_assignments
from moecompile.ops.rows import sorted_codes

_Sorted = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("moecompile::sort_assignments", mutates_args=())
def sort_assignments(
    ids_TK: Tensor, weights_TK: Tensor, num_experts: int, dropless: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Like `permute`.

    Returns:
        weights_R, source_R int64 (the token of each row), order_R int64 (row -> flat assignment), counts_E int64.
    """
    order_R, counts_E = sorted_assignments(ids_TK, num_experts, dropless)
    return weights_TK.reshape(-1).index_select(0, order_R), order_R // ids_TK.shape[1], order_R, counts_E


@sort_assignments.register_fake
def _(ids_TK: Tensor, weights_TK: Tensor, num_experts: int, dropless: bool = True) -> _Sorted:
    num_rows = ids_TK.numel() if dropless else sizes.size(lambda load: load.kept(ids_TK.numel(), num_experts))
    return _empty(ids_TK, weights_TK, num_rows, num_experts)


@torch.library.custom_op("moecompile::sort_received", mutates_args=())
def sort_received(weights_B: Tensor, codes_B: Tensor, num_local: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Like `expand_rows`: weights_B, source_B int64 (the received row of each), order_B int64, counts_e int64."""
    source_B, order_B, counts_e = sorted_codes(codes_B, num_local)
    return weights_B.index_select(0, order_B), source_B, order_B, counts_e


@sort_received.register_fake
def _(weights_B: Tensor, codes_B: Tensor, num_local: int) -> _Sorted:
    return _empty(codes_B, weights_B, codes_B.shape[0], num_local)


@torch.library.custom_op("moecompile::sort_gathered", mutates_args=())
def sort_gathered(
    weights_GK: Tensor, ids_GK: Tensor, received_r3: Tensor, table_2r3: Tensor, num_local: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Like `take_local`: weights_B, source_B int64 (the gathered row of each), order_B int64, counts_e int64."""
    source_B, order_B, counts_e = local_assignments(ids_GK, received_r3, table_2r3, num_local)
    return weights_GK.reshape(-1).index_select(0, order_B), source_B, order_B, counts_e


@sort_gathered.register_fake
def _(weights_GK: Tensor, ids_GK: Tensor, received_r3: Tensor, table_2r3: Tensor, num_local: int) -> _Sorted:
    num_ranks = received_r3.shape[0]
    size = sizes.size(lambda load: load.computed(ids_GK.numel(), num_ranks * num_local, num_ranks))
    return _empty(ids_GK, weights_GK, size, num_local)


def _empty(ids: Tensor, weights: Tensor, num_rows: int | torch.SymInt, num_experts: int) -> _Sorted:
    index = ids.new_empty(num_rows, dtype=torch.int64)
    return weights.new_empty(num_rows), index, torch.empty_like(index), index.new_empty(num_experts)


def _setup(index_of_weights: int) -> Any:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: _Sorted) -> None:
        ctx.save_for_backward(output[2])
        ctx.weights_shape, ctx.num_inputs = inputs[index_of_weights].shape, len(inputs)
        ctx.index_of_weights = index_of_weights
        ctx.mark_non_differentiable(*output[1:])

    return setup


def _backward(ctx: Any, grad_R: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (order_R,) = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * ctx.num_inputs
    num_assignments = prod(ctx.weights_shape)  # Size.numel() would specialize a symbolic number of tokens
    grads[ctx.index_of_weights] = by_assignment(grad_R, order_R, num_assignments).view(ctx.weights_shape)
    return tuple(grads)


sort_assignments.register_autograd(_backward, setup_context=_setup(1))
sort_received.register_autograd(_backward, setup_context=_setup(0))
sort_gathered.register_autograd(_backward, setup_context=_setup(0))
