"""The SwiGLU experts of a rank, one after the other: the simplest back end of experts."""

import torch
from torch import Tensor
from torch.nn import functional as F


def one_by_one(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x (V, D), ids and weights (V, k), gate_up (e, 2F, D), down (e, D, F) -> (V, D)."""
    y = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        row, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[row] @ gate_up[expert].T).chunk(2, dim=-1)
        out = (F.silu(gate) * up) @ down[expert].T
        y = y.index_add(0, row, (weights[row, slot].unsqueeze(1) * out).to(y.dtype))
    return y
