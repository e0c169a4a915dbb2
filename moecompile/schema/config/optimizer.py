"""Config of the optimizer: `optimizer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from moecompile.schema.enums import MuonPrecision, MuonScale, OptimizerKind


@dataclass(kw_only=True)
class MuonConfig:
    """`optimizer.muon`: the step of hidden matrices, with `optimizer=muon` (docs/use/optimizers.md)."""

    lr: Optional[float] = None
    """Peak learning rate of matrices, 0 or more; null: `optimizer.lr`, which is right for `scale=match_rms_adamw`."""
    momentum: float = 0.95
    """Decay rate of the momentum, in [0, 1)."""
    nesterov: bool = True
    """Whether the gradient of the step is counted once more (Nesterov)."""
    scale: MuonScale = MuonScale.match_rms_adamw
    """Factor of the step of a matrix."""
    steps: int = 5
    """Newton-Schulz steps, 1 or more."""
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
    lr: float = 1e-3
    """Peak learning rate, 0 or more."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the two moments of AdamW, each in [0, 1)."""
    eps: float = 1e-8
    """Added to the denominator of AdamW, positive."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; 0 for none."""
    warmup_steps: int = 20
    """Optimizer steps of warm-up, at most `trainer.max_steps`."""
    min_lr_ratio: float = 0.1
    """Final over peak learning rate, in [0, 1]; 1.0: constant."""
    clip_norm: Optional[float] = 1.0
    """Maximum global gradient norm, positive; null: no clipping."""
    groups: list[WeightGroupConfig] = field(default_factory=list)
    """Other settings for some weights."""
    muon: MuonConfig = field(default_factory=MuonConfig)
