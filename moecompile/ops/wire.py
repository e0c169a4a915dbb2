"""Casts around an exchange: rows and their gradients may be sent in a lower precision than they are computed in.

Routing weights, ids and counts are never cast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("moecompile::wire_cast", mutates_args=())
def wire_cast(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows in the wire dtype, rounded to nearest. The gradient arrives in the wire dtype and is cast back."""
    return rows.to(dtype, copy=True)


@wire_cast.register_fake
def _(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(rows, dtype=dtype)


@torch.library.custom_op("moecompile::wire_uncast", mutates_args=())
def wire_uncast(rows: Tensor, like: Tensor) -> Tensor:
    """Received rows in the dtype of `like`. The gradient is rounded to the wire dtype before it is sent."""
    return rows.to(like.dtype, copy=True)


@wire_uncast.register_fake
def _(rows: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(rows, dtype=like.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad.to(ctx.dtype), None


wire_cast.register_autograd(_backward, setup_context=_setup)
wire_uncast.register_autograd(_backward, setup_context=_setup)
