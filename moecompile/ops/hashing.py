"""Hash routing: the experts of a token follow from its id alone. Index ops without gradients.

    choice of token id v in a layer, without a table (Floyd's way to draw K of E without replacement):
        for j = E - K ... E - 1:   t = h(v, layer, j) mod (j + 1);   take t, or j if t is taken

Every set of K experts is equally likely over ids. h is the finalizer of splitmix64 (Steele et al. 2014), in 64-bit
arithmetic that wraps around, so the choice is the same on every machine.

Legend: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Odd multipliers of splitmix64 as signed 64-bit integers, and the shifts between them.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


@torch.library.custom_op("moecompile::hashed_ids", mutates_args=())
def hashed_ids(tokens_T: Tensor, num_experts: int, top_k: int, layer: int) -> Tensor:
    """Experts of each token, (T, K) int64, all different.

    Args:
        tokens_T: token ids, any integer type. layer: layers with different numbers choose independently.
    """
    start_T = _mixed(tokens_T.to(torch.int64) + _mixed(tokens_T.new_full((), layer + 1, dtype=torch.int64)))
    chosen: list[Tensor] = []
    for last in range(num_experts - top_k, num_experts):
        drawn_T = (_mixed(start_T + last) & (2**63 - 1)) % (last + 1)
        taken_T = torch.zeros_like(drawn_T, dtype=torch.bool)
        for earlier_T in chosen:
            taken_T |= earlier_T == drawn_T
        chosen.append(drawn_T.masked_fill(taken_T, last))
    return torch.stack(chosen, dim=1)


@hashed_ids.register_fake
def _(tokens_T: Tensor, num_experts: int, top_k: int, layer: int) -> Tensor:
    return tokens_T.new_empty((tokens_T.shape[0], top_k), dtype=torch.int64)


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's finalizer of x + its increment; int64 stands for 64 bits."""
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    mixed: Tensor = x ^ _shifted(x, 31)
    return mixed


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right: int64's own keeps the sign."""
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted
