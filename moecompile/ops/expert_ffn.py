"""The gated experts of one rank in one op: gather, both projections, SwiGLU, routing weight, sum. Only what backward
cannot cheaply make again is kept: the input, and the projections before the activation.

    y[v] = sum over rows r with source v of  weight_r * (silu(gate) * up) down_e^T,   (gate, up) = x[v] gate_up_e^T

Legend: V rows of the input, D model dim, R rows in expert order = (row of the input, expert) pairs, F expert width,
G = 2 F, E experts on this rank, P rows with padding.

NOTE on speed, on a CPU:
  1. The routing weight is applied to the hidden activation. So expert outputs need not be kept for the router's
     gradient: it is a sum over F of what backward has at hand.
  2. Experts are computed one after the other; what is gathered and what lies between two products fits the cache.
  3. bf16 rows of an expert are padded to one of few lengths, with rows of weight 0: oneDNN builds a kernel for every
     new length, which took up to 5 ms here, several times a layer and step.
  4. A product A^T B of bf16 took twice the time of A B; so A is transposed first, by a kernel of ours.
On a GPU the grouped products take all experts at once, and the counts stay on the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moecompile.ops.grouped import grouped_mm, grouped_mm_input_grad, grouped_mm_weight_grad, has_kernel
from moecompile.ops.native import kernels
from moecompile.ops.tokens import expert_counts

_TILE = 16  # rows of a matrix tile, in bf16
_LENGTHS_PER_OCTAVE = 32


class _Segment(NamedTuple):
    """Rows start .. end of an expert, padding included."""

    expert: int
    start: int
    end: int


@torch.library.custom_op("moecompile::expert_ffn", mutates_args=())
def expert_ffn(
    x_VD: Tensor, source_R: Tensor, weights_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum above.

    Args:
        source_R: int64, row of the input of each row in expert order. weights_R: routing weights, fp32 or wider.
        counts_E: int64, rows of each expert.

    Returns:
        y_VD, and what backward needs: gate_up_PG before the activation, source_P int32, weights_P.
    """
    if has_kernel(x_VD):
        return _on_device(x_VD, source_R, weights_R, counts_E, gate_up_EGD, down_EDF)
    segments, padded_E = _segments(counts_E, x_VD.dtype)
    source_P, weights_P = _padded(source_R, weights_R, counts_E, padded_E)
    gate_up_PG = x_VD.new_empty(source_P.shape[0], gate_up_EGD.shape[1])
    out_PD = x_VD.new_empty(source_P.shape[0], x_VD.shape[1])
    rows, hidden = (_scratch(segments, x_VD, width) for width in (x_VD.shape[1], down_EDF.shape[2]))
    for expert, start, end in segments:
        rows_MD, hidden_MF = rows.take(end - start), hidden.take(end - start)
        torch.index_select(x_VD, 0, source_P[start:end], out=rows_MD)
        torch.mm(rows_MD, gate_up_EGD[expert].t(), out=gate_up_PG[start:end])
        _activate(gate_up_PG[start:end], weights_P[start:end], hidden_MF)
        torch.mm(hidden_MF, down_EDF[expert].t(), out=out_PD[start:end])
    return _summed(out_PD, source_R, counts_E, padded_E, x_VD), gate_up_PG, source_P, weights_P


@expert_ffn.register_fake
def _(
    x_VD: Tensor, source_R: Tensor, weights_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size() if _is_padded(x_VD) else source_R.shape[0]
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
    """Gradients of `expert_ffn`: for x_VD, weights_R, gate_up_EGD and down_EDF; zero for experts without rows."""
    if has_kernel(x_VD):
        return _backward_on_device(
            grad_VD, x_VD, source_R, counts_E, gate_up_EGD, down_EDF, gate_up_PG, source_P, weights_P
        )
    segments, padded_E = _segments(counts_E, x_VD.dtype)
    whole = len(segments) == counts_E.numel()  # else an expert without rows keeps the zeros
    grad_gate_up, grad_down = (
        torch.empty_like(weight) if whole else torch.zeros_like(weight) for weight in (gate_up_EGD, down_EDF)
    )
    grad_PD, grad_weights_P = x_VD.new_empty(source_P.shape[0], x_VD.shape[1]), torch.empty_like(weights_P)
    width, model = down_EDF.shape[2], x_VD.shape[1]
    rows, grad_hidden, hidden = (_scratch(segments, x_VD, n) for n in (model, width, width))
    inner, turned = (_scratch(segments, x_VD, n) for n in (2 * width, max(2 * width, model)))
    for expert, start, end in segments:
        rows_MD, dh_MF, h_MF, inner_MG = (part.take(end - start) for part in (rows, grad_hidden, hidden, inner))
        torch.index_select(grad_VD, 0, source_P[start:end], out=rows_MD)
        torch.mm(rows_MD, down_EDF[expert], out=dh_MF)
        _activate_backward(
            gate_up_PG[start:end], weights_P[start:end], dh_MF, inner_MG, h_MF, grad_weights_P[start:end]
        )
        torch.mm(_transposed(rows_MD, turned), h_MF, out=grad_down[expert])
        torch.mm(inner_MG, gate_up_EGD[expert], out=grad_PD[start:end])
        torch.index_select(x_VD, 0, source_P[start:end], out=rows_MD)
        torch.mm(_transposed(inner_MG, turned), rows_MD, out=grad_gate_up[expert])
    grad_weights = grad_weights_P
    if source_P.shape[0] > source_R.shape[0]:
        grad_weights = grad_weights_P.index_select(0, _places(counts_E, padded_E, source_R.shape[0]))
    return _summed(grad_PD, source_R, counts_E, padded_E, x_VD), grad_weights, grad_gate_up, grad_down


@expert_ffn_backward.register_fake
def _(
    grad_VD: Tensor, x_VD: Tensor, source_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor,
    gate_up_PG: Tensor, source_P: Tensor, weights_P: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(x_VD), weights_P.new_empty(source_R.shape[0]), torch.empty_like(gate_up_EGD),
        torch.empty_like(down_EDF),
    )  # fmt: skip


# -- rows ------------------------------------------------------------------------------------------------------------


def _is_padded(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and not has_kernel(x)


def _segments(counts_E: Tensor, dtype: torch.dtype) -> tuple[list[_Segment], Tensor]:
    """Where the rows of the experts that have some stand, and how many there are with padding, (E,)."""
    lengths = [_padded_length(n) if dtype == torch.bfloat16 else n for n in counts_E.tolist()]
    segments, start = [], 0
    for expert, length in enumerate(lengths):
        if length:
            segments.append(_Segment(expert, start, start + length))
        start += length
    return segments, torch.tensor(lengths, dtype=torch.int64)


def _padded_length(count: int) -> int:
    """Whole tiles; from 512 rows on at most 32 lengths between n and 2 n, so at most 1/32 is padding."""
    step = max(_TILE, (1 << count.bit_length()) // (2 * _LENGTHS_PER_OCTAVE))
    return -(-count // step) * step


def _places(counts_E: Tensor, padded_E: Tensor, num_rows: int) -> Tensor:
    """Row in expert order -> its place among the padded rows, (R,) int64."""
    shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
    return torch.arange(num_rows) + shift_E.repeat_interleave(counts_E, output_size=num_rows)


def _padded(source_R: Tensor, weights_R: Tensor, counts_E: Tensor, padded_E: Tensor) -> tuple[Tensor, Tensor]:
    """Sources and weights with the padding: copies of the input's first row, of weight 0."""
    num_padded = int(padded_E.sum())
    if num_padded == source_R.shape[0]:
        return source_R.to(torch.int32), weights_R.clone()
    places_R = _places(counts_E, padded_E, source_R.shape[0])
    source_P = torch.zeros(num_padded, dtype=torch.int32).index_copy_(0, places_R, source_R.to(torch.int32))
    return source_P, weights_R.new_zeros(num_padded).index_copy_(0, places_R, weights_R)


def _summed(rows_PD: Tensor, source_R: Tensor, counts_E: Tensor, padded_E: Tensor, like_VD: Tensor) -> Tensor:
    """Sum of the rows that came of each row of the input, (V, D), in expert order; padding is left out."""
    num_rows = source_R.shape[0]
    if num_rows == 0:
        return torch.zeros_like(like_VD)
    order_R = torch.argsort(source_R, stable=True)
    if rows_PD.shape[0] > num_rows:
        order_R = _places(counts_E, padded_E, num_rows).index_select(0, order_R)
    lengths_V = expert_counts(source_R, like_VD.shape[0])
    starts_V = lengths_V.cumsum(0) - lengths_V
    return F.embedding_bag(order_R.to(torch.int32), rows_PD, starts_V.to(torch.int32), mode="sum")


class _Scratch:
    """One buffer for the experts one after the other, each taking as many rows as it has."""

    def __init__(self, buffer: Tensor, width: int) -> None:
        self.buffer, self.width = buffer, width

    def take(self, rows: int) -> Tensor:
        """(rows, width), not initialised."""
        return self.buffer[: rows * self.width].view(rows, self.width)


def _scratch(segments: list[_Segment], like: Tensor, width: int) -> _Scratch:
    longest = max((segment.end - segment.start for segment in segments), default=0)
    return _Scratch(like.new_empty(longest * width), width)


# -- activation ------------------------------------------------------------------------------------------------------

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def _activate(gate_up_MG: Tensor, weights_M: Tensor, hidden_MF: Tensor) -> None:
    """hidden = weight * silu(gate) * up, in place."""
    native = kernels() if gate_up_MG.dtype in _SUFFIX and weights_M.dtype == torch.float32 else None
    if native is not None:
        rows, width = hidden_MF.shape
        native(f"forward_{_SUFFIX[gate_up_MG.dtype]}", gate_up_MG, weights_M, hidden_MF, rows=rows, width=width)
        return
    gate, up = _wide(gate_up_MG, weights_M).chunk(2, 1)
    hidden_MF.copy_((F.silu(gate) * up).mul_(weights_M.unsqueeze(1)))


def _activate_backward(
    gate_up_MG: Tensor, weights_M: Tensor, dh_MF: Tensor, grad_MG: Tensor, hidden_MF: Tensor, grad_weights_M: Tensor
) -> None:
    """Gradients of `_activate` and the hidden activation again, in place."""
    native = kernels() if gate_up_MG.dtype in _SUFFIX and weights_M.dtype == torch.float32 else None
    if native is not None:
        rows, width = hidden_MF.shape
        native(
            f"backward_{_SUFFIX[gate_up_MG.dtype]}", gate_up_MG, weights_M, dh_MF, grad_MG, hidden_MF, grad_weights_M,
            rows=rows, width=width,
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


def _transposed(x_MN: Tensor, turned: _Scratch) -> Tensor:
    """x^T; written out where a product with it is faster so."""
    rows, width = x_MN.shape
    native = kernels() if x_MN.dtype == torch.bfloat16 and width % _TILE == 0 else None
    if native is None:
        return x_MN.t()
    out = turned.buffer[: rows * width].view(width, rows)
    native("transpose_16bit", x_MN, out, rows=rows, width=width)
    return out


# -- all experts at once, without a look at the counts ---------------------------------------------------------------


def _on_device(
    x_VD: Tensor, source_R: Tensor, weights_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate_up_RG = grouped_mm(x_VD.index_select(0, source_R), gate_up_EGD, counts_E)
    hidden_RF = x_VD.new_empty(source_R.shape[0], down_EDF.shape[2])
    _activate(gate_up_RG, weights_R, hidden_RF)
    out_VD = torch.ops.moecompile.sum_rows(grouped_mm(hidden_RF, down_EDF, counts_E), source_R, x_VD.shape[0])
    return out_VD, gate_up_RG, source_R.to(torch.int32), weights_R.clone()


def _backward_on_device(
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
