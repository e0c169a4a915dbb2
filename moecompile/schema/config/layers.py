"""What becomes of a layer: `experts`, `routing`, `balance`, and `per_layer` for some of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional, Union

from moecompile.routing import BalanceRule, BiasUpdate, Choice, DropPolicy, GroupScore, Score, Workload
from moecompile.schema.enums import ExpertInit, SiteKind, WeightScaling


@dataclass(kw_only=True)
class ExpertsConfig:
    """`experts`: which FFNs become experts and how."""

    sites: SiteKind = SiteKind.auto
    """Which kind of site is rewritten; `auto`: the experts that the model has already, else its dense FFNs."""
    match: str = "*"
    """Shell pattern on the module path."""
    layers: str = ":"
    """Python slice over the matched sites in model order (`1:` all but the first, `::2` every other)."""
    num_routed: int = 8
    """Routed experts of a layer, 1 or more; a multiple of `mesh.ep`."""
    granularity: int = 1
    """Slices that one dense FFN is cut into, 1 or more; an expert has 1/granularity of its hidden units."""
    num_shared: int = 0
    """Slices that go to the shared expert, which every token visits; 0 for none."""
    shared_gate: bool = False
    """The shared expert's output is multiplied by a learned sigmoid (Qwen2-MoE)."""
    init: ExpertInit = ExpertInit.copy
    """Where the experts' first weights come from: how they are made of the dense FFN."""
    drop_ratio: float = 0.5
    """With init=drop, the part of an expert's hidden units that is drawn anew, in (0, 1]."""
    weight_scaling: WeightScaling = WeightScaling.exact
    """What makes up for the routing weights, so that the experts' weighted sum starts like the dense FFN."""


@dataclass(kw_only=True)
class RoutingConfig:
    """`routing`: where a token goes."""

    choice: Choice = Choice.token
    """Token choice, or expert choice of `top_k` tokens per expert on average (Zhou et al. 2022, arXiv 2202.09368)."""
    top_k: int = 2
    """Experts per token, 1 to `experts.num_routed`."""
    score: Score = Score.softmax
    """What turns router logits into scores."""
    normalize: bool = True
    """The routing weights of a token sum to `scale`; else they are its scores times `scale`."""
    scale: float = 1.0
    """Factor of the routing weights, positive."""
    groups: Union[int, str] = "auto"
    """Contiguous groups of experts; `auto`: one per node that the EP group spans if `max_nodes` is given, else 1."""
    top_groups: Optional[int] = None
    """Groups that a token may use, 1 to `groups`; null: all, or what `max_nodes` asks for."""
    group_score: GroupScore = GroupScore.top2
    """How a group is scored for group-limited routing: by its best expert, two best, or top_k / top_groups best."""
    max_nodes: Optional[int] = None
    """Nodes that a token may reach, 1 or more; null: no limit."""
    bias: bool = False
    """The router is a linear with a bias."""
    capacity_factor: Optional[float] = None
    """An expert takes at most ceil(capacity_factor * tokens * top_k / experts) tokens of a micro-batch, positive; null:
    dropless.
    """
    drop: DropPolicy = DropPolicy.position
    """Which tokens an expert keeps when more choose it than its capacity: the first ones, or the largest weights."""
    jitter: float = 0.0
    """Router inputs are multiplied by uniform(1 - jitter, 1 + jitter) in training; in [0, 1)."""
    workload: Workload = Workload.none
    """Routing that ignores the router's choice, for benchmarks."""
    skew: float = 1.0
    """Exponent of the workloads zipf and drift, positive: expert i is drawn with probability ~ 1 / (i + 1) ** skew."""
    allow_future: bool = False
    """Allows expert choice in a causal model, where it sees the future."""


@dataclass(kw_only=True)
class LossesConfig:
    """`balance.losses`: coefficients of the auxiliary losses, 0 for none; several may be used at once."""

    micro_batch: float = 0.0
    """Load-balancing loss over one micro-batch (Switch and GShard)."""
    sequence: float = 0.0
    """Load-balancing loss over each sequence (DeepSeek)."""
    global_batch: float = 0.0
    """Load-balancing loss over the global batch (Qwen)."""
    z: float = 0.0
    """Router z-loss (ST-MoE): the mean squared logsumexp of the logits."""


@dataclass(kw_only=True)
class BalanceConfig:
    """`balance`: how load is evened out."""

    rule: BalanceRule = BalanceRule.none
    """Whether a correction bias follows the load (DeepSeek-V3)."""
    update: BiasUpdate = BiasUpdate.sign
    """How the correction bias moves in an optimizer step: by the sign of mean load - load, or in proportion to it."""
    rate: float = 1e-3
    """Step of the correction bias per optimizer step, positive with rule=bias."""
    losses: LossesConfig = field(default_factory=LossesConfig)


@dataclass(kw_only=True)
class PerLayerConfig:
    """`per_layer.NAME`: other settings for some of the rewritten layers."""

    match: str = "*"
    """Shell pattern on the module path."""
    layers: str = ":"
    """Python slice over the rewritten layers."""
    experts: dict[str, Any] = field(default_factory=dict)
    """Keys of `experts` with their values there."""
    routing: dict[str, Any] = field(default_factory=dict)
    """Keys of `routing` with their values there."""
    balance: dict[str, Any] = field(default_factory=dict)
    """Keys of `balance` with their values there."""
