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

from moecompile.ops.collect import Collected, collected_by
from moecompile.ops.cpu.blocks import make_blocks, padded, scratch, summed
from moecompile.ops.cpu.products import Products, is_padded, may_be_padded
from moecompile.ops.grouped import at_once, grouped_mm
from moecompile.ops.swiglu import activate


@torch.library.custom_op("moecompile::expert_ffn", mutates_args=())
def expert_ffn(
    x_VD: Tensor, source_R: Tensor, weights_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor,
    token: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum above.

    Args:
        source_R: int64, input row of each row in expert order. weights_R: routing weights, fp32 or wider.
        counts_E: int64, rows of each expert. token: of `collect_gradients`, which then computes the weight gradients;
            the weights are detached.

    Returns:
        y_VD, and what backward needs: gate_up_PG before the activation, source_P int32, weights_P.
    """
    if at_once(x_VD, source_R.shape[0], *gate_up_EGD.shape, down_EDF.shape[2]):
        return _at_once(x_VD, source_R, weights_R, counts_E, gate_up_EGD, down_EDF)
    products = Products(x_VD)
    blocks, padded_E = make_blocks(counts_E, x_VD, gate_up_EGD, pad=is_padded(x_VD))
    source_P, weights_P = padded(source_R, weights_R, counts_E, padded_E)
    gate_up_PG = x_VD.new_empty(source_P.shape[0], gate_up_EGD.shape[1])
    out_PD = x_VD.new_empty(source_P.shape[0], x_VD.shape[1])
    rows, hidden = (scratch(blocks, x_VD, width) for width in (x_VD.shape[1], down_EDF.shape[2]))
    for block in blocks:
        x_MD, h_MF, gate_up_MG = rows(block), hidden(block), block.of(gate_up_PG)
        torch.index_select(x_VD, 0, block.of(source_P), out=x_MD)
        products.transposed(block, x_MD, gate_up_EGD, gate_up_MG)
        activate(gate_up_MG, block.of(weights_P), h_MF)
        products.transposed(block, h_MF, down_EDF, block.of(out_PD))
    return summed(out_PD, source_R, counts_E, padded_E, x_VD), gate_up_PG, source_P, weights_P


@expert_ffn.register_fake
def _(
    x_VD: Tensor, source_R: Tensor, weights_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor,
    token: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    size = torch.library.get_ctx().new_dynamic_size() if may_be_padded(x_VD) else source_R.shape[0]
    return (
        torch.empty_like(x_VD),
        x_VD.new_empty(size, gate_up_EGD.shape[1]),
        source_R.new_empty(size, dtype=torch.int32),
        weights_R.new_empty(size),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_VD, source_R, _, counts_E, gate_up_EGD, down_EDF, token = inputs
    ctx.save_for_backward(x_VD, source_R, counts_E, gate_up_EGD, down_EDF, *output[1:])
    ctx.collected = collected_by(token)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_VD: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_VD is None:
        return (None,) * 7
    grad_VD, saved, collected = grad_VD.contiguous(), ctx.saved_tensors, ctx.collected
    need_x, need_weights, need_gate_up, need_down = (ctx.needs_input_grad[i] for i in (0, 2, 4, 5))
    gate_up = down = token = None
    if need_gate_up or need_down:
        x, weights, gate_up, down = torch.ops.moecompile.expert_ffn_backward(grad_VD, *saved)
    else:
        x, weights, grad_hidden_PF = torch.ops.moecompile.expert_ffn_input_grad(grad_VD, *saved)
        token = _leave(collected, grad_VD, grad_hidden_PF, saved) if collected else None
    return (
        x if need_x else None, None, weights if need_weights else None, None, gate_up if need_gate_up else None,
        down if need_down else None, token,
    )  # fmt: skip


def _leave(collected: Collected, grad_VD: Tensor, grad_hidden_PF: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
    """Leaves what the weight gradients need. Returns the gradient of the token."""
    x_VD, _, counts_E, _, _, gate_up_PG, source_P, weights_P = saved
    return collected.leave("expert_ffn", grad_VD, x_VD, grad_hidden_PF, gate_up_PG, source_P, weights_P, counts_E)


expert_ffn.register_autograd(_backward, setup_context=_setup)


# -- all experts at once ----------------------------------------------------------------------------------------------


def _at_once(
    x_VD: Tensor, source_R: Tensor, weights_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate_up_RG = grouped_mm(x_VD.index_select(0, source_R), gate_up_EGD, counts_E)
    hidden_RF = x_VD.new_empty(source_R.shape[0], down_EDF.shape[2])
    activate(gate_up_RG, weights_R, hidden_RF)
    out_VD = torch.ops.moecompile.sum_rows(grouped_mm(hidden_RF, down_EDF, counts_E), source_R, x_VD.shape[0])
    return out_VD, gate_up_RG, source_R.to(torch.int32), weights_R.clone()
