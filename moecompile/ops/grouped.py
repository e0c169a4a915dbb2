"""Expert matmuls over rows in expert order.

A weight is a list of one or two stacks: of the rank's own experts, and of those that it borrows (passes/lend.py). Rows
are then in the order of slots, those of own experts first. On a CPU each stack has a product of its own, so that no
weight is copied and nothing changes if nothing is borrowed. On a GPU the counts stay on the device, so both stacks are
put side by side and multiplied at once.

Legend: R rows, D in dim, F out dim, E experts of a stack, S slots: as many counts as experts, or more, if some slots
for borrowed experts are empty; these come last, and their counts are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moecompile.ops import sizes
from moecompile.ops.collect import collected_by
from moecompile.ops.cpu.blocks import Block, make_blocks, pieces, scratch, starts_of
from moecompile.ops.cpu.products import Products, suits_kernel
from moecompile.ops.layout import sum_by

_ALIGNMENT_BYTES = 16  # of every row; F.grouped_mm requires it
_FEW_ROWS = {torch.float32: 128, torch.bfloat16: 24}  # average rows per expert, on a CPU; benchmarks/layer.py


@torch.library.custom_op("moecompile::grouped_mm", mutates_args=())
def grouped_mm(
    rows_RD: Tensor, weights_EFD: list[Tensor], counts_S: Tensor, grad_token: Tensor | None, index: int
) -> Tensor:
    """rows of expert e times its weight[e].T -> (R, F). Experts without rows cost nothing.

    Args:
        grad_token: of `collect_gradients`, which then computes the gradient of its weight number `index`; the weight
            here is one stack, detached.
    """
    return _by_stack(_product, rows_RD, weights_EFD, counts_S)


@grouped_mm.register_fake
def _(rows_RD: Tensor, weights_EFD: list[Tensor], counts_S: Tensor, grad_token: Tensor | None, index: int) -> Tensor:
    return rows_RD.new_empty(rows_RD.shape[0], weights_EFD[0].shape[1])


def _product(rows_RD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    if _by_library(counts_E, weight_EFD.shape[1:], rows_RD, weight_EFD):
        return F.grouped_mm(rows_RD, weight_EFD.transpose(1, 2), offs=_offsets(counts_E))
    out_RF = rows_RD.new_empty(rows_RD.shape[0], weight_EFD.shape[1])
    Products(rows_RD).transposed(Block.whole(counts_E), rows_RD, weight_EFD, out_RF)
    return out_RF


@torch.library.custom_op("moecompile::grouped_mm_input_grad", mutates_args=())
def grouped_mm_input_grad(grad_RF: Tensor, weights_EFD: list[Tensor], counts_S: Tensor) -> Tensor:
    """Gradient of `grouped_mm` for its rows, (R, D)."""
    return _by_stack(_input_grad, grad_RF, weights_EFD, counts_S)


@grouped_mm_input_grad.register_fake
def _(grad_RF: Tensor, weights_EFD: list[Tensor], counts_S: Tensor) -> Tensor:
    return grad_RF.new_empty(grad_RF.shape[0], weights_EFD[0].shape[2])


def _input_grad(grad_RF: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    if _by_library(counts_E, weight_EFD.shape[1:], grad_RF, weight_EFD):
        return F.grouped_mm(grad_RF, weight_EFD, offs=_offsets(counts_E))
    out_RD = grad_RF.new_empty(grad_RF.shape[0], weight_EFD.shape[2])
    Products(grad_RF).straight(Block.whole(counts_E), grad_RF, weight_EFD, out_RD)
    return out_RD


@torch.library.custom_op("moecompile::grouped_mm_weight_grad", mutates_args=())
def grouped_mm_weight_grad(
    grad_RF: Tensor, rows_RD: Tensor, weights_EFD: list[Tensor], counts_S: Tensor
) -> list[Tensor]:
    """Gradients of `grouped_mm` for its weights, (E, F, D) each; zero for experts without rows."""
    if len(weights_EFD) == 1:
        return [weight_grad(grad_RF, rows_RD, counts_S)]
    own, borrowed = (weight.shape[0] for weight in weights_EFD)
    if grad_RF.device.type != "cpu":
        both = weight_grad(grad_RF, rows_RD, counts_S[: own + borrowed])
        return [both[:own].clone(), both[own:].clone()]
    rows = int(counts_S[:own].sum())
    first = weight_grad(grad_RF[:rows], rows_RD[:rows], counts_S[:own])
    if rows == grad_RF.shape[0]:
        return [first, torch.zeros_like(weights_EFD[1])]
    return [first, weight_grad(grad_RF[rows:], rows_RD[rows:], counts_S[own : own + borrowed])]


@grouped_mm_weight_grad.register_fake
def _(grad_RF: Tensor, rows_RD: Tensor, weights_EFD: list[Tensor], counts_S: Tensor) -> list[Tensor]:
    return [weight.new_empty(weight.shape) for weight in weights_EFD]


def weight_grad(grad_RF: Tensor, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
    """The gradient of one stack, (E, F, D)."""
    if _by_library(counts_E, (grad_RF.shape[1], rows_RD.shape[1]), grad_RF, rows_RD):
        return F.grouped_mm(grad_RF.t(), rows_RD, offs=_offsets(counts_E))
    out_EFD = grad_RF.new_empty(counts_E.shape[0], grad_RF.shape[1], rows_RD.shape[1])
    Products(grad_RF).gradient(Block.whole(counts_E), grad_RF, rows_RD, out_EFD)
    return out_EFD


@torch.library.custom_op("moecompile::grouped_mm_weight_grads", mutates_args=())
def grouped_mm_weight_grads(grads_RF: list[Tensor], rows_RD: list[Tensor], counts_E: list[Tensor]) -> Tensor:
    """The sum of `grouped_mm_weight_grad` over chunks, one product per expert."""
    if len(grads_RF) == 1:
        return weight_grad(grads_RF[0], rows_RD[0], counts_E[0])
    grad, rows, total_E = grads_RF[0], rows_RD[0], torch.stack(counts_E).sum(0)
    numbers, widths = [each.shape[0] for each in rows_RD], (grad.shape[1], rows.shape[1])
    if grad.device.type != "cpu" or at_once(grad, sum(numbers), total_E.shape[0], *widths):  # without the counts
        order_R = by_expert(counts_E, numbers)
        grad_RF, row_RD = (torch.cat(parts).index_select(0, order_R) for parts in (grads_RF, rows_RD))
        return weight_grad(grad_RF, row_RD, total_E)
    counts, out_EFD = [each.tolist() for each in counts_E], grad.new_empty(total_E.shape[0], *widths)
    starts = [starts_of(each, size) for each, size in zip(counts, numbers, strict=True)]
    blocks, _ = make_blocks(total_E, rows, widths[0], pad=False)
    products, of_grad, of_rows = Products(grad), *(scratch(blocks, grad, width) for width in widths)
    for block in blocks:
        grad_MF, rows_MD = of_grad(block), of_rows(block)
        for chunk, part, place in pieces(block, counts, starts)[0]:
            grad_MF[place].copy_(grads_RF[chunk][part])
            rows_MD[place].copy_(rows_RD[chunk][part])
        products.gradient(block, grad_MF, rows_MD, out_EFD)
    return out_EFD


@grouped_mm_weight_grads.register_fake
def _(grads_RF: list[Tensor], rows_RD: list[Tensor], counts_E: list[Tensor]) -> Tensor:
    return grads_RF[0].new_empty(counts_E[0].shape[0], grads_RF[0].shape[1], rows_RD[0].shape[1])


def _grouped_mm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows_RD, weights_EFD, counts_S, grad_token, ctx.index = inputs
    ctx.save_for_backward(rows_RD, counts_S, *weights_EFD)
    ctx.collected = collected_by(grad_token)


def _grouped_mm_backward(ctx: Any, grad_RF: Tensor) -> tuple[Any, ...]:
    rows_RD, counts_S, *weights = ctx.saved_tensors
    grad_RF = grad_RF.contiguous()
    grad_rows = grad_token = None
    grads: list[Tensor | None] = [None] * len(weights)
    if ctx.needs_input_grad[0]:
        grad_rows = torch.ops.moecompile.grouped_mm_input_grad(grad_RF, weights, counts_S)
    if any(ctx.needs_input_grad[1]):
        grads = torch.ops.moecompile.grouped_mm_weight_grad(grad_RF, rows_RD, weights, counts_S)
    if ctx.collected is not None:
        grad_token = ctx.collected.leave(ctx.index, grad_RF, rows_RD, counts_S)
    return grad_rows, grads, None, grad_token, None


grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_grouped_mm_setup)


def _by_stack(
    product: Callable[[Tensor, Tensor, Tensor], Tensor], rows: Tensor, stacks: Sequence[Tensor], counts_S: Tensor
) -> Tensor:
    """A product of rows in the order of slots with each stack of weights."""
    if len(stacks) == 1:
        return product(rows, stacks[0], counts_S)
    own, borrowed = stacks
    num_own, num_all = own.shape[0], own.shape[0] + borrowed.shape[0]
    if rows.device.type != "cpu":
        return product(rows, torch.cat((own, borrowed)), counts_S[:num_all])
    num_rows = int(counts_S[:num_own].sum())
    out = product(rows[:num_rows], own, counts_S[:num_own])
    if num_rows == rows.shape[0]:
        return out
    return torch.cat((out, product(rows[num_rows:], borrowed, counts_S[num_own:num_all])))


@torch.library.custom_op("moecompile::expert_bias", mutates_args=())
def expert_bias(bias_EF: Tensor, counts_E: Tensor, rows_RD: Tensor) -> Tensor:
    """Each row's expert bias, (R, F); `rows_RD` only gives the number of rows."""
    return bias_EF.repeat_interleave(counts_E, dim=0, output_size=rows_RD.shape[0])


@expert_bias.register_fake
def _(bias_EF: Tensor, counts_E: Tensor, rows_RD: Tensor) -> Tensor:
    return bias_EF.new_empty(rows_RD.shape[0], bias_EF.shape[1])


def _expert_bias_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _expert_bias_backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, None, None]:
    (counts_E,) = ctx.saved_tensors
    return torch.ops.moecompile.sum_experts(grad_RF, counts_E), None, None


expert_bias.register_autograd(_expert_bias_backward, setup_context=_expert_bias_setup)


@torch.library.custom_op("moecompile::sum_experts", mutates_args=())
def sum_experts(rows_RF: Tensor, counts_E: Tensor) -> Tensor:
    """Sum of each expert's rows, (E, F): the gradient of `expert_bias`. In at least fp32, and rounded once."""
    expert_R = torch.arange(counts_E.numel(), device=counts_E.device).repeat_interleave(
        counts_E, output_size=rows_RF.shape[0]
    )
    return sum_by(rows_RF, expert_R, counts_E.numel())


@sum_experts.register_fake
def _(rows_RF: Tensor, counts_E: Tensor) -> Tensor:
    return rows_RF.new_empty(counts_E.shape[0], rows_RF.shape[1])


def by_expert(counts_E: list[Tensor], num_rows: list[int]) -> Tensor:
    """Positions of all chunks' rows, one chunk after the other, in the order of experts: (R,) int64."""
    experts = [
        torch.arange(counts.shape[0], device=counts.device).repeat_interleave(counts, output_size=size)
        for counts, size in zip(counts_E, num_rows, strict=True)
    ]
    return torch.cat(experts).argsort(stable=True)


def at_once(like: Tensor, num_rows: int, num_experts: int, *widths: int) -> bool:
    """Whether each product computes all experts at once instead of block by block, for rows of the type of `like`.

    On a GPU one kernel computes all experts without reading the counts on the host. On a CPU fewer calls are faster if
    experts have few rows; with more rows, intermediate results should stay in the cache.
    """
    if any(width * like.element_size() % _ALIGNMENT_BYTES for width in widths):
        return False
    if like.is_cuda or sizes.on_gpu():
        return like.dtype == torch.bfloat16
    return num_rows < _FEW_ROWS.get(like.dtype, 0) * num_experts


def _by_library(counts_E: Tensor, widths: tuple[int, ...], rows: Tensor, other: Tensor) -> bool:
    """Whether `F.grouped_mm` supports such factors and our kernel is not faster. On a CPU it is a plain loop, with less
    overhead per call than ours."""
    num_rows, num_experts = rows.shape[0], counts_E.shape[0]
    once = at_once(rows, num_rows, num_experts, *widths)
    return once and not suits_kernel(num_rows, num_experts, widths, rows, other)


def _offsets(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0).to(torch.int32)
