"""Experts of a rank that may borrow some: `grouped_mm` and `expert_ffn` with two sets of weights.

Rows are in the order of slots, those of the rank's own experts first. On a CPU, rows of borrowed experts are computed
by a second call, so that no weight is copied and nothing changes if nothing is borrowed. On a GPU the counts stay on
the device, so both sets are put side by side and computed by one call.

Legend: R rows in the order of slots, V rows of the input, D in dim, F out dim or width, e own experts, n borrowed ones;
n = S - e at most: of S counts, those of slots that are not in use come last and are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

kernels = torch.ops.moecompile


@torch.library.custom_op("moecompile::grouped_mm_slots", mutates_args=())
def grouped_mm_slots(rows_RD: Tensor, own_eFD: Tensor, borrowed_nFD: Tensor, counts_S: Tensor) -> Tensor:
    """`grouped_mm` with both sets of weights, (R, F)."""
    return _apart(kernels.grouped_mm, rows_RD, own_eFD, borrowed_nFD, counts_S)


@grouped_mm_slots.register_fake
def _(rows_RD: Tensor, own_eFD: Tensor, borrowed_nFD: Tensor, counts_S: Tensor) -> Tensor:
    return rows_RD.new_empty(rows_RD.shape[0], own_eFD.shape[1])


@torch.library.custom_op("moecompile::grouped_mm_slots_input_grad", mutates_args=())
def grouped_mm_slots_input_grad(grad_RF: Tensor, own_eFD: Tensor, borrowed_nFD: Tensor, counts_S: Tensor) -> Tensor:
    """Gradient of `grouped_mm_slots` for its rows, (R, D)."""
    return _apart(kernels.grouped_mm_input_grad, grad_RF, own_eFD, borrowed_nFD, counts_S)


@grouped_mm_slots_input_grad.register_fake
def _(grad_RF: Tensor, own_eFD: Tensor, borrowed_nFD: Tensor, counts_S: Tensor) -> Tensor:
    return grad_RF.new_empty(grad_RF.shape[0], own_eFD.shape[2])


@torch.library.custom_op("moecompile::grouped_mm_slots_weight_grad", mutates_args=())
def grouped_mm_slots_weight_grad(
    grad_RF: Tensor, rows_RD: Tensor, own_eFD: Tensor, borrowed_nFD: Tensor, counts_S: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `grouped_mm_slots` for both sets of weights."""
    num_own, num_all = own_eFD.shape[0], own_eFD.shape[0] + borrowed_nFD.shape[0]
    if _on_device(grad_RF):
        grad = kernels.grouped_mm_weight_grad(grad_RF, rows_RD, counts_S[:num_all])
        return grad[:num_own].clone(), grad[num_own:].clone()
    rows = int(counts_S[:num_own].sum())
    own = kernels.grouped_mm_weight_grad(grad_RF[:rows], rows_RD[:rows], counts_S[:num_own])
    if rows == grad_RF.shape[0]:
        return own, borrowed_nFD.new_zeros(borrowed_nFD.shape)
    return own, kernels.grouped_mm_weight_grad(grad_RF[rows:], rows_RD[rows:], counts_S[num_own:num_all])


@grouped_mm_slots_weight_grad.register_fake
def _(
    grad_RF: Tensor, rows_RD: Tensor, own_eFD: Tensor, borrowed_nFD: Tensor, counts_S: Tensor
) -> tuple[Tensor, Tensor]:
    return own_eFD.new_empty(own_eFD.shape), borrowed_nFD.new_empty(borrowed_nFD.shape)


def _apart(product: Callable[..., Tensor], rows: Tensor, own: Tensor, borrowed: Tensor, counts_S: Tensor) -> Tensor:
    """A product of rows in the order of slots."""
    num_own, num_all = own.shape[0], own.shape[0] + borrowed.shape[0]
    if _on_device(rows):
        return product(rows, torch.cat((own, borrowed)), counts_S[:num_all])
    num_rows = int(counts_S[:num_own].sum())
    out = product(rows[:num_rows], own, counts_S[:num_own])
    if num_rows == rows.shape[0]:
        return out
    return torch.cat((out, product(rows[num_rows:], borrowed, counts_S[num_own:num_all])))


def _on_device(rows: Tensor) -> bool:
    return rows.device.type != "cpu"


def _grouped_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor | None, ...]:
    rows_RD, own, borrowed, counts_S = ctx.saved_tensors
    grad_RF = grad_RF.contiguous()
    grad_rows = grad_own = grad_borrowed = None
    if ctx.needs_input_grad[0]:
        grad_rows = kernels.grouped_mm_slots_input_grad(grad_RF, own, borrowed, counts_S)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_own, grad_borrowed = kernels.grouped_mm_slots_weight_grad(grad_RF, rows_RD, own, borrowed, counts_S)
    return grad_rows, grad_own, grad_borrowed, None


grouped_mm_slots.register_autograd(_grouped_backward, setup_context=_grouped_setup)


_Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("moecompile::expert_ffn_slots", mutates_args=())
def expert_ffn_slots(
    x_VD: Tensor, source_R: Tensor, weights_R: Tensor, counts_S: Tensor, gate_up_eGD: Tensor, down_eDF: Tensor,
    gate_up_nGD: Tensor, down_nDF: Tensor,
) -> _Saved:  # fmt: skip
    """`expert_ffn` with both sets of weights.

    Returns:
        y_VD, and what backward needs of the rows of own experts, then of borrowed ones (none on a GPU).
    """
    if _on_device(x_VD):
        weights = torch.cat((gate_up_eGD, gate_up_nGD)), torch.cat((down_eDF, down_nDF))
        out = kernels.expert_ffn(x_VD, source_R, weights_R, counts_S[: weights[0].shape[0]], *weights)
        return (*out, *(kept[:0].clone() for kept in out[1:]))
    num_own = gate_up_eGD.shape[0]
    rows = int(counts_S[:num_own].sum())
    y_VD, *own = kernels.expert_ffn(x_VD, source_R[:rows], weights_R[:rows], counts_S[:num_own], gate_up_eGD, down_eDF)
    if rows == source_R.shape[0]:
        return (y_VD, *own, *(kept.new_empty(0, *kept.shape[1:]) for kept in own))
    more_VD, *borrowed = kernels.expert_ffn(
        x_VD, source_R[rows:], weights_R[rows:], _of_borrowed(counts_S, gate_up_eGD, gate_up_nGD), gate_up_nGD, down_nDF
    )
    return (y_VD.add_(more_VD), *own, *borrowed)


@expert_ffn_slots.register_fake
def _(
    x_VD: Tensor, source_R: Tensor, weights_R: Tensor, counts_S: Tensor, gate_up_eGD: Tensor, down_eDF: Tensor,
    gate_up_nGD: Tensor, down_nDF: Tensor,
) -> _Saved:  # fmt: skip
    def kept() -> tuple[Tensor, Tensor, Tensor]:
        size = torch.library.get_ctx().new_dynamic_size()
        gate_up_PG = x_VD.new_empty(size, gate_up_eGD.shape[1])
        return gate_up_PG, source_R.new_empty(size, dtype=torch.int32), weights_R.new_empty(size)

    return (torch.empty_like(x_VD), *kept(), *kept())


@torch.library.custom_op("moecompile::expert_ffn_slots_backward", mutates_args=())
def expert_ffn_slots_backward(
    grad_VD: Tensor, x_VD: Tensor, source_R: Tensor, counts_S: Tensor, gate_up_eGD: Tensor, down_eDF: Tensor,
    gate_up_nGD: Tensor, down_nDF: Tensor, own: list[Tensor], borrowed: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `expert_ffn_slots` for x_VD, weights_R and the four weights."""
    num_own = gate_up_eGD.shape[0]
    if _on_device(x_VD):
        weights = torch.cat((gate_up_eGD, gate_up_nGD)), torch.cat((down_eDF, down_nDF))
        x, w, gate_up, down = kernels.expert_ffn_backward(
            grad_VD, x_VD, source_R, counts_S[: weights[0].shape[0]], *weights, *own
        )
        parts = (grad[part].clone() for part in (slice(num_own), slice(num_own, None)) for grad in (gate_up, down))
        return (x, w, *parts)
    rows = int(counts_S[:num_own].sum())
    x, w, gate_up, down = kernels.expert_ffn_backward(
        grad_VD, x_VD, source_R[:rows], counts_S[:num_own], gate_up_eGD, down_eDF, *own
    )
    if rows == source_R.shape[0]:
        return x, w, gate_up, down, torch.zeros_like(gate_up_nGD), torch.zeros_like(down_nDF)
    more, w_more, *grads = kernels.expert_ffn_backward(
        grad_VD,
        x_VD,
        source_R[rows:],
        _of_borrowed(counts_S, gate_up_eGD, gate_up_nGD),
        gate_up_nGD,
        down_nDF,
        *borrowed,
    )
    return (x.add_(more), torch.cat((w, w_more)), gate_up, down, *grads)


@expert_ffn_slots_backward.register_fake
def _(
    grad_VD: Tensor, x_VD: Tensor, source_R: Tensor, counts_S: Tensor, gate_up_eGD: Tensor, down_eDF: Tensor,
    gate_up_nGD: Tensor, down_nDF: Tensor, own: list[Tensor], borrowed: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(x_VD), own[2].new_empty(source_R.shape[0]), torch.empty_like(gate_up_eGD),
        torch.empty_like(down_eDF), torch.empty_like(gate_up_nGD), torch.empty_like(down_nDF),
    )  # fmt: skip


def _of_borrowed(counts_S: Tensor, own: Tensor, borrowed: Tensor) -> Tensor:
    return counts_S[own.shape[0] : own.shape[0] + borrowed.shape[0]]


def _ffn_setup(ctx: Any, inputs: tuple[Any, ...], output: _Saved) -> None:
    x_VD, source_R, _, *rest = inputs
    ctx.save_for_backward(x_VD, source_R, *rest, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _ffn_backward(ctx: Any, grad_VD: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_VD is None:
        return (None,) * 8
    saved = ctx.saved_tensors
    inputs, own, borrowed = saved[:7], saved[7:10], saved[10:]
    grads = kernels.expert_ffn_slots_backward(grad_VD.contiguous(), *inputs, list(own), list(borrowed))
    places = (0, 2, 4, 5, 6, 7)
    needed = {i: grad for i, grad in zip(places, grads, strict=True) if ctx.needs_input_grad[i]}
    return tuple(needed.get(i) for i in range(8))


expert_ffn_slots.register_autograd(_ffn_backward, setup_context=_ffn_setup)
