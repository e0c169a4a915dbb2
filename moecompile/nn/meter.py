"""Counts the load of experts between two balance updates.

Legend: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moecompile import ops  # noqa: F401  (registers the ops)

TOKENS, DROPPED, ENTROPY = range(3)  # indices in `sums`


class LoadMeter(nn.Module):
    """Counters of one layer since the last balance update; they differ between ranks and are not in the state dict.

    load (E,) int64: assignments to each expert, before drops. node_tokens (num_nodes,) int64: distinct tokens that
    reach each node, after drops. sums (3,) float64: tokens, dropped assignments, entropy of the router in nats summed
    over tokens.

    Nothing is counted in evaluation mode or in a recomputed forward.

    Args:
        num_experts, num_nodes: sizes; node i has the i-th equal part of the experts.
        has_entropy: whether calls pass the router's distribution.
    """

    load: Tensor
    node_tokens: Tensor
    sums: Tensor

    def __init__(
        self,
        num_experts: int,
        num_nodes: int = 1,
        device: torch.device | str | None = None,
        *,
        has_entropy: bool = False,
    ) -> None:
        super().__init__()
        if num_experts % num_nodes:
            raise ValueError(f"{num_experts} experts cannot be split evenly over {num_nodes} nodes")
        self.num_experts, self.num_nodes, self.has_entropy = num_experts, num_nodes, has_entropy

        def counter(size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, device=device, dtype=dtype)

        self.register_buffer("load", counter(num_experts, torch.int64), persistent=False)
        self.register_buffer("node_tokens", counter(num_nodes, torch.int64), persistent=False)
        self.register_buffer("sums", counter(3, torch.float64), persistent=False)

    def forward(
        self,
        ids_TK: Tensor,
        kept_TK: Tensor | None = None,
        probs_TE: Tensor | None = None,
        real_T: Tensor | None = None,
    ) -> None:
        """Counts one forward.

        Args:
            ids_TK: chosen experts. kept_TK: the same after drops, with num_experts for a dropped one; None: no drops.
            probs_TE: each token's distribution over experts.
            real_T: which tokens are no padding, (T,) bool; None: all. Padding has no expert in ids_TK.
        """
        if self.training:
            kept_TK = ids_TK if kept_TK is None else kept_TK
            torch.ops.moecompile.count_routing(
                self.load, self.node_tokens, self.sums, ids_TK, kept_TK, probs_TE, real_T
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoadMeter:
        # A cast of the model to bf16 must not round the counts.
        super()._apply(at_least(torch.float64, fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.num_experts} experts on {self.num_nodes} nodes"


def at_least(dtype: torch.dtype, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wraps `fn` of `nn.Module._apply`: floating-point tensors get at least the width of `dtype`, without rounding."""

    def wide(tensor: Tensor) -> Tensor:
        out = fn(tensor)
        if out.is_floating_point() and torch.promote_types(out.dtype, dtype) != out.dtype:
            return tensor.to(device=out.device, dtype=torch.promote_types(out.dtype, dtype))
        return out

    return wide
