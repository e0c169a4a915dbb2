"""Steps of an embedding table by the rows that have a gradient: no others are read, written or decayed.

    lazy_adamw        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2                  AdamW (Loshchilov, Hutter 2019)
                      w = w - lr decay w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    rowwise_adagrad   s = s + mean(g^2)                                                one number per row, no momentum
                      w = w - lr decay w - lr g / (sqrt(s) + eps)                      (Duchi et al. 2011)

t counts the steps of the optimizer, not those of a row: a row that was not read for long is corrected as torch's
SparseAdam does. A step without a backward, as one that is skipped, does not count. A row whose gradient is zero
everywhere counts as one that was not read. State is in fp32 or wider, cut as the table is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moecompile.ops.lookups import RowGradients
from moecompile.schema import ROW_STATE, RowRule
from moecompile.torch_private import local_part

STEP = "step"
_FIRST, _SECOND, _SUM = "exp_avg", "exp_avg_sq", "sum"


@torch.no_grad()
def step_rows(weight: Tensor, grads: RowGradients | None, state: dict[str, Any], group: Mapping[str, Any]) -> None:
    """One step of a table.

    Args:
        grads: None, or without a backward, as in a step that is skipped: only the state is made.
        group: its settings; `kind` is the rule.
    """
    rule = RowRule(group["kind"])
    if not state:
        state[STEP] = torch.zeros((), dtype=torch.float32, device=weight.device)
        state.update({name: _zeros(weight, weight.shape[1] if each else 1) for name, each in ROW_STATE[rule].items()})
    if grads is None or not grads.exist:
        return
    state[STEP] += 1
    if not grads.rows_V.numel():
        return
    rows, grad_VD = torch.ops.moecompile.rows_to_step(grads.rows_V, grads.summed_VD)
    table = local_part(weight.detach())
    kept = {name: local_part(value) for name, value in state.items() if name != STEP}
    parts = {name: value.index_select(0, rows) for name, value in kept.items()}
    values = table.index_select(0, rows).to(grad_VD.dtype)
    values.mul_(1 - group["lr"] * group["weight_decay"])
    values.add_(_RULES[rule](grad_VD, parts, state[STEP].double(), group), alpha=-group["lr"])
    table.index_copy_(0, rows, values.to(table.dtype))
    for name, part in parts.items():
        kept[name].index_copy_(0, rows, part)


def _lazy_adamw(grad: Tensor, parts: dict[str, Tensor], step: Tensor, group: Mapping[str, Any]) -> Tensor:
    first, second = group["betas"]
    parts[_FIRST].lerp_(grad, 1 - first)
    parts[_SECOND].mul_(second).addcmul_(grad, grad, value=1 - second)
    root = (parts[_SECOND] / (1 - second**step)).sqrt_().add_(group["eps"])
    mean: Tensor = parts[_FIRST] / (1 - first**step)
    return mean.div_(root)


def _rowwise_adagrad(grad: Tensor, parts: dict[str, Tensor], step: Tensor, group: Mapping[str, Any]) -> Tensor:
    parts[_SUM].add_(grad.square().mean(1, keepdim=True))
    root: Tensor = parts[_SUM].sqrt().add_(group["eps"])
    return grad / root


_RULES: dict[RowRule, Callable[..., Tensor]] = {
    RowRule.lazy_adamw: _lazy_adamw,
    RowRule.rowwise_adagrad: _rowwise_adagrad,
}
"""Rule -> the update of some rows."""


def _zeros(weight: Tensor, width: int) -> Tensor:
    """State with `width` numbers per row."""
    local = local_part(weight)
    made = torch.zeros(
        (local.shape[0], width), dtype=torch.promote_types(weight.dtype, torch.float32), device=local.device
    )
    if not isinstance(weight, DTensor):
        return made
    shape = torch.Size((weight.shape[0], width))
    return DTensor.from_local(
        made, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=(width, 1)
    )
