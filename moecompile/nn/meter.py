"""Counts the load of experts between two balance updates.

Legend: T tokens, E experts, K top-k, B bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moecompile import ops  # noqa: F401  (registers the ops)

TOKENS, DROPPED, ENTROPY = range(3)  # indices in `sums`


class LoadMeter(nn.Module):
    """Counters of one layer since the last balance update; they differ between ranks and are not in the state dict.

    load (E,) int64: assignments to each expert, before drops. node_tokens (num_nodes,) int64: distinct tokens that
    reach each node, after drops. sums (3,) float64: tokens, dropped assignments, entropy of the router in nats summed
    over tokens. required (E, B) int32, only with bins: histogram of the bias that each expert would have needed for a
    token (moecompile.ops.required_bias).

    Nothing is counted in evaluation mode or in a recomputed forward.

    Args:
        num_experts, num_nodes: sizes; node i has the i-th equal part of the experts with weights,
            or of their positions if `place` was called.
        has_entropy: whether calls pass the router's distribution.
        num_identity: the last of the experts, which have no weights and are on no node.
        bins: of the histograms for quantile balancing; 0 for none.
    """

    load: Tensor
    node_tokens: Tensor
    sums: Tensor
    required: Tensor | None

    def __init__(
        self,
        num_experts: int,
        num_nodes: int = 1,
        device: torch.device | str | None = None,
        *,
        has_entropy: bool = False,
        num_identity: int = 0,
        bins: int = 0,
    ) -> None:
        super().__init__()
        self.num_identity = num_identity
        if (num_experts - num_identity) % num_nodes:
            raise ValueError(f"{num_experts} experts cannot be split evenly over {num_nodes} nodes")
        self.num_experts, self.num_nodes, self.has_entropy = num_experts, num_nodes, has_entropy

        def counter(size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, device=device, dtype=dtype)

        self.positions: list[int] = []
        self.register_buffer("load", counter(num_experts, torch.int64), persistent=False)
        self.register_buffer("node_tokens", counter(num_nodes, torch.int64), persistent=False)
        self.register_buffer("sums", counter(3, torch.float64), persistent=False)
        required = torch.zeros(num_experts, bins, device=device, dtype=torch.int32) if bins else None
        self.register_buffer("required", required, persistent=False)

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
            if self.positions and self.num_nodes > 1:
                kept_TK = torch.ops.moecompile.place_ids(kept_TK, self.positions)
            torch.ops.moecompile.count_routing(
                self.load, self.node_tokens, self.sums, ids_TK, kept_TK, probs_TE, real_T, self.num_identity
            )

    def place(self, positions: Sequence[int]) -> None:
        """Says at which position each expert with weights is; nodes have equal parts of the positions."""
        identity = range(self.num_experts - self.num_identity, self.num_experts)
        self.positions = [*positions, *identity]

    def count_required(self, scores_TE: Tensor, bias_E: Tensor, top_k: int, real_T: Tensor | None) -> None:
        """Counts one forward, if there are bins: its scores in [0, 1], and the correction bias of its choice."""
        if self.training and self.required is not None:
            torch.ops.moecompile.count_required_bias(self.required, scores_TE, bias_E, top_k, real_T)

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
