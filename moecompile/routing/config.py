"""The router and its load balancing as frozen data classes, with their rules.

`moecompile.schema.router_config` resolves a layer's config into them, plans contain them (as `RoutingPlan` and
`BalancePlan`) and `nn.Router` takes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moecompile.errors import ConfigError
from moecompile.ranges import Real, Whole, check_word
from moecompile.routing.choices import BalanceRule, BiasUpdate, Choice, DropPolicy, GroupScore, Workload
from moecompile.routing.scores import NO_SUCH_SCORE, SCORES

ROUTER_NUMBERS: Mapping[str, Whole | Real] = {
    "top_k": Whole(1),
    "scale": Real("(0, inf)", "Use 1.0"),
    "groups": Whole(1),
    "top_groups": Whole(1),
    "capacity_factor": Real("(0, inf)", "Use 1.25, or null for dropless"),
    "jitter": Real("[0, 1)", "Use 0.01"),
    "skew": Real("(0, inf)", "Use 1.0"),
    "hot_experts": Whole(1),
}
"""Field -> its range."""

_WORDS: Mapping[str, Iterable[str]] = {
    "choice": Choice,
    "group_score": GroupScore,
    "drop": ("none", *DropPolicy),
    "workload": Workload,
}


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """The router as a function of its logits: every field belongs to the model, none to the mesh.

    Raises:
        ConfigError: a value is out of range, or two contradict each other.
    """

    top_k: int
    """Experts per token."""
    score: str
    """`softmax`; `sigmoid`; `softmax_after_topk`: experts are chosen by their logits, and the weights are a softmax
    over the chosen ones only (gpt-oss), which sums to 1 for both values of `normalize`; `sqrt_softplus`, the root of
    log(1 + exp(logit)) (DeepSeek-V4); `sigmoid_after_topk`: the same with sigmoids of the chosen logits (Llama 4,
    Cohere2-MoE), which `normalize` may divide by their sum; `own`: the model's own router.
    """
    normalize: bool
    """Whether the weights of a token are normalized to sum to `scale`; else they are the scores times `scale`."""
    scale: float
    """Factor of the routing weights."""
    groups: int
    """Number of groups of consecutive experts."""
    top_groups: int
    """Number of groups that a token may use."""
    group_score: str
    """`max` (DeepSeek-V2), `top2` (DeepSeek-V3 in transformers) or `topk_over_m` (sum of the top_k / top_groups best,
    as in the DeepSeek-V3 report).
    """
    choice: str = "token"
    """`token`, or `expert`: every expert takes its highest-scoring tokens, a fraction top_k / num_experts of all times
    `capacity_factor` (1 if it is None), with score * scale as the weight (arXiv 2202.09368); or `hash`: the experts of
    a token follow from its id, and their weights from its scores (moecompile.ops.choice).
    """
    bias: bool = False
    """Whether the logits have a bias."""
    capacity_factor: float | None = None
    """An expert keeps at most ceil(capacity_factor * T * K / E) of the T tokens of a forward; None: dropless."""
    drop: str = "none"
    """Which tokens an expert keeps: the first ones (`position`) or those with the largest weights (`score`)."""
    jitter: float = 0.0
    """In training, the router's input is multiplied by uniform(1 - jitter, 1 + jitter)."""
    workload: str = "none"
    """Synthetic choice of experts for benchmarks (moecompile.ops.workload); weights are the scores of those chosen."""
    skew: float = 1.0
    """Exponent of the workloads `zipf` and `drift`."""
    hot_experts: int = 1
    """Experts of the block of the workloads from `hot_block` on."""
    norm: bool = False
    """Whether the router's input is divided by its root mean square, and multiplied by a learned vector / sqrt(D)
    (Gemma 4).
    """
    expert_scale: bool = False
    """Whether the routing weights of an expert are multiplied by a learned number, last of all (Gemma 4)."""
    even_groups: bool = False
    """Whether a token uses the top_k / groups best experts of every group (MoGE, arXiv 2505.21411)."""

    def __post_init__(self) -> None:
        for name, allowed in ROUTER_NUMBERS.items():
            if (value := getattr(self, name)) is not None:
                allowed.check(f"routing.{name}", value)
        for name, words in _WORDS.items():
            check_word(words, f"routing.{name}", getattr(self, name))
        if not self.is_own:
            check_word(SCORES, "routing.score", self.score, NO_SUCH_SCORE)
        if self.top_groups > self.groups:
            raise ConfigError(
                "routing.top_groups", self.top_groups, f"there are only routing.groups={self.groups} groups",
                f"Use at most {self.groups}",
            )  # fmt: skip
        if (self.capacity_factor is None) != (self.drop == "none"):
            rule = "must be none if and only if capacity_factor is null"
            raise ConfigError("routing.drop", self.drop, rule, "Correct the plan")
        if self.even_groups:
            self._check_even_groups()

    def _check_even_groups(self) -> None:
        for path, value, broken, rule, fix in (
            ("choice", self.choice, self.choice != "token", "leaves no choice to the token", "Use token"),
            ("groups", self.groups, self.groups == 1, "is no division of the experts", "Use a divisor of them"),
            ("top_groups", self.top_groups, self.top_groups < self.groups, "closes some groups", f"Use {self.groups}"),
            (
                "top_k", self.top_k, self.top_k % self.groups > 0, f"is not a multiple of routing.groups={self.groups}",
                f"Use {(self.top_k // self.groups + 1) * self.groups}",
            ),
        ):  # fmt: skip
            if broken:
                why = "and routing.even_groups=true lets a token choose as many experts of every group"
                raise ConfigError(f"routing.{path}", value, f"{rule}, {why}", f"{fix}, or routing.even_groups=false")

    @property
    def dropless(self) -> bool:
        """Whether every token gets all of its top_k experts, so the number of assignments is known in advance."""
        return self.choice != "expert" and self.capacity_factor is None

    @property
    def has_groups(self) -> bool:
        """Whether the groups bear on a token's choice."""
        return self.even_groups or self.top_groups < self.groups

    def most_per_token(self, num_experts: int) -> int:
        """The most experts that one token may have."""
        return num_experts if self.choice == "expert" else self.top_k

    @property
    def sums_to_scale(self) -> bool:
        """Whether the routing weights of every token sum to `scale`, as with a softmax over the chosen logits.

        With `expert_scale` they do until it is trained: it starts at 1.
        """
        return self.normalize or (not self.is_own and SCORES[self.score].sums_to_one)

    @property
    def is_own(self) -> bool:
        """Whether it is the model's own router."""
        return self.score == "own"

    def check_experts(self, num_experts: int, virtual_group: int = 1) -> None:
        """Checks that the groups divide the experts, and that the open groups have at least top_k experts.

        Args:
            virtual_group: number of experts that are one copy of the dense FFN's routed slices. top_k chooses all
                experts of such a group, and no routing group splits it; with `even_groups`, each group has one slice.

        Raises:
            ConfigError: one of these does not hold.
        """
        if self.top_k > num_experts:
            raise ConfigError(
                "routing.top_k", self.top_k, f"a token cannot use more than experts.num_routed={num_experts} experts",
                f"Use at most {num_experts}, or raise experts.num_routed",
            )  # fmt: skip
        if self.workload != "none" and self.hot_experts >= num_experts > 1:
            raise ConfigError(
                "routing.hot_experts", self.hot_experts, f"must be fewer than experts.num_routed={num_experts}",
                f"Use at most {num_experts - 1}",
            )  # fmt: skip
        if num_experts % self.groups:
            raise ConfigError(
                "routing.groups", self.groups, f"must divide experts.num_routed={num_experts}",
                f"Use a divisor of {num_experts}, or change experts.num_routed",
            )  # fmt: skip
        if self.even_groups:
            self._check_block(num_experts // self.groups)
        per_group, available = num_experts // self.groups, num_experts // self.groups * self.top_groups
        if self.top_k > available:
            raise ConfigError(
                "routing.top_k", self.top_k,
                f"only {self.top_groups} groups x {per_group} experts = {available} experts are open to a token",
                "Lower routing.top_k or raise routing.top_groups",
            )  # fmt: skip
        self._check_virtual_groups(num_experts, virtual_group)

    def _check_block(self, size: int) -> None:
        """Even groups of `size` experts cannot be hot as a whole."""
        workload = Workload(self.workload)
        is_block = workload.has_hot_experts and workload is not Workload.hot_spread
        if is_block and self.hot_experts % size == 0:
            rule = f"are whole groups of {size}, of which every token takes as many with routing.even_groups=true"
            fix = f"Use another number than {size} and its multiples, or another routing.workload"
            raise ConfigError("routing.hot_experts", self.hot_experts, rule, fix)

    def _check_virtual_groups(self, num_experts: int, size: int) -> None:
        rule = f"must be a multiple of the routed slices, experts.granularity - experts.num_shared = {size}"
        for path, value in (("experts.num_routed", num_experts), ("routing.top_k", self.top_k)):
            if value % size:
                up = (value // size + 1) * size
                raise ConfigError(path, value, rule, f"Use {up}, or experts.init=random")
        if self.even_groups and size > 1 and self.groups != size:
            rule = f"must be the number of routed slices, {size}: with routing.even_groups=true a group is one slice"
            raise ConfigError("routing.groups", self.groups, rule, f"Use {size}, or auto")
        if not self.even_groups and num_experts // self.groups % size:
            raise ConfigError(
                "routing.groups", self.groups, f"a virtual group of {size} experts would straddle routing groups",
                f"Make experts.num_routed / routing.groups a multiple of {size}",
            )  # fmt: skip


# -- balance ---------------------------------------------------------------------------------------------------------

_LOSS = Real("[0, inf)", "Use 0 for none")
LOAD_LOSSES = ("micro_batch", "sequence", "global_batch")
LOSSES = (*LOAD_LOSSES, "z")
"""Auxiliary losses, those that even the load first; the fields with their coefficients have the same names."""
OWN_LOSSES: Mapping[str, str] = {
    "router_aux_loss_coef": "micro_batch",
    "aux_loss_coef": "micro_batch",
    "ffn_config.moe_loss_weight": "micro_batch",
    "router_z_loss_coef": "z",
}
"""Key of transformers' configs with the coefficient of a loss of the model's own routers -> that loss."""
BALANCE_NUMBERS: Mapping[str, Real] = {
    "rate": Real("[0, inf)", "Use 0.001 or balance.rule=none"),
    **{f"losses.{name}": _LOSS for name in LOSSES},
}
"""Dotted key of `balance` -> its range."""


@dataclass(frozen=True, kw_only=True)
class BalanceSpec:
    """How the load of one layer's experts is balanced.

    Raises:
        ConfigError: a value is out of range, or two contradict each other.
    """

    rule: str
    """`none`; `bias`: a correction bias that depends on the load; `quantile`: one that is solved from the scores."""
    rate: float
    """Step of the correction bias per optimizer step; 0 unless the rule is `bias`."""
    update: str = "sign"
    """How the bias is updated: `sign` or `proportional`, see `nn.update_balance`."""
    micro_batch: float = 0.0
    """Coefficient of the loss over one micro-batch (Switch, GShard); 0 for none."""
    sequence: float = 0.0
    """Coefficient of the loss over each sequence (DeepSeek); 0 for none."""
    global_batch: float = 0.0
    """Coefficient of the loss over the global batch (Qwen); 0 for none."""
    z: float = 0.0
    """Coefficient of the router z-loss (ST-MoE); 0 for none."""
    recenter: bool = False
    """With rule=bias: whether the mean of the bias over the experts is subtracted after every update (torchtitan)."""

    def __post_init__(self) -> None:
        check_word((rule for rule in BalanceRule if rule is not BalanceRule.auto), "balance.rule", self.rule)
        check_word(BiasUpdate, "balance.update", self.update)
        for key, allowed in BALANCE_NUMBERS.items():
            name = key.rpartition(".")[2]
            allowed.check(f"balance.{name}", getattr(self, name))
        if self.rule != "bias" and self.rate:
            rule = f"must be 0 with balance.rule={self.rule}"
            raise ConfigError("balance.rate", self.rate, rule, "Use 0, or rule=bias")
        if self.rule != "bias" and self.recenter:
            rule = f"centres the bias that balance.rule=bias moves, and the rule is {self.rule}"
            raise ConfigError("balance.recenter", True, rule, "Use false, or balance.rule=bias")

    @property
    def has_bias(self) -> bool:
        """Whether a correction bias takes part in the choice of experts."""
        return self.rule != "none"

    @property
    def losses(self) -> dict[str, float]:
        """Auxiliary losses in use -> coefficient."""
        return {name: getattr(self, name) for name in LOSSES if getattr(self, name)}


BINS = 1000
"""Of the histograms of quantile balancing, as in Kimi K3's report."""
NO_BALANCE = BalanceSpec(rule="none", rate=0.0)
AUTO_LOSSES: Mapping[str, float] = {"micro_batch": 0.01}
"""Losses of a router that is made here, where the config leaves them open: Switch's, with its coefficient."""


def check_balance(router: RouterConfig, balance: BalanceSpec) -> None:
    """Refuses load balancing where tokens do not choose by their scores, and quantiles of scores without bounds.

    Raises:
        ConfigError: a balance rule or loss with expert choice or a hash; the z-loss is allowed, since it does not
            balance. Or quantile balancing with scores that may leave [0, 1], or with a group limit.
    """
    if router.choice != "token":
        wrong: list[tuple[str, str | float]] = [("balance.rule", balance.rule)] if balance.rule != "none" else []
        wrong += [(f"balance.losses.{name}", value) for name, value in balance.losses.items() if name != "z"]
        reason = {
            "expert": "experts choose tokens: their load is even by itself",
            "hash": "a hash of the token id chooses: no score could move the load",
        }
        for path, value in wrong[:1]:
            none = "Use none" if path == "balance.rule" else "Use 0"
            fix = "Leave it out" if router.choice == "expert" else none
            raise ConfigError(path, value, f"has no meaning where {reason[router.choice]}", fix)
    if balance.rule != "quantile":
        return
    if not SCORES[router.score].in_unit_interval:
        bounded = " or ".join(sorted(score for score, rule in SCORES.items() if rule.in_unit_interval))
        rule = f"needs scores in [0, 1], and those of routing.score={router.score} have no bounds"
        fix = f"Use routing.score={bounded}, or balance.rule=bias"
        raise ConfigError("balance.rule", balance.rule, rule, fix)
    if router.top_groups < router.groups:
        rule = f"compares a token's experts, and only {router.top_groups} of {router.groups} groups are open to it"
        raise ConfigError("balance.rule", balance.rule, rule, "Use balance.rule=bias, or no group limit")
    if router.even_groups:
        rule = "compares all of a token's experts, and routing.even_groups=true lets those of a group compete"
        raise ConfigError("balance.rule", balance.rule, rule, "Use balance.rule=bias, or routing.even_groups=false")
