"""Config of the MoE layers: `experts`, `routing`, `balance`, and `per_layer` for some layers only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional, Union

from moecompile.ranges import Real, Whole, number
from moecompile.routing import (
    BALANCE_NUMBERS,
    ROUTER_NUMBERS,
    BalanceRule,
    BiasUpdate,
    Choice,
    DropPolicy,
    GroupScore,
    Score,
    Workload,
)
from moecompile.schema.enums import ExpertInit, SiteKind, WeightScaling, WidenTopK


@dataclass(kw_only=True)
class WidenConfig:
    """`experts.widen`: how init=widen copies the experts of a model that is MoE already."""

    top_k: WidenTopK = WidenTopK.scaled
    """Experts per token: scaled as the experts are, or kept."""
    loads: Optional[str] = None
    """A run of the model before, whose loads say which experts get more copies; null: all get the same number."""
    noise: float = number(0.0, Real("[0, 1)", "Use 0.01, or 0 for none"))
    """Standard deviation of what is added to all copies but the first of an expert, relative to that of each weight;
    in [0, 1), positive with top_k=kept.
    """


@dataclass(kw_only=True)
class ExpertsConfig:
    """`experts`: which FFNs are replaced by experts, and how."""

    sites: SiteKind = SiteKind.auto
    """Kind of site that is rewritten; `auto`: experts that the model has already, else its dense FFNs."""
    match: str = "*"
    """Shell pattern on the module path."""
    layers: str = ":"
    """Python slice over the matched sites in model order (`1:`: all but the first; `::2`: every other)."""
    num_routed: int = number(8, Whole(1))
    """Routed experts per layer; a multiple of `mesh.ep`."""
    granularity: int = number(1, Whole(1))
    """Slices that a dense FFN is split into; an expert has 1/granularity of its hidden units."""
    num_shared: int = number(0, Whole(0))
    """Slices in the shared expert, which every token uses; 0 for none."""
    shared_gate: bool = False
    """The shared expert's output is multiplied by a learned sigmoid (Qwen2-MoE)."""
    shared_routed: bool = False
    """The router weighs the slices of the shared expert too, in one sum with a token's chosen experts (Inkling)."""
    num_identity: int = number(0, Whole(0))
    """Further experts, which return their input (zero-compute experts of LongCat-Flash); the router scores them too."""
    latent_size: Optional[int] = number(None, Whole(1))
    """Width in which routed experts work, between a projection down and one up (latent MoE); null: the model's."""
    latent_norm: bool = False
    """With `latent_size`, an RMSNorm before the projection up (Kimi K3)."""
    init: ExpertInit = ExpertInit.copy
    """How the experts are initialized, from the dense FFN or, with `widen`, from the experts that a model has."""
    widen: WidenConfig = field(default_factory=WidenConfig)
    """With init=widen, how they are copied. `num_routed` is the number afterwards."""
    drop_ratio: float = number(0.5, Real("(0, 1]", "Use 0.5, or another experts.init for none"))
    """With init=drop, the fraction of an expert's hidden units that is reinitialized."""
    weight_scaling: WeightScaling = WeightScaling.exact
    """How weights are scaled to compensate for routing weights, so that the MoE layer starts like the dense FFN."""
    backend: Optional[str] = None
    """`module:name` of a function that computes the SwiGLU experts of a rank instead; only from the command line or
    Python. null: the package's own.
    """


@dataclass(kw_only=True)
class RoutingConfig:
    """`routing`: the router."""

    choice: Choice = Choice.token
    """Token choice; expert choice of `top_k` tokens per expert on average (Zhou et al. 2022, arXiv 2202.09368); or a
    hash of the token id, with weights from the router's scores (DeepSeek-V4, in its first layers).
    """
    top_k: int = number(2, ROUTER_NUMBERS["top_k"])
    """Experts per token, 1 to `experts.num_routed`."""
    score: Score = Score.softmax
    """The function from router logits to scores."""
    normalize: bool = True
    """Whether the routing weights of a token are normalized to sum to `scale`, else they are its scores times it."""
    scale: float = number(1.0, ROUTER_NUMBERS["scale"])
    """Factor of the routing weights."""
    groups: Union[int, str] = "auto"
    """Groups of consecutive experts; `auto`: one per node of the EP group if `max_nodes` is set, else 1."""
    top_groups: Optional[int] = number(None, ROUTER_NUMBERS["top_groups"])
    """Groups that a token may use, 1 to `groups`; null: as many as `max_nodes` allows, or all."""
    group_score: GroupScore = GroupScore.top2
    """How group-limited routing scores a group: by its best expert, its two best, or its top_k / top_groups best."""
    max_nodes: Optional[int] = number(None, Whole(1))
    """Nodes that a token may reach; null: no limit."""
    bias: bool = False
    """Whether the router's linear layer has a bias."""
    capacity_factor: Optional[float] = number(None, ROUTER_NUMBERS["capacity_factor"])
    """An expert takes at most ceil(capacity_factor * tokens * top_k / experts) tokens of a micro-batch;
    null: dropless.
    """
    drop: DropPolicy = DropPolicy.position
    """Which tokens an expert with too many keeps: the first ones, or those with the largest routing weights."""
    norm: bool = False
    """The router's input is divided by its root mean square and multiplied by a learned vector (Gemma 4)."""
    expert_scale: bool = False
    """The routing weights of an expert are multiplied by a learned number (Gemma 4)."""
    jitter: float = number(0.0, ROUTER_NUMBERS["jitter"])
    """In training, router inputs are multiplied by uniform(1 - jitter, 1 + jitter)."""
    workload: Workload = Workload.none
    """Routing that ignores the router's choice, for benchmarks."""
    skew: float = number(1.0, ROUTER_NUMBERS["skew"])
    """Exponent of the workloads zipf and drift: expert i is drawn with probability ~ 1 / (i + 1) ** skew."""
    hot_experts: int = number(1, ROUTER_NUMBERS["hot_experts"])
    """Experts of the block that the workloads from hot_block on make hot (or cold)."""
    allow_future: bool = False
    """Allows expert choice in a causal model, where it depends on future tokens."""
    replay: Optional[str] = None
    """`record` writes which experts every token chooses into `routes/` of the run; the path of such a folder makes
    tokens choose them again.
    """


@dataclass(kw_only=True)
class LossesConfig:
    """`balance.losses`: coefficients of the auxiliary losses, 0 for none; several may be used at once."""

    micro_batch: float = number(0.0, BALANCE_NUMBERS["losses.micro_batch"])
    """Load-balancing loss over one micro-batch (Switch and GShard)."""
    sequence: float = number(0.0, BALANCE_NUMBERS["losses.sequence"])
    """Load-balancing loss over each sequence (DeepSeek)."""
    global_batch: float = number(0.0, BALANCE_NUMBERS["losses.global_batch"])
    """Load-balancing loss over the global batch (Qwen)."""
    z: float = number(0.0, BALANCE_NUMBERS["losses.z"])
    """Router z-loss (ST-MoE): the mean squared logsumexp of the logits."""


@dataclass(kw_only=True)
class BalanceConfig:
    """`balance`: load balancing."""

    rule: BalanceRule = BalanceRule.none
    """Whether a correction bias balances the load: one that is nudged (`bias`, DeepSeek-V3), or solved from the scores
    of the global batch (`quantile`, Kimi K3).
    """
    update: BiasUpdate = BiasUpdate.sign
    """How the correction bias changes per optimizer step: by the sign of mean load - load, or in proportion to it."""
    rate: float = number(1e-3, BALANCE_NUMBERS["rate"])
    """Step of the correction bias per optimizer step, positive with rule=bias."""
    recenter: bool = False
    """With rule=bias, the mean of the bias is subtracted after every update (torchtitan)."""
    losses: LossesConfig = field(default_factory=LossesConfig)


@dataclass(kw_only=True)
class PerLayerConfig:
    """`per_layer.NAME`: different settings for some of the rewritten layers."""

    match: str = "*"
    """Shell pattern on the module path."""
    layers: str = ":"
    """Python slice over the rewritten layers."""
    experts: dict[str, Any] = field(default_factory=dict)
    """Keys of `experts` with their values for these layers."""
    routing: dict[str, Any] = field(default_factory=dict)
    """Keys of `routing` with their values for these layers."""
    balance: dict[str, Any] = field(default_factory=dict)
    """Keys of `balance` with their values for these layers."""
