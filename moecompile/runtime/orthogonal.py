"""Newton-Schulz: the orthogonal factor of many matrices at once, approximately (Jordan 2024, `torch.optim.Muon`).

A matrix U S V^T becomes U S' V^T with every entry of S' near 1, by `steps` times X -> a X + (b X X^T + c (X X^T)^2) X.
Each matrix is scaled by its own Frobenius norm before, so that every singular value is at most 1.

Legend: O d_out, I d_in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_EPS = 1e-7  # as in torch.optim.Muon: a matrix of zeros stays one


def orthogonalized(matrices: Tensor, steps: int, coefficients: Sequence[float], dtype: torch.dtype) -> Tensor:
    """(..., O, I) -> the same shape, of `dtype`, in which the products are computed too."""
    a, b, c = coefficients
    x = matrices.to(dtype).reshape(-1, *matrices.shape[-2:])
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x  # the smaller square
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)
