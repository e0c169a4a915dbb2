"""Config of low-rank adapters: `adapters`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from moecompile.ranges import Real, Whole, number
from moecompile.schema.enums import AdapterKind


@dataclass(kw_only=True)
class AdaptersConfig:
    """`adapters`: low-rank adapters that are trained in place of the model's weights, which are then frozen."""

    kind: AdapterKind = AdapterKind.none
    """Which adapters."""
    rank: int = number(16, Whole(1))
    """Rank r of every adapter."""
    alpha: float = number(32.0, Real("(0, inf)", "Use twice adapters.rank"))
    """An adapter adds alpha / r times the product of its two matrices to a weight."""
    dropout: float = number(0.0, Real("[0, 1)", "Use 0"))
    """Dropout of the input of the adapters of linears in training; 0 with adapters of experts."""
    dense: Optional[str] = "*"
    """Pattern for the linears that get adapters, by module path (`*.self_attn.q_proj`); output heads and routers never
    get any. null: none."""
    experts: Optional[str] = "*"
    """Pattern for the stacked weights of experts that get adapters, by path (`*.experts.down_proj`). null: none."""
    train_router: bool = False
    """Whether the model's own routers are trained in full."""
