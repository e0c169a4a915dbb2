"""Latent MoE: routed experts work in a width of their own, between a projection down and one up (Kimi K3, Nemotron-3).

    out = up(norm(sum over chosen experts of weight * expert(down(x)))) + shared(x)

The router and the shared experts read x itself. Rows that travel to experts and back have L numbers instead of D.

Legend: T tokens, D model dim, L latent dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EPS = 1e-6


class LatentDown(nn.Module):
    """x (..., D) -> (..., L), with weight (L, D).

    Args:
        d_model, d_latent: D and L.
    """

    def __init__(
        self, d_model: int, d_latent: int, *, device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_latent, d_model, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., L)."""
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return " -> ".join(map(str, reversed(self.weight.shape)))


class LatentUp(nn.Module):
    """The routed experts' sum (..., L) -> (..., D), with weight (D, L).

    Args:
        d_model, d_latent: D and L.
        norm: an RMSNorm, whose `norm_weight` (L,) starts at one, comes before the projection (Kimi K3).
    """

    norm_weight: Tensor | None

    def __init__(
        self, d_model: int, d_latent: int, *, norm: bool, device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_parameter(
            "norm_weight", nn.Parameter(torch.ones(d_latent, device=device, dtype=dtype)) if norm else None
        )
        self.weight = nn.Parameter(torch.empty(d_model, d_latent, device=device, dtype=dtype))

    def forward(self, combined: Tensor) -> Tensor:
        """(..., L) -> (..., D)."""
        if self.norm_weight is not None:
            combined = F.rms_norm(combined, self.norm_weight.shape, self.norm_weight.to(combined.dtype), _EPS)
        return F.linear(combined, self.weight)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        norm = "" if self.norm_weight is None else ", with a norm"
        return " -> ".join(map(str, reversed(self.weight.shape))) + norm


class Latent(NamedTuple):
    """Both projections of one layer."""

    down: LatentDown
    up: LatentUp
