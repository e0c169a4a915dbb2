"""Gradients of `expert_ffn`: all in one op, or those of the input and those of the weights in two.

In one, a block's rows and intermediate results are still in the cache for the weight gradients. In two, the gradient of
the input is there earlier, and the weight gradients of several calls (chunks of the tokens) are one product per expert
(moecompile.ops.collect). Between the two, the gradient of the hidden activation is kept, R x F; the rest is
gathered and computed again, which costs little beside the products.

Legend as in moecompile.ops.expert_ffn. Lists have one tensor per chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecompile.ops.cpu.blocks import longest, make_blocks, pieces, places, scratch, starts_of, summed
from moecompile.ops.cpu.products import Products, is_padded
from moecompile.ops.grouped import at_once, by_expert, grouped_mm_input_grad, grouped_mm_weight_grad
from moecompile.ops.swiglu import activate_backward


@torch.library.custom_op("moecompile::expert_ffn_backward", mutates_args=())
def expert_ffn_backward(
    grad_VD: Tensor, x_VD: Tensor, source_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor,
    gate_up_PG: Tensor, source_P: Tensor, weights_P: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `expert_ffn` for x_VD, weights_R, gate_up_EGD and down_EDF; zero for experts without rows."""
    saved = (grad_VD, x_VD, source_R, counts_E, gate_up_EGD, down_EDF, gate_up_PG, source_P, weights_P)
    if at_once(x_VD, source_R.shape[0], *gate_up_EGD.shape, down_EDF.shape[2]):
        grad_x, grad_weights, grad_RD, grad_RG, hidden_RF, _ = _inputs_at_once(*saved)
        grad_gate_up = grouped_mm_weight_grad(grad_RG, x_VD.index_select(0, source_P), counts_E)
        return grad_x, grad_weights, grad_gate_up, grouped_mm_weight_grad(grad_RD, hidden_RF, counts_E)
    grads = torch.empty_like(gate_up_EGD), torch.empty_like(down_EDF)
    return *_by_blocks(*saved, None, grads), *grads


@expert_ffn_backward.register_fake
def _(
    grad_VD: Tensor, x_VD: Tensor, source_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor,
    gate_up_PG: Tensor, source_P: Tensor, weights_P: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(x_VD), weights_P.new_empty(source_R.shape[0]), torch.empty_like(gate_up_EGD),
        torch.empty_like(down_EDF),
    )  # fmt: skip


@torch.library.custom_op("moecompile::expert_ffn_input_grad", mutates_args=())
def expert_ffn_input_grad(
    grad_VD: Tensor, x_VD: Tensor, source_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor,
    gate_up_PG: Tensor, source_P: Tensor, weights_P: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `expert_ffn` for x_VD and weights_R, and grad_hidden_PF, which `expert_ffn_weight_grad` needs."""
    saved = (grad_VD, x_VD, source_R, counts_E, gate_up_EGD, down_EDF, gate_up_PG, source_P, weights_P)
    if at_once(x_VD, source_R.shape[0], *gate_up_EGD.shape, down_EDF.shape[2]):
        grad_x, grad_weights, *_, grad_hidden_RF = _inputs_at_once(*saved)
        return grad_x, grad_weights, grad_hidden_RF
    grad_hidden_PF = x_VD.new_empty(source_P.shape[0], down_EDF.shape[2])
    return *_by_blocks(*saved, grad_hidden_PF, None), grad_hidden_PF


@expert_ffn_input_grad.register_fake
def _(
    grad_VD: Tensor, x_VD: Tensor, source_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor,
    gate_up_PG: Tensor, source_P: Tensor, weights_P: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    hidden = x_VD.new_empty(source_P.shape[0], down_EDF.shape[2])
    return torch.empty_like(x_VD), weights_P.new_empty(source_R.shape[0]), hidden


@torch.library.custom_op("moecompile::expert_ffn_weight_grad", mutates_args=())
def expert_ffn_weight_grad(
    grads_VD: list[Tensor], xs_VD: list[Tensor], grad_hiddens_PF: list[Tensor], gate_ups_PG: list[Tensor],
    sources_P: list[Tensor], weights_P: list[Tensor], counts_E: list[Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `expert_ffn` for gate_up_EGD and down_EDF, summed over chunks; zero for experts without rows."""
    x, (num_experts,) = xs_VD[0], counts_E[0].shape
    inner, width = gate_ups_PG[0].shape[1], grad_hiddens_PF[0].shape[1]
    num_rows = sum(source.shape[0] for source in sources_P)
    if at_once(x, num_rows, num_experts, inner, x.shape[1], width):
        return _weights_at_once(grads_VD, xs_VD, grad_hiddens_PF, gate_ups_PG, sources_P, weights_P, counts_E)
    products, counts = Products(x), [each.tolist() for each in counts_E]
    starts = [starts_of(each, source.shape[0]) for each, source in zip(counts, sources_P, strict=True)]
    blocks, _ = make_blocks(torch.stack(counts_E).sum(0), x, gate_ups_PG[0], pad=is_padded(x))
    grad_gate_up, grad_down = x.new_empty(num_experts, inner, x.shape[1]), x.new_empty(num_experts, x.shape[1], width)
    of_rows, of_hidden, of_inner = (scratch(blocks, x, size) for size in (x.shape[1], width, inner))
    unused = weights_P[0].new_empty(longest(blocks))
    for block in blocks:
        rows_MD, hidden_MF, inner_MG = of_rows(block), of_hidden(block), of_inner(block)
        found, padding = pieces(block, counts, starts)
        for place in padding:
            for buffer in (rows_MD, hidden_MF, inner_MG):
                buffer[place].zero_()
        for chunk, rows, place in found:
            torch.index_select(grads_VD[chunk], 0, sources_P[chunk][rows], out=rows_MD[place])
            activate_backward(
                gate_ups_PG[chunk][rows], weights_P[chunk][rows], grad_hiddens_PF[chunk][rows], inner_MG[place],
                hidden_MF[place], unused[place],
            )  # fmt: skip
        products.gradient(block, rows_MD, hidden_MF, grad_down)
        for chunk, rows, place in found:
            torch.index_select(xs_VD[chunk], 0, sources_P[chunk][rows], out=rows_MD[place])
        products.gradient(block, inner_MG, rows_MD, grad_gate_up)
    return grad_gate_up, grad_down


@expert_ffn_weight_grad.register_fake
def _(
    grads_VD: list[Tensor], xs_VD: list[Tensor], grad_hiddens_PF: list[Tensor], gate_ups_PG: list[Tensor],
    sources_P: list[Tensor], weights_P: list[Tensor], counts_E: list[Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, num_experts, hidden = xs_VD[0], counts_E[0].shape[0], grad_hiddens_PF[0].shape[1]
    model = x.shape[1]
    return x.new_empty(num_experts, gate_ups_PG[0].shape[1], model), x.new_empty(num_experts, model, hidden)


def _by_blocks(
    grad_VD: Tensor, x_VD: Tensor, source_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor,
    gate_up_PG: Tensor, source_P: Tensor, weights_P: Tensor, grad_hidden_PF: Tensor | None,
    grads: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients for x_VD and weights_R. Writes those of the hidden activation, or those of the weights."""
    products = Products(x_VD)
    blocks, padded_E = make_blocks(counts_E, x_VD, gate_up_EGD, pad=is_padded(x_VD))
    grad_PD, grad_weights_P = x_VD.new_empty(source_P.shape[0], x_VD.shape[1]), torch.empty_like(weights_P)
    width, model = down_EDF.shape[2], x_VD.shape[1]
    rows, grad_hidden, hidden, inner = (scratch(blocks, x_VD, n) for n in (model, width, width, 2 * width))
    for block in blocks:
        rows_MD, h_MF, inner_MG = (part(block) for part in (rows, hidden, inner))
        dh_MF = grad_hidden(block) if grad_hidden_PF is None else block.of(grad_hidden_PF)
        torch.index_select(grad_VD, 0, block.of(source_P), out=rows_MD)
        products.straight(block, rows_MD, down_EDF, dh_MF)
        activate_backward(block.of(gate_up_PG), block.of(weights_P), dh_MF, inner_MG, h_MF, block.of(grad_weights_P))
        if grads:
            products.gradient(block, rows_MD, h_MF, grads[1])
        products.straight(block, inner_MG, gate_up_EGD, block.of(grad_PD))
        if grads:
            torch.index_select(x_VD, 0, block.of(source_P), out=rows_MD)
            products.gradient(block, inner_MG, rows_MD, grads[0])
    grad_weights = grad_weights_P
    if source_P.shape[0] > source_R.shape[0]:
        grad_weights = grad_weights_P.index_select(0, places(counts_E, padded_E, source_R.shape[0]))
    return summed(grad_PD, source_R, counts_E, padded_E, x_VD), grad_weights


# -- all experts at once ----------------------------------------------------------------------------------------------


def _inputs_at_once(
    grad_VD: Tensor, x_VD: Tensor, source_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor,
    gate_up_RG: Tensor, source_P: Tensor, weights_R: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients for x_VD and weights_R, then grad_RD, and of `activate` grad_RG, hidden_RF and grad_hidden_RF."""
    grad_RD = grad_VD.index_select(0, source_P)
    grad_hidden_RF = grouped_mm_input_grad(grad_RD, down_EDF, counts_E)
    grad_RG, hidden_RF = torch.empty_like(gate_up_RG), torch.empty_like(grad_hidden_RF)
    grad_weights_R = torch.empty_like(weights_R)
    activate_backward(gate_up_RG, weights_R, grad_hidden_RF, grad_RG, hidden_RF, grad_weights_R)
    grad_x = torch.ops.moecompile.sum_rows(
        grouped_mm_input_grad(grad_RG, gate_up_EGD, counts_E), source_R, x_VD.shape[0]
    )
    return grad_x, grad_weights_R, grad_RD, grad_RG, hidden_RF, grad_hidden_RF


def _weights_at_once(
    grads_VD: list[Tensor], xs_VD: list[Tensor], grad_hiddens_RF: list[Tensor], gate_ups_RG: list[Tensor],
    sources_R: list[Tensor], weights_R: list[Tensor], counts_E: list[Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    order_R = by_expert(counts_E, [source.shape[0] for source in sources_R])
    source_R, past = list[Tensor](), 0
    for source, x_VD in zip(sources_R, xs_VD, strict=True):
        source_R.append(source + past)
        past += x_VD.shape[0]
    source = torch.cat(source_R).index_select(0, order_R)
    gate_up_RG, grad_hidden_RF, weights = (
        torch.cat(parts).index_select(0, order_R) for parts in (gate_ups_RG, grad_hiddens_RF, weights_R)
    )
    grad_RG, hidden_RF = torch.empty_like(gate_up_RG), torch.empty_like(grad_hidden_RF)
    activate_backward(gate_up_RG, weights, grad_hidden_RF, grad_RG, hidden_RF, torch.empty_like(weights))
    counts = torch.stack(counts_E).sum(0)
    grad_gate_up = grouped_mm_weight_grad(grad_RG, torch.cat(xs_VD).index_select(0, source), counts)
    return grad_gate_up, grouped_mm_weight_grad(torch.cat(grads_VD).index_select(0, source), hidden_RF, counts)
