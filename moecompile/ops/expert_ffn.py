"""The gated experts of one rank in one op: gather, both projections, SwiGLU, routing weight, sum. It keeps only what
backward cannot recompute cheaply: the input, and the projections before the activation.

    y[v] = sum over rows r with source v of  weight_r * (silu(gate) * up) down_e^T,   (gate, up) = x[v] gate_up_e^T

Legend: V rows of the input, D model dim, R rows in expert order = (row of the input, expert) pairs, F expert width,
G = 2 F, E experts on this rank, P rows with padding.

NOTE on speed, on a CPU:
  1. The routing weight is applied to the hidden activation. So expert outputs need not be kept for the gradient of the
     router: it is a sum over F of values that backward has anyway.
  2. Experts are computed in blocks of a few, so that gathered rows and intermediate results fit in the cache; all work
     except the products is done once per block.
  3. bf16 rows of an expert are padded to one of few lengths, with rows of weight 0: oneDNN builds a kernel for every
     new length, which took up to 5 ms here, several times per layer and step.
  4. moecompile.ops.cpu.products decides how rows and weights are multiplied.
On a GPU grouped products compute all experts at once, and the counts stay on the device; so do they on a CPU if experts
have few rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moecompile.ops.cpu.blocks import make_blocks, padded, places, scratch, summed
from moecompile.ops.cpu.native import Kernels, kernels
from moecompile.ops.cpu.products import Products, faster_wide
from moecompile.ops.grouped import at_once, grouped_mm, grouped_mm_input_grad, grouped_mm_weight_grad


@torch.library.custom_op("moecompile::expert_ffn", mutates_args=())
def expert_ffn(
    x_VD: Tensor, source_R: Tensor, weights_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum above.

    Args:
        source_R: int64, input row of each row in expert order. weights_R: routing weights, fp32 or wider.
        counts_E: int64, rows of each expert.

    Returns:
        y_VD, and what backward needs: gate_up_PG before the activation, source_P int32, weights_P.
    """
    if at_once(x_VD, source_R.shape[0], *gate_up_EGD.shape, down_EDF.shape[2]):
        return _at_once(x_VD, source_R, weights_R, counts_E, gate_up_EGD, down_EDF)
    products = Products(x_VD.dtype)
    blocks, padded_E = make_blocks(counts_E, x_VD, gate_up_EGD, pad=_is_padded(x_VD))
    source_P, weights_P = padded(source_R, weights_R, counts_E, padded_E)
    gate_up_PG = x_VD.new_empty(source_P.shape[0], gate_up_EGD.shape[1])
    out_PD = x_VD.new_empty(source_P.shape[0], x_VD.shape[1])
    rows, hidden = (scratch(blocks, x_VD, width) for width in (x_VD.shape[1], down_EDF.shape[2]))
    for block in blocks:
        x_MD, h_MF, gate_up_MG = rows(block), hidden(block), block.of(gate_up_PG)
        torch.index_select(x_VD, 0, block.of(source_P), out=x_MD)
        products.transposed(block, x_MD, gate_up_EGD, gate_up_MG)
        _activate(gate_up_MG, block.of(weights_P), h_MF)
        products.transposed(block, h_MF, down_EDF, block.of(out_PD))
    return summed(out_PD, source_R, counts_E, padded_E, x_VD), gate_up_PG, source_P, weights_P


@expert_ffn.register_fake
def _(
    x_VD: Tensor, source_R: Tensor, weights_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size() if _may_be_padded(x_VD) else source_R.shape[0]
    return (
        torch.empty_like(x_VD),
        x_VD.new_empty(size, gate_up_EGD.shape[1]),
        source_R.new_empty(size, dtype=torch.int32),
        weights_R.new_empty(size),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_VD, source_R, _, counts_E, gate_up_EGD, down_EDF = inputs
    ctx.save_for_backward(x_VD, source_R, counts_E, gate_up_EGD, down_EDF, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_VD: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_VD is None:
        return (None,) * 6
    grads = torch.ops.moecompile.expert_ffn_backward(grad_VD.contiguous(), *ctx.saved_tensors)
    needed = (ctx.needs_input_grad[i] for i in (0, 2, 4, 5))
    x, weights, gate_up, down = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    return x, None, weights, None, gate_up, down


expert_ffn.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("moecompile::expert_ffn_backward", mutates_args=())
def expert_ffn_backward(
    grad_VD: Tensor, x_VD: Tensor, source_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor,
    gate_up_PG: Tensor, source_P: Tensor, weights_P: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `expert_ffn` for x_VD, weights_R, gate_up_EGD and down_EDF; zero for experts without rows."""
    if at_once(x_VD, source_R.shape[0], *gate_up_EGD.shape, down_EDF.shape[2]):
        return _backward_at_once(
            grad_VD, x_VD, source_R, counts_E, gate_up_EGD, down_EDF, gate_up_PG, source_P, weights_P
        )
    products = Products(x_VD.dtype)
    blocks, padded_E = make_blocks(counts_E, x_VD, gate_up_EGD, pad=_is_padded(x_VD))
    grad_gate_up, grad_down = torch.empty_like(gate_up_EGD), torch.empty_like(down_EDF)
    grad_PD, grad_weights_P = x_VD.new_empty(source_P.shape[0], x_VD.shape[1]), torch.empty_like(weights_P)
    width, model = down_EDF.shape[2], x_VD.shape[1]
    rows, grad_hidden, hidden, inner = (scratch(blocks, x_VD, n) for n in (model, width, width, 2 * width))
    for block in blocks:
        rows_MD, dh_MF, h_MF, inner_MG = (part(block) for part in (rows, grad_hidden, hidden, inner))
        torch.index_select(grad_VD, 0, block.of(source_P), out=rows_MD)
        products.straight(block, rows_MD, down_EDF, dh_MF)
        _activate_backward(block.of(gate_up_PG), block.of(weights_P), dh_MF, inner_MG, h_MF, block.of(grad_weights_P))
        products.gradient(block, rows_MD, h_MF, grad_down)
        products.straight(block, inner_MG, gate_up_EGD, block.of(grad_PD))
        torch.index_select(x_VD, 0, block.of(source_P), out=rows_MD)
        products.gradient(block, inner_MG, rows_MD, grad_gate_up)
    grad_weights = grad_weights_P
    if source_P.shape[0] > source_R.shape[0]:
        grad_weights = grad_weights_P.index_select(0, places(counts_E, padded_E, source_R.shape[0]))
    return summed(grad_PD, source_R, counts_E, padded_E, x_VD), grad_weights, grad_gate_up, grad_down


@expert_ffn_backward.register_fake
def _(
    grad_VD: Tensor, x_VD: Tensor, source_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor,
    gate_up_PG: Tensor, source_P: Tensor, weights_P: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(x_VD), weights_P.new_empty(source_R.shape[0]), torch.empty_like(gate_up_EGD),
        torch.empty_like(down_EDF),
    )  # fmt: skip


def _is_padded(x: Tensor) -> bool:
    return _may_be_padded(x) and not faster_wide()


def _may_be_padded(x: Tensor) -> bool:
    """Decides without timing the processor, which is impossible with fake tensors."""
    return x.dtype == torch.bfloat16 and not x.is_cuda


# -- activation ------------------------------------------------------------------------------------------------------

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def _kernels_for(gate_up_MG: Tensor, weights_M: Tensor) -> Kernels | None:
    supported = gate_up_MG.dtype in _SUFFIX and weights_M.dtype == torch.float32
    return kernels() if supported and gate_up_MG.device.type == "cpu" else None


def _activate(gate_up_MG: Tensor, weights_M: Tensor, hidden_MF: Tensor) -> None:
    """hidden = weight * silu(gate) * up, in place."""
    native = _kernels_for(gate_up_MG, weights_M)
    if native is not None:
        rows, width = hidden_MF.shape
        native(f"forward_{_SUFFIX[gate_up_MG.dtype]}", gate_up_MG, weights_M, hidden_MF, rows, width)
        return
    gate, up = _wide(gate_up_MG, weights_M).chunk(2, 1)
    hidden_MF.copy_((F.silu(gate) * up).mul_(weights_M.unsqueeze(1)))


def _activate_backward(
    gate_up_MG: Tensor, weights_M: Tensor, dh_MF: Tensor, grad_MG: Tensor, hidden_MF: Tensor, grad_weights_M: Tensor
) -> None:
    """Writes the gradients of `_activate` and recomputes the hidden activation, in place."""
    native = _kernels_for(gate_up_MG, weights_M)
    if native is not None:
        rows, width = hidden_MF.shape
        native(
            f"backward_{_SUFFIX[gate_up_MG.dtype]}", gate_up_MG, weights_M, dh_MF, grad_MG, hidden_MF, grad_weights_M,
            rows, width,
        )  # fmt: skip
        return
    gate, up = _wide(gate_up_MG, weights_M).chunk(2, 1)
    sigmoid, grad = gate.sigmoid(), _wide(dh_MF, weights_M)
    silu = gate * sigmoid
    hidden = silu * up
    grad_weights_M.copy_((hidden * grad).sum(1))
    hidden_MF.copy_(hidden.mul_(weights_M.unsqueeze(1)))
    grad = grad * weights_M.unsqueeze(1)
    width = hidden_MF.shape[1]
    grad_MG[:, width:].copy_(grad * silu)
    grad_MG[:, :width].copy_(grad.mul_(up).mul_(sigmoid + silu * (1 - sigmoid)))


def _wide(x: Tensor, like: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, like.dtype))


# -- all experts at once ----------------------------------------------------------------------------------------------


def _at_once(
    x_VD: Tensor, source_R: Tensor, weights_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate_up_RG = grouped_mm(x_VD.index_select(0, source_R), gate_up_EGD, counts_E)
    hidden_RF = x_VD.new_empty(source_R.shape[0], down_EDF.shape[2])
    _activate(gate_up_RG, weights_R, hidden_RF)
    out_VD = torch.ops.moecompile.sum_rows(grouped_mm(hidden_RF, down_EDF, counts_E), source_R, x_VD.shape[0])
    return out_VD, gate_up_RG, source_R.to(torch.int32), weights_R.clone()


def _backward_at_once(
    grad_VD: Tensor, x_VD: Tensor, source_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor,
    gate_up_RG: Tensor, source_P: Tensor, weights_R: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_RD = grad_VD.index_select(0, source_P)
    grad_hidden_RF = grouped_mm_input_grad(grad_RD, down_EDF, counts_E)
    grad_RG, hidden_RF = torch.empty_like(gate_up_RG), torch.empty_like(grad_hidden_RF)
    grad_weights_R = torch.empty_like(weights_R)
    _activate_backward(gate_up_RG, weights_R, grad_hidden_RF, grad_RG, hidden_RF, grad_weights_R)
    grad_x = torch.ops.moecompile.sum_rows(
        grouped_mm_input_grad(grad_RG, gate_up_EGD, counts_E), source_R, x_VD.shape[0]
    )
    grad_gate_up = grouped_mm_weight_grad(grad_RG, x_VD.index_select(0, source_P), counts_E)
    return grad_x, grad_weights_R, grad_gate_up, grouped_mm_weight_grad(grad_RD, hidden_RF, counts_E)
