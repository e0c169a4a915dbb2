"""What a router computes before it chooses: its normed input, and a score that torch does not have.

Legend: D model dim, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_EPS = 1e-6  # Gemma 4's rms_norm_eps


def normed(x: Tensor, scale_D: Tensor) -> Tensor:
    """x (..., D) over its root mean square, times scale_D / sqrt(D) (Gemma 4); x is fp32 or wider."""
    out: Tensor = x * (x.square().mean(-1, keepdim=True) + _EPS).rsqrt() * (scale_D * x.shape[-1] ** -0.5)
    return out


def sqrt_softplus(logits: Tensor) -> Tensor:
    """sqrt(log(1 + exp(logit))) (DeepSeek-V4).

    Where exp(logit) underflows, the derivative of the root would be infinite, and its product with 0 NaN: it is 0 here.
    """
    return F.softplus(logits).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()
