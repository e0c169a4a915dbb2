"""The gated experts of one rank in one op: gather, both projections, SwiGLU, routing weight, sum. It keeps only what
backward cannot recompute cheaply: the input, and the projections before the activation.

    y[v] = sum over rows r with source v of  weight_r * (silu(gate) * up) down_e^T,   (gate, up) = x[v] gate_up_e^T

Legend: V rows of the input, D model dim, R rows in expert order = (row of the input, expert) pairs, F expert width,
G = 2 F, E experts of a stack, S slots (moecompile.ops.grouped has stacks and slots), P rows with padding.

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

NOTE on gradients: all are computed in one op, or those of the input and those of the weights in two. In one, a block's
rows and intermediate results are still in the cache for the weight gradients. In two, the gradient of the input is
there earlier, and the weight gradients of several calls (chunks of the tokens) are one product per expert
(moecompile.ops.collect). Between the two, the gradient of the hidden activation is kept, P x F; the rest is gathered
and computed again, which costs little beside the products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moecompile.ops import sizes
from moecompile.ops.collect import collected_by
from moecompile.ops.cpu.blocks import longest, make_blocks, padded, pieces, places, scratch, starts_of, summed
from moecompile.ops.cpu.native import Kernels, kernels
from moecompile.ops.cpu.products import Products, is_padded, may_be_padded
from moecompile.ops.grouped import (
    at_once,
    by_expert,
    grouped_mm,
    grouped_mm_input_grad,
    grouped_mm_weight_grad,
    weight_grad,
)
from moecompile.torch_private import has_triton

# -- SwiGLU with a routing weight, in place: hidden = weight * silu(gate) * up, and its gradients -------------------
#
# Legend: M rows, F expert width, G = 2 F, gate first.

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
PIECE = 1 << 21  # numbers of gate and up: torch's ops make about five times as many in fp32 in between


def _kernels_for(gate_up_MG: Tensor, weights_M: Tensor) -> Kernels | None:
    supported = gate_up_MG.dtype in _SUFFIX and weights_M.dtype == torch.float32
    return kernels() if supported and gate_up_MG.device.type == "cpu" else None


def activate(gate_up_MG: Tensor, weights_M: Tensor, hidden_MF: Tensor) -> None:
    """hidden = weight * silu(gate) * up, in place."""
    native = _kernels_for(gate_up_MG, weights_M)
    if native is not None:
        rows, width = hidden_MF.shape
        native(f"forward_{_SUFFIX[gate_up_MG.dtype]}", gate_up_MG, weights_M, hidden_MF, rows, width)
        return
    _compute(0, gate_up_MG, weights_M, hidden_MF)


def activate_backward(
    gate_up_MG: Tensor, weights_M: Tensor, dh_MF: Tensor, grad_MG: Tensor, hidden_MF: Tensor, grad_weights_M: Tensor
) -> None:
    """Writes the gradients of `activate` and recomputes the hidden activation, in place."""
    native = _kernels_for(gate_up_MG, weights_M)
    if native is not None:
        rows, width = hidden_MF.shape
        native(
            f"backward_{_SUFFIX[gate_up_MG.dtype]}", gate_up_MG, weights_M, dh_MF, grad_MG, hidden_MF, grad_weights_M,
            rows, width,
        )  # fmt: skip
        return
    _compute(1, gate_up_MG, weights_M, dh_MF, grad_MG, hidden_MF, grad_weights_M)


def _compute(index: int, gate_up_MG: Tensor, *of_rows: Tensor) -> None:
    """A function of `_FUNCTIONS` without a kernel of ours: one of Triton's, else torch's ops on some rows at a time."""
    if (fused := _fused(gate_up_MG.device)) is not None and gate_up_MG.numel():
        fused[index](gate_up_MG, *of_rows)
        return
    rows = max(1, PIECE // gate_up_MG.shape[1])
    for start in range(0, gate_up_MG.shape[0], rows):
        _FUNCTIONS[index](*(each[start : start + rows] for each in (gate_up_MG, *of_rows)))


@functools.cache
def _fused(device: torch.device) -> tuple[Callable[..., None], ...] | None:
    """On a GPU, the functions as a kernel each; None without Triton, or on a GPU that is too old for it."""
    if device.type != "cuda" or not has_triton():
        return None
    return tuple(torch.compile(function, dynamic=True) for function in _FUNCTIONS)


def _activate(gate_up_MG: Tensor, weights_M: Tensor, hidden_MF: Tensor) -> None:
    gate, up = _wide(gate_up_MG, weights_M).chunk(2, 1)
    hidden_MF.copy_(F.silu(gate) * up * weights_M.unsqueeze(1))


def _activate_backward(
    gate_up_MG: Tensor, weights_M: Tensor, dh_MF: Tensor, grad_MG: Tensor, hidden_MF: Tensor, grad_weights_M: Tensor
) -> None:
    gate, up = _wide(gate_up_MG, weights_M).chunk(2, 1)
    sigmoid, grad, weight = gate.sigmoid(), _wide(dh_MF, weights_M), weights_M.unsqueeze(1)
    silu = gate * sigmoid
    grad_weights_M.copy_((silu * up * grad).sum(1))
    hidden_MF.copy_(silu * up * weight)
    grad_MG.copy_(torch.cat((grad * weight * up * (sigmoid + silu * (1 - sigmoid)), grad * weight * silu), 1))


_FUNCTIONS = (_activate, _activate_backward)


def _wide(x: Tensor, like: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, like.dtype))


# -- the experts of one rank ----------------------------------------------------------------------------------------


class RaggedRows(NamedTuple):
    """Rows and who computes them, in expert order, a different number for each expert.

    Attributes:
        x_VD: input.
        source_R: int64, its row for each row in expert order.
        weights_R: routing weights, fp32 or wider.
        counts_S: int64, rows of each expert.
    """

    x_VD: Tensor
    source_R: Tensor
    weights_R: Tensor
    counts_S: Tensor


class Saved(NamedTuple):
    """What backward needs beside the weights. gate_up_PG: before the activation. source_P: int32."""

    x_VD: Tensor
    source_R: Tensor
    counts_S: Tensor
    gate_up_PG: Tensor
    source_P: Tensor
    weights_P: Tensor


_FIELDS = len(Saved._fields)


class Stacks(NamedTuple):
    """The weights: gate_ups (E, G, D) and downs (E, D, F), of own experts and, in a second stack, of borrowed ones."""

    gate_ups: list[Tensor]
    downs: list[Tensor]

    def counts(self, counts_S: Tensor) -> Tensor:
        """Those of the experts: slots that are empty come last."""
        return counts_S[: sum(stack.shape[0] for stack in self.downs)]

    def at_once(self, x_VD: Tensor, num_rows: int) -> bool:
        """Whether each product computes all experts at once."""
        num_experts = sum(stack.shape[0] for stack in self.downs)
        return at_once(x_VD, num_rows, num_experts, *self.gate_ups[0].shape[1:], self.downs[0].shape[2])

    def meanwhile(self, rows_P: Tensor, before: tuple[int, int], beside: tuple[int, int]) -> None:
        """For a fake kernel, of a GPU: what `Load.meanwhile` says, in D and F of a row.

        Args:
            rows_P: something of each row.
        """
        like, num_rows = self.downs[0], rows_P.shape[0]
        if sizes.on_gpu() and self.at_once(like, num_rows):
            row = num_rows * like.element_size()
            sizes.meanwhile(*(row * (d * like.shape[1] + f * like.shape[2]) for d, f in (before, beside)))


@torch.library.custom_op("moecompile::expert_ffn", mutates_args=())
def expert_ffn(
    x_VD: Tensor, source_R: Tensor, weights_R: Tensor, counts_S: Tensor, gate_ups: list[Tensor], downs: list[Tensor],
    grad_token: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum above.

    Args:
        x_VD, source_R, weights_R, counts_S: `RaggedRows`. gate_ups, downs: `Stacks`.
        grad_token: of `collect_gradients`, which then computes the weight gradients; the weights are one stack,
            detached.

    Returns:
        y_VD, and of `Saved` gate_up_PG, source_P and weights_P.
    """
    stacks = Stacks(gate_ups, downs)
    rows = RaggedRows(x_VD, source_R, weights_R, stacks.counts(counts_S))
    return (_at_once if stacks.at_once(x_VD, source_R.shape[0]) else _by_blocks)(rows, stacks)


@expert_ffn.register_fake
def _(
    x_VD: Tensor, source_R: Tensor, weights_R: Tensor, counts_S: Tensor, gate_ups: list[Tensor], downs: list[Tensor],
    grad_token: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    Stacks(gate_ups, downs).meanwhile(source_R, before=(1, 2), beside=(1, 1))
    size = sizes.size(lambda _: source_R.shape[0]) if may_be_padded(x_VD) else source_R.shape[0]
    return (
        torch.empty_like(x_VD),
        x_VD.new_empty(size, gate_ups[0].shape[1]),
        source_R.new_empty(size, dtype=torch.int32),
        weights_R.new_empty(size),
    )


def _by_blocks(rows: RaggedRows, stacks: Stacks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_VD, source_R, weights_R, counts_E = rows
    (_, inner, model), width = stacks.gate_ups[0].shape, stacks.downs[0].shape[2]
    products = Products(x_VD)
    blocks, padded_E = make_blocks(counts_E, x_VD, inner, pad=is_padded(x_VD), num_own=stacks.downs[0].shape[0])
    source_P, weights_P = padded(source_R, weights_R, counts_E, padded_E)
    gate_up_PG, out_PD = (x_VD.new_empty(source_P.shape[0], size) for size in (inner, model))
    of_rows, of_hidden = (scratch(blocks, x_VD, size) for size in (model, width))
    for block in blocks:
        x_MD, h_MF, gate_up_MG = of_rows(block), of_hidden(block), block.of(gate_up_PG)
        torch.index_select(x_VD, 0, block.of(source_P), out=x_MD)
        products.transposed(block, x_MD, stacks.gate_ups[block.stack], gate_up_MG)
        activate(gate_up_MG, block.of(weights_P), h_MF)
        products.transposed(block, h_MF, stacks.downs[block.stack], block.of(out_PD))
    return summed(out_PD, source_R, counts_E, padded_E, x_VD), gate_up_PG, source_P, weights_P


def _at_once(rows: RaggedRows, stacks: Stacks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_VD, source_R, weights_R, counts_E = rows
    gate_up_RG = grouped_mm(x_VD.index_select(0, source_R), stacks.gate_ups, counts_E, None, 0)
    hidden_RF = x_VD.new_empty(source_R.shape[0], stacks.downs[0].shape[2])
    activate(gate_up_RG, weights_R, hidden_RF)
    out_RD = grouped_mm(hidden_RF, stacks.downs, counts_E, None, 0)
    out_VD = torch.ops.moecompile.sum_rows(out_RD, source_R, x_VD.shape[0])
    return out_VD, gate_up_RG, source_R.to(torch.int32), weights_R.clone()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_VD, source_R, _, counts_S, gate_ups, downs, grad_token = inputs
    ctx.save_for_backward(*Saved(x_VD, source_R, counts_S, *output[1:]), *gate_ups, *downs)
    ctx.collected = collected_by(grad_token)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_VD: Tensor | None, *_: Any) -> tuple[Any, ...]:
    tensors, (need_x, _, need_weights, _, need_gate_ups, need_downs, _) = ctx.saved_tensors, ctx.needs_input_grad
    saved, num_stacks = list(tensors[:_FIELDS]), len(need_downs)
    gate_ups, downs = list(tensors[_FIELDS:-num_stacks]), list(tensors[-num_stacks:])
    no_grads, grad_token = [None] * num_stacks, None
    if grad_VD is None:
        return None, None, None, None, no_grads, no_grads, None
    grad_VD = grad_VD.contiguous()
    if any((*need_gate_ups, *need_downs)):
        x, weights, *grads = torch.ops.moecompile.expert_ffn_backward(grad_VD, saved, gate_ups, downs)
    else:
        x, weights, hidden_PF = torch.ops.moecompile.expert_ffn_input_grad(grad_VD, saved, gate_ups, downs)
        grads = [no_grads, no_grads]
        if ctx.collected:
            grad_token = ctx.collected.leave("expert_ffn", grad_VD, hidden_PF, *saved)
    needed = (
        [grad if need else None for grad, need in zip(*each, strict=True)]
        for each in zip(grads, (need_gate_ups, need_downs), strict=True)
    )
    return x if need_x else None, None, weights if need_weights else None, None, *needed, grad_token


expert_ffn.register_autograd(_backward, setup_context=_setup)


# -- gradients --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("moecompile::expert_ffn_backward", mutates_args=())
def expert_ffn_backward(
    grad_VD: Tensor, saved: list[Tensor], gate_ups: list[Tensor], downs: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Gradients of `expert_ffn` for x_VD, weights_R and both weights; zero for experts without rows.

    Args:
        saved: `Saved`. gate_ups, downs: `Stacks`.
    """
    given, stacks = Saved(*saved), Stacks(gate_ups, downs)
    if not stacks.at_once(given.x_VD, given.source_R.shape[0]):
        grads = Stacks(*([torch.empty_like(stack) for stack in each] for each in stacks))
        return *_inputs_by_blocks(grad_VD, given, stacks, None, grads), grads.gate_ups, grads.downs
    grad_RD, grad_hidden_RF = _hidden_at_once(grad_VD, given, stacks)
    grad_RG, hidden_RF, grad_weights = _activated(given, grad_hidden_RF)
    del grad_hidden_RF  # what is not needed any more makes room, here and below
    grad_downs = grouped_mm_weight_grad(grad_RD, hidden_RF, downs, given.counts_S)
    del grad_RD, hidden_RF
    rows_RD = given.x_VD.index_select(0, given.source_P)
    grad_gate_ups = grouped_mm_weight_grad(grad_RG, rows_RD, gate_ups, given.counts_S)
    del rows_RD
    return _rows_at_once(grad_RG, given, stacks), grad_weights, grad_gate_ups, grad_downs


@expert_ffn_backward.register_fake
def _(
    grad_VD: Tensor, saved: list[Tensor], gate_ups: list[Tensor], downs: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    Stacks(gate_ups, downs).meanwhile(saved[1], before=(1, 4), beside=(1, 2))
    grad_gate_ups, grad_downs = ([torch.empty_like(stack) for stack in each] for each in (gate_ups, downs))
    return *_fake_inputs(Saved(*saved)), grad_gate_ups, grad_downs


@torch.library.custom_op("moecompile::expert_ffn_input_grad", mutates_args=())
def expert_ffn_input_grad(
    grad_VD: Tensor, saved: list[Tensor], gate_ups: list[Tensor], downs: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `expert_ffn` for x_VD and weights_R, and grad_hidden_PF, which `expert_ffn_weight_grad` needs."""
    given, stacks = Saved(*saved), Stacks(gate_ups, downs)
    if stacks.at_once(given.x_VD, given.source_R.shape[0]):
        grad_hidden_RF = _hidden_at_once(grad_VD, given, stacks)[1]
        grad_RG, grad_weights = _activated(given, grad_hidden_RF)[::2]
        return _rows_at_once(grad_RG, given, stacks), grad_weights, grad_hidden_RF
    grad_hidden_PF = given.x_VD.new_empty(given.source_P.shape[0], downs[0].shape[2])
    return *_inputs_by_blocks(grad_VD, given, stacks, grad_hidden_PF, None), grad_hidden_PF


@expert_ffn_input_grad.register_fake
def _(
    grad_VD: Tensor, saved: list[Tensor], gate_ups: list[Tensor], downs: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    given = Saved(*saved)
    Stacks(gate_ups, downs).meanwhile(given.source_R, before=(0, 4), beside=(1, 2))
    return (*_fake_inputs(given), given.x_VD.new_empty(given.source_P.shape[0], downs[0].shape[2]))


def _fake_inputs(given: Saved) -> tuple[Tensor, Tensor]:
    return torch.empty_like(given.x_VD), given.weights_P.new_empty(given.source_R.shape[0])


def _inputs_by_blocks(
    grad_VD: Tensor, given: Saved, stacks: Stacks, grad_hidden_PF: Tensor | None, grads: Stacks | None
) -> tuple[Tensor, Tensor]:
    """Gradients for x_VD and weights_R. Writes those of the hidden activation, or those of the weights."""
    x_VD, source_R, counts_S, gate_up_PG, source_P, weights_P = given
    (_, inner, model), width = stacks.gate_ups[0].shape, stacks.downs[0].shape[2]
    products, counts_E = Products(x_VD), stacks.counts(counts_S)
    blocks, padded_E = make_blocks(counts_E, x_VD, inner, pad=is_padded(x_VD), num_own=stacks.downs[0].shape[0])
    grad_PD, grad_weights_P = x_VD.new_empty(source_P.shape[0], model), torch.empty_like(weights_P)
    rows, grad_hidden, hidden, of_inner = (scratch(blocks, x_VD, n) for n in (model, width, width, inner))
    for block in blocks:
        rows_MD, h_MF, inner_MG = (part(block) for part in (rows, hidden, of_inner))
        dh_MF = grad_hidden(block) if grad_hidden_PF is None else block.of(grad_hidden_PF)
        torch.index_select(grad_VD, 0, block.of(source_P), out=rows_MD)
        products.straight(block, rows_MD, stacks.downs[block.stack], dh_MF)
        activate_backward(block.of(gate_up_PG), block.of(weights_P), dh_MF, inner_MG, h_MF, block.of(grad_weights_P))
        if grads:
            products.gradient(block, rows_MD, h_MF, grads.downs[block.stack])
        products.straight(block, inner_MG, stacks.gate_ups[block.stack], block.of(grad_PD))
        if grads:
            torch.index_select(x_VD, 0, block.of(source_P), out=rows_MD)
            products.gradient(block, inner_MG, rows_MD, grads.gate_ups[block.stack])
    grad_weights = grad_weights_P
    if source_P.shape[0] > source_R.shape[0]:
        grad_weights = grad_weights_P.index_select(0, places(counts_E, padded_E, source_R.shape[0]))
    return summed(grad_PD, source_R, counts_E, padded_E, x_VD), grad_weights


def _hidden_at_once(grad_VD: Tensor, given: Saved, stacks: Stacks) -> tuple[Tensor, Tensor]:
    """grad_RD, and the gradient of the hidden activation."""
    grad_RD = grad_VD.index_select(0, given.source_P)
    return grad_RD, grouped_mm_input_grad(grad_RD, stacks.downs, given.counts_S)


def _activated(given: Saved, grad_hidden_RF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """grad_RG, hidden_RF and grad_weights_R of `activate_backward`."""
    found = torch.empty_like(given.gate_up_PG), torch.empty_like(grad_hidden_RF), torch.empty_like(given.weights_P)
    activate_backward(given.gate_up_PG, given.weights_P, grad_hidden_RF, *found)
    return found


def _rows_at_once(grad_RG: Tensor, given: Saved, stacks: Stacks) -> Tensor:
    """The gradient of x_VD."""
    grad_rows_RD = grouped_mm_input_grad(grad_RG, stacks.gate_ups, given.counts_S)
    out: Tensor = torch.ops.moecompile.sum_rows(grad_rows_RD, given.source_R, given.x_VD.shape[0])
    return out


class _Chunk(NamedTuple):
    """What one call leaves for the weight gradients: its gradient, and the one of the hidden activation."""

    grad_VD: Tensor
    grad_hidden_PF: Tensor
    saved: Saved


def _chunks(left: list[Tensor]) -> list[_Chunk]:
    size = 2 + _FIELDS
    return [_Chunk(left[i], left[i + 1], Saved(*left[i + 2 : i + size])) for i in range(0, len(left), size)]


@torch.library.custom_op("moecompile::expert_ffn_weight_grad", mutates_args=())
def expert_ffn_weight_grad(left: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of `expert_ffn` for the weights, summed over chunks; zero for experts without rows.

    Args:
        left: the tensors of all `_Chunk`s, one after the other.
    """
    chunks = _chunks(left)
    x, counts_E = chunks[0].saved.x_VD, [chunk.saved.counts_S for chunk in chunks]
    num_experts, model = counts_E[0].shape[0], x.shape[1]
    inner, width = chunks[0].saved.gate_up_PG.shape[1], chunks[0].grad_hidden_PF.shape[1]
    rows_of = [chunk.saved.source_P.shape[0] for chunk in chunks]
    if at_once(x, sum(rows_of), num_experts, inner, model, width):
        return _weights_at_once(chunks)
    products, counts = Products(x), [each.tolist() for each in counts_E]
    starts = [starts_of(each, size) for each, size in zip(counts, rows_of, strict=True)]
    blocks, _ = make_blocks(torch.stack(counts_E).sum(0), x, inner, pad=is_padded(x))
    grad_gate_up, grad_down = x.new_empty(num_experts, inner, model), x.new_empty(num_experts, model, width)
    of_rows, of_hidden, of_inner = (scratch(blocks, x, size) for size in (model, width, inner))
    unused = chunks[0].saved.weights_P.new_empty(longest(blocks))
    for block in blocks:
        rows_MD, hidden_MF, inner_MG = of_rows(block), of_hidden(block), of_inner(block)
        found, padding = pieces(block, counts, starts)
        for place in padding:
            for buffer in (rows_MD, hidden_MF, inner_MG):
                buffer[place].zero_()
        for chunk, rows, place in found:
            grad_VD, grad_hidden_PF, saved = chunks[chunk]
            torch.index_select(grad_VD, 0, saved.source_P[rows], out=rows_MD[place])
            activate_backward(
                saved.gate_up_PG[rows], saved.weights_P[rows], grad_hidden_PF[rows], inner_MG[place], hidden_MF[place],
                unused[place],
            )  # fmt: skip
        products.gradient(block, rows_MD, hidden_MF, grad_down)
        for chunk, rows, place in found:
            saved = chunks[chunk].saved
            torch.index_select(saved.x_VD, 0, saved.source_P[rows], out=rows_MD[place])
        products.gradient(block, inner_MG, rows_MD, grad_gate_up)
    return grad_gate_up, grad_down


@expert_ffn_weight_grad.register_fake
def _(left: list[Tensor]) -> tuple[Tensor, Tensor]:
    _, grad_hidden_PF, (x_VD, _, counts_E, gate_up_PG, *_) = _chunks(left)[0]
    num_experts, model = counts_E.shape[0], x_VD.shape[1]
    gate_up = x_VD.new_empty(num_experts, gate_up_PG.shape[1], model)
    down = x_VD.new_empty(num_experts, model, grad_hidden_PF.shape[1])
    rows = torch.cat([chunk.saved.weights_P for chunk in _chunks(left)])
    Stacks([gate_up], [down]).meanwhile(rows, before=(0, 6), beside=(1, 2))
    return gate_up, down


def _weights_at_once(chunks: list[_Chunk]) -> tuple[Tensor, Tensor]:
    saved = [chunk.saved for chunk in chunks]
    counts_E = [each.counts_S for each in saved]
    order_R = by_expert(counts_E, [each.source_P.shape[0] for each in saved])
    sources, past = list[Tensor](), 0
    for each in saved:
        sources.append(each.source_P + past)
        past += each.x_VD.shape[0]

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).index_select(0, order_R)

    source, weights = joined(sources), joined([each.weights_P for each in saved])
    gate_up_RG = joined([each.gate_up_PG for each in saved])
    grad_hidden_RF = joined([chunk.grad_hidden_PF for chunk in chunks])
    grad_RG, hidden_RF = torch.empty_like(gate_up_RG), torch.empty_like(grad_hidden_RF)
    activate_backward(gate_up_RG, weights, grad_hidden_RF, grad_RG, hidden_RF, torch.empty_like(weights))
    del gate_up_RG, grad_hidden_RF
    total_E = torch.stack(counts_E).sum(0)
    grad_down = weight_grad(torch.cat([chunk.grad_VD for chunk in chunks]).index_select(0, source), hidden_RF, total_E)
    del hidden_RF
    rows_RD = torch.cat([each.x_VD for each in saved]).index_select(0, source)
    return weight_grad(grad_RG, rows_RD, total_E), grad_down
