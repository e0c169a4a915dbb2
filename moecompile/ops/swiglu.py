"""SwiGLU with a routing weight, in place: hidden = weight * silu(gate) * up, and its gradients.

Legend: M rows, F expert width, G = 2 F, gate first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moecompile.ops.cpu.native import Kernels, kernels

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


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
    gate, up = _wide(gate_up_MG, weights_M).chunk(2, 1)
    hidden_MF.copy_((F.silu(gate) * up).mul_(weights_M.unsqueeze(1)))


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
