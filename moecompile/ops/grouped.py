"""Expert matmuls over rows in expert order.

Legend: R rows, D in dim, F out dim, E experts on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moecompile.ops.cpu.blocks import Block
from moecompile.ops.cpu.products import Products, suits_kernel

_ALIGNMENT_BYTES = 16  # of every row; F.grouped_mm requires it
_FEW_ROWS = {torch.float32: 128, torch.bfloat16: 24}  # average rows per expert, on a CPU; benchmarks/layer.py


@torch.library.custom_op("moecompile::grouped_mm", mutates_args=())
def grouped_mm(rows_RD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """rows of expert e times weight_EFD[e].T -> (R, F). Experts without rows cost nothing."""
    if _by_library(counts_E, weight_EFD.shape[1:], rows_RD, weight_EFD):
        return F.grouped_mm(rows_RD, weight_EFD.transpose(1, 2), offs=_offsets(counts_E))
    out_RF = rows_RD.new_empty(rows_RD.shape[0], weight_EFD.shape[1])
    Products(rows_RD.dtype).transposed(Block.whole(counts_E), rows_RD, weight_EFD, out_RF)
    return out_RF


@grouped_mm.register_fake
def _(rows_RD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    return rows_RD.new_empty(rows_RD.shape[0], weight_EFD.shape[1])


@torch.library.custom_op("moecompile::grouped_mm_input_grad", mutates_args=())
def grouped_mm_input_grad(grad_RF: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Gradient of `grouped_mm` for its rows, (R, D)."""
    if _by_library(counts_E, weight_EFD.shape[1:], grad_RF, weight_EFD):
        return F.grouped_mm(grad_RF, weight_EFD, offs=_offsets(counts_E))
    out_RD = grad_RF.new_empty(grad_RF.shape[0], weight_EFD.shape[2])
    Products(grad_RF.dtype).straight(Block.whole(counts_E), grad_RF, weight_EFD, out_RD)
    return out_RD


@grouped_mm_input_grad.register_fake
def _(grad_RF: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    return grad_RF.new_empty(grad_RF.shape[0], weight_EFD.shape[2])


@torch.library.custom_op("moecompile::grouped_mm_weight_grad", mutates_args=())
def grouped_mm_weight_grad(grad_RF: Tensor, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
    """Gradient of `grouped_mm` for its weight, (E, F, D); zero for experts without rows."""
    if _by_library(counts_E, (grad_RF.shape[1], rows_RD.shape[1]), grad_RF, rows_RD):
        return F.grouped_mm(grad_RF.t(), rows_RD, offs=_offsets(counts_E))
    out_EFD = grad_RF.new_empty(counts_E.shape[0], grad_RF.shape[1], rows_RD.shape[1])
    Products(grad_RF.dtype).gradient(Block.whole(counts_E), grad_RF, rows_RD, out_EFD)
    return out_EFD


@grouped_mm_weight_grad.register_fake
def _(grad_RF: Tensor, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
    return grad_RF.new_empty(counts_E.shape[0], grad_RF.shape[1], rows_RD.shape[1])


def _grouped_mm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows_RD, weight_EFD, counts_E = ctx.saved_tensors
    grad_RF = grad_RF.contiguous()
    grad_rows = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_rows = torch.ops.moecompile.grouped_mm_input_grad(grad_RF, weight_EFD, counts_E)
    if ctx.needs_input_grad[1]:
        grad_weight = torch.ops.moecompile.grouped_mm_weight_grad(grad_RF, rows_RD, counts_E)
    return grad_rows, grad_weight, None


grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_grouped_mm_setup)


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
    """Sum of each expert's rows, (E, F): the gradient of `expert_bias`."""
    expert_R = torch.arange(counts_E.numel(), device=counts_E.device).repeat_interleave(
        counts_E, output_size=rows_RF.shape[0]
    )
    return rows_RF.new_zeros(counts_E.numel(), rows_RF.shape[1]).index_add_(0, expert_R, rows_RF)


@sum_experts.register_fake
def _(rows_RF: Tensor, counts_E: Tensor) -> Tensor:
    return rows_RF.new_empty(counts_E.shape[0], rows_RF.shape[1])


def at_once(like: Tensor, num_rows: int, num_experts: int, *widths: int) -> bool:
    """Whether each product computes all experts at once instead of block by block, for rows of the type of `like`.

    On a GPU one kernel computes all experts without reading the counts on the host. On a CPU fewer calls are faster if
    experts have few rows; with more rows, intermediate results should stay in the cache.
    """
    if any(width * like.element_size() % _ALIGNMENT_BYTES for width in widths):
        return False
    if like.is_cuda:
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
