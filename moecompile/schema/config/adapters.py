"""Config of low-rank adapters: `adapters`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from moecompile.schema.enums import AdapterKind


@dataclass(kw_only=True)
class AdaptersConfig:
    """`adapters`: low-rank adapters that are trained in place of the model's weights, which are then frozen."""

    kind: AdapterKind = AdapterKind.none
    """Which adapters."""
    rank: int = 16
    """Rank r of every adapter, 1 or more."""
    alpha: float = 32.0
    """An adapter adds alpha / r times the product of its two matrices to a weight; positive."""
    dropout: float = 0.0
    """Dropout of the input of the adapters of linears in training, in [0, 1); 0 with adapters of experts."""
    dense: Optional[str] = "*"
    """Pattern for the linears that get adapters, by module path (`*.self_attn.q_proj`); output heads and routers never
    get any. null: none."""
    experts: Optional[str] = "*"
    """Pattern for the stacked weights of experts that get adapters, by path (`*.experts.down_proj`). null: none."""
    train_router: bool = False
    """Whether the model's own routers are trained in full."""
