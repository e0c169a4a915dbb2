"""Config of the optimizer: `optimizer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from moecompile.ranges import Real, Whole, number
from moecompile.schema.enums import MuonPrecision, MuonScale, OptimizerKind


@dataclass(kw_only=True)
class MuonConfig:
    """`optimizer.muon`: the step of hidden matrices, with `optimizer=muon` (docs/use/optimizers.md)."""

    lr: Optional[float] = number(None, Real("[0, inf)", "Use 0.02, or null for optimizer.lr"))
    """Peak learning rate of matrices; null: `optimizer.lr`, which is right for `scale=match_rms_adamw`."""
    momentum: float = number(0.95, Real("[0, 1)", "Use 0.95"))
    """Decay rate of the momentum."""
    nesterov: bool = True
    """Whether the gradient of the step is counted once more (Nesterov)."""
    scale: MuonScale = MuonScale.match_rms_adamw
    """Factor of the step of a matrix."""
    steps: int = number(5, Whole(1, 99))
    """Newton-Schulz steps."""
    coefficients: list[float] = field(default_factory=lambda: [3.4445, -4.775, 2.0315])
    """a, b and c of a step X -> a X + (b X X^T + c (X X^T)^2) X."""
    precision: MuonPrecision = MuonPrecision.fp32
    """Precision of these products, and of matrices that are gathered for them."""


@dataclass(kw_only=True)
class WeightGroupConfig:
    """`optimizer.groups[N]`: other settings for some weights."""

    match: str = "*"
    """Pattern for the weights by name (`*.norm.weight`); a weight belongs to the first group that matches."""
    lr_scale: float = 1.0
    """Factor of their learning rate, 0 or more."""
    weight_decay: Optional[float] = None
    """Their weight decay, 0 or more; null: what they have otherwise."""
    kind: Optional[OptimizerKind] = None
    """Their optimizer, with `optimizer=muon`; null: what they have otherwise."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """`optimizer`: AdamW or Muon, with linear warm-up, then cosine decay."""

    kind: OptimizerKind = OptimizerKind.adamw
    """Which optimizer."""
    lr: float = number(1e-3, Real("[0, inf)", "Use 0.001"))
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the two moments of AdamW, each in [0, 1)."""
    eps: float = number(1e-8, Real("(0, inf)", "Use 1e-8"))
    """Added to the denominator of AdamW."""
    weight_decay: float = number(0.1, Real("[0, inf)", "Use 0.1, or 0 for none"))
    """Decoupled weight decay of matrices; 0 for none."""
    warmup_steps: int = number(20, Whole(0))
    """Optimizer steps of warm-up, at most `trainer.max_steps`."""
    min_lr_ratio: float = number(0.1, Real("[0, 1]", "Use 0.1, or 1.0 for a constant rate"))
    """Final over peak learning rate; 1.0: constant."""
    clip_norm: Optional[float] = number(1.0, Real("(0, inf)", "Use 1.0, or null for no clipping"))
    """Maximum global gradient norm; null: no clipping."""
    groups: list[WeightGroupConfig] = field(default_factory=list)
    """Other settings for some weights."""
    muon: MuonConfig = field(default_factory=MuonConfig)
