"""Zero-compute experts: a token that chooses one keeps its input, and nothing is sent or computed.

Legend: T tokens, D model dim, K top-k.
"""

from __future__ import annotations

from torch import Tensor, nn


class IdentityExperts(nn.Module):
    """Experts that return their input (LongCat-Flash): ids from `num_experts` on, whose tokens need no exchange.

    Args:
        num_experts: number of experts with weights.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ids_TK with these ids replaced by num_experts, and the output of these experts, (T, D)."""
        weights_T = weights_TK.masked_fill(ids_TK < self.num_experts, 0).sum(-1, keepdim=True)
        return ids_TK.clamp(max=self.num_experts), (hidden_TD * weights_T).to(hidden_TD.dtype)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"ids from {self.num_experts} on"
