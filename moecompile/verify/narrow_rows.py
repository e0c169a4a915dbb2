"""Rows in eight bits in the reference: the values that ranks receive, without bytes and without exchanges.

It shares no code with the ops that pack rows: e4m3 is the list of its numbers here, and a number becomes the nearest.

Algorithm, for each layer whose rows are sent in eight bits:
  1. Tokens are rounded before they are copied for their experts; the router and shared experts read them as they are.
  2. Gradients are rounded where ranks send them: of each expert's row if a token is sent once for each expert (flat),
     else of a token's sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moecompile.passes.base import paired
from moecompile.plan import EXACT, LayerPlan, Plan
from moecompile.row_formats import ROW_FORMATS

_LARGEST, _LEAST = 448.0, 2.0**-126
# Magnitudes of the codes 0 to 126: multiples of 2^-9 below 2^-6, then eight for each power of two, up to 448.
_E4M3 = torch.tensor(
    [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:119],
    dtype=torch.float64,
)


def unrounded(plan: Plan) -> Plan:
    """The plan, with rows that are not in eight bits as the activations are."""

    def exact(layer: LayerPlan) -> LayerPlan:
        narrow = layer.dispatch.wire.narrow
        dispatch = dataclasses.replace(layer.dispatch, wire_dtype=narrow + EXACT if narrow else "auto")
        return dataclasses.replace(layer, dispatch=dispatch)

    return dataclasses.replace(plan, layers=tuple(map(exact, plan.layers)))


def separate(plan: Plan, of_ranks: Plan) -> Plan:
    """The plan for one process, with experts that return a row for each expert where ranks round these (step 2)."""
    layers = [
        dataclasses.replace(layer, fused=layer.fused and not _of_each_row(ranks))
        for layer, ranks in zip(plan.layers, of_ranks.layers, strict=True)
    ]
    return dataclasses.replace(plan, layers=tuple(layers))


def round_rows(model: nn.Module, layers: Sequence[LayerPlan]) -> None:
    """Rounds in a model that is lowered for one process, in place (steps 1 and 2).

    Args:
        layers: as planned for the ranks.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, fx.GraphModule):
            inside = [layer for layer in layers if f"{layer.site.fqn}.".startswith(f"{path}." if path else "")]
            for layer, calls in paired(module, inside, lambda _: 1):
                for call in calls if layer.dispatch.wire.narrow else ():
                    _round(call, layer)
            module.recompile()


def _of_each_row(layer: LayerPlan) -> bool:
    return bool(layer.dispatch.wire.narrow) and layer.dispatch.kind == "flat"


def _round(call: fx.Node, layer: LayerPlan) -> None:
    graph, is_fused = call.graph, "source_R" in call.kwargs
    how = (layer.dispatch.wire.narrow, getattr(torch, layer.dispatch.wire.dtype or "float64"))
    copied = call if is_fused else call.args[0].args[0]  # type: ignore[union-attr]
    assert isinstance(copied, fx.Node)
    with graph.inserting_before(copied):  # Step 1
        copied.update_arg(0, graph.call_function(_rounded, (copied.args[0], *how)))
    (summed,) = (call,) if is_fused or _of_each_row(layer) else call.users
    with graph.inserting_after(summed):  # Step 2
        rounded = graph.call_function(_with_rounded_gradient, (summed, *how))
    summed.replace_all_uses_with(rounded, lambda user: user is not rounded)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, *how: Any) -> Tensor:
        return nearest(rows, *how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _WithRoundedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, *how: Any) -> Tensor:
        ctx.how = how
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return nearest(grad, *ctx.how), None, None


def _rounded(rows: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    rounded: Tensor = _Rounded.apply(rows, name, dtype)  # type: ignore[no-untyped-call]
    return rounded


def _with_rounded_gradient(rows: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    same: Tensor = _WithRoundedGradient.apply(rows, name, dtype)  # type: ignore[no-untyped-call]
    return same


def nearest(rows_RD: Tensor, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """What the receiver of these rows has, in float64 up to the fp32 number that is rounded to e4m3.

    Args:
        dtype: to which rows are rounded before.
    """
    form, width = ROW_FORMATS[name], rows_RD.shape[1]
    blocks = F.pad(rows_RD.to(dtype).double(), (0, -width % form.block)).unflatten(1, (form.blocks(width), form.block))
    largest = blocks.abs().amax(2, keepdim=True).float()
    if form.scale_bytes == 4:
        scale = (largest.clamp(min=_LARGEST * _LEAST) / _LARGEST).double()
    else:
        scale = torch.exp2((largest.double() / _LARGEST).log2().ceil()).clamp(min=_LEAST)
        scale = torch.where(largest > _LARGEST * scale, 2 * scale, scale)  # log2 rounds
        scale = torch.where((largest <= _LARGEST * scale / 2) & (scale > _LEAST), scale / 2, scale)
    sizes = (blocks / scale).float().double()
    middles = (_E4M3[1:] + _E4M3[:-1]) / 2
    code = torch.bucketize(sizes.abs(), middles)  # of two that are as near the lower one
    tied = sizes.abs() == middles[code.clamp(max=len(middles) - 1)]
    code += (tied & (code % 2 == 1)).long()
    found: Tensor = (_E4M3[code].copysign(sizes) * scale).to(dtype)
    return found.flatten(1)[:, :width].to(rows_RD.dtype)
