"""The router and its balance as frozen nouns, with the rules that hold for each and between them.

What a layer's config resolves into (`moecompile.schema.router_config`), what its plan holds (`RoutingPlan`,
`BalancePlan` are these classes) and what `nn.Router` takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moecompile.errors import ConfigError
from moecompile.ranges import Real, Whole, check_word
from moecompile.routing.choices import BalanceRule, BiasUpdate, Choice, DropPolicy, GroupScore, Score, Workload

ROUTER_NUMBERS: Mapping[str, Whole | Real] = {
    "top_k": Whole(1),
    "scale": Real("(0, inf)", "Use 1.0"),
    "groups": Whole(1),
    "top_groups": Whole(1),
    "capacity_factor": Real("(0, inf)", "Use 1.25, or null for dropless"),
    "jitter": Real("[0, 1)", "Use 0.01"),
    "skew": Real("(0, inf)", "Use 1.0"),
}
"""Field -> its range."""

_WORDS = {
    "choice": Choice,
    "score": (*Score, "own"),
    "group_score": GroupScore,
    "drop": ("none", *DropPolicy),
    "workload": Workload,
}


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """The router as a function of its logits: every field is part of the model, none of the mesh.

    Raises:
        ConfigError: a value out of its range, or two that contradict each other.
    """

    top_k: int
    """Experts of a token."""
    score: str
    """`softmax`; `sigmoid`; `softmax_after_topk`: experts are chosen by their logits, and the weights are a softmax
    over the chosen ones alone (gpt-oss), which sums to 1 whatever `normalize` says; `own`: the model's own router.
    """
    normalize: bool
    """The weights of a token sum to `scale`; else they are the scores times `scale`."""
    scale: float
    """Factor of the routing weights."""
    groups: int
    """Contiguous groups of experts."""
    top_groups: int
    """Groups that a token may use."""
    group_score: str
    """`max` (DeepSeek-V2), `top2` (DeepSeek-V3 as transformers computes it) or `topk_over_m` (sum of the
    top_k / top_groups best, as the DeepSeek-V3 report says).
    """
    choice: str = "token"
    """`token`, or `expert`: every expert takes the tokens that it scores highest, top_k / num_experts of them times
    `capacity_factor` (1 if it is None), with score * scale as the weight (arXiv 2202.09368).
    """
    bias: bool = False
    """Whether the logits have a bias."""
    capacity_factor: float | None = None
    """An expert keeps at most ceil(capacity_factor * T * K / E) of the T tokens of a forward; None: dropless."""
    drop: str = "none"
    """Which tokens it keeps: the first ones (`position`) or those with the largest weights (`score`)."""
    jitter: float = 0.0
    """In training the router's input is multiplied by uniform(1 - jitter, 1 + jitter)."""
    workload: str = "none"
    """A choice of experts for benchmarks (moecompile.ops.workload); weights stay the scores of the chosen."""
    skew: float = 1.0
    """Exponent of the workloads `zipf` and `drift`."""

    def __post_init__(self) -> None:
        for name, allowed in ROUTER_NUMBERS.items():
            if (value := getattr(self, name)) is not None:
                allowed.check(f"routing.{name}", value)
        for name, words in _WORDS.items():
            check_word(words, f"routing.{name}", getattr(self, name))
        if self.top_groups > self.groups:
            raise ConfigError(
                "routing.top_groups", self.top_groups, f"there are only routing.groups={self.groups} groups",
                f"Use at most {self.groups}",
            )  # fmt: skip
        if (self.capacity_factor is None) != (self.drop == "none"):
            raise ConfigError("routing.drop", self.drop, "is none without a capacity_factor, else not", "Mend the plan")

    @property
    def dropless(self) -> bool:
        """Whether every token gets all of its top_k experts, so that the number of assignments is known in advance."""
        return self.choice == "token" and self.capacity_factor is None

    @property
    def is_own(self) -> bool:
        """Whether it is a router that the model has already."""
        return self.score == "own"

    def check_experts(self, num_experts: int, virtual_group: int = 1) -> None:
        """Whether the groups divide the experts, and the open ones hold as many as a token uses.

        Args:
            virtual_group: experts that are one copy of the dense FFN's routed slices. top_k chooses such a group whole,
                and no routing group splits it.

        Raises:
            ConfigError: they do not.
        """
        if self.top_k > num_experts:
            raise ConfigError(
                "routing.top_k", self.top_k, f"a token cannot use more than experts.num_routed={num_experts} experts",
                f"Use at most {num_experts}, or raise experts.num_routed",
            )  # fmt: skip
        if num_experts % self.groups:
            raise ConfigError(
                "routing.groups", self.groups, f"must divide experts.num_routed={num_experts}",
                f"Use a divisor of {num_experts}, or change experts.num_routed",
            )  # fmt: skip
        per_group, held = num_experts // self.groups, num_experts // self.groups * self.top_groups
        if self.top_k > held:
            raise ConfigError(
                "routing.top_k", self.top_k,
                f"only {self.top_groups} groups x {per_group} experts = {held} experts are open to a token",
                "Lower routing.top_k or raise routing.top_groups",
            )  # fmt: skip
        self._check_virtual_groups(num_experts, virtual_group)

    def _check_virtual_groups(self, num_experts: int, size: int) -> None:
        rule = f"must be a multiple of the routed slices, experts.granularity - experts.num_shared = {size}"
        for path, value in (("experts.num_routed", num_experts), ("routing.top_k", self.top_k)):
            if value % size:
                up = (value // size + 1) * size
                raise ConfigError(path, value, rule, f"Use {up}, or experts.init=random")
        if num_experts // self.groups % size:
            raise ConfigError(
                "routing.groups", self.groups, f"a virtual group of {size} experts would straddle routing groups",
                f"Make experts.num_routed / routing.groups a multiple of {size}",
            )  # fmt: skip


# -- balance ---------------------------------------------------------------------------------------------------------

_LOSS = Real("[0, inf)", "Use 0 for none")
LOSSES = ("micro_batch", "sequence", "global_batch", "z")
"""Auxiliary losses, by the fields that hold their coefficients."""
BALANCE_NUMBERS: Mapping[str, Real] = {
    "rate": Real("[0, inf)", "Use 0.001 or balance.rule=none"),
    **{f"losses.{name}": _LOSS for name in LOSSES},
}
"""Dotted key of `balance` -> its range."""


@dataclass(frozen=True, kw_only=True)
class BalanceSpec:
    """How the load of one layer's experts is evened out.

    Raises:
        ConfigError: a value out of its range, or two that contradict each other.
    """

    rule: str
    """`none`, or `bias`: a correction bias follows the load."""
    rate: float
    """Step of the correction bias per optimizer step; 0 without a rule."""
    update: str = "sign"
    """How the bias moves: `sign` or `proportional`, see `nn.update_balance`."""
    micro_batch: float = 0.0
    """Coefficient of the loss over one micro-batch (Switch, GShard); 0 for none."""
    sequence: float = 0.0
    """Coefficient of the loss over each sequence (DeepSeek); 0 for none."""
    global_batch: float = 0.0
    """Coefficient of the loss over the global batch (Qwen); 0 for none."""
    z: float = 0.0
    """Coefficient of the router z-loss (ST-MoE); 0 for none."""

    def __post_init__(self) -> None:
        check_word(BalanceRule, "balance.rule", self.rule)
        check_word(BiasUpdate, "balance.update", self.update)
        for key, allowed in BALANCE_NUMBERS.items():
            name = key.rpartition(".")[2]
            allowed.check(f"balance.{name}", getattr(self, name))
        if self.rule == "none" and self.rate:
            raise ConfigError("balance.rate", self.rate, "must be positive, or 0 without a rule", "Mend the plan")

    @property
    def losses(self) -> dict[str, float]:
        """Auxiliary losses in use -> coefficient."""
        return {name: getattr(self, name) for name in LOSSES if getattr(self, name)}


NO_BALANCE = BalanceSpec(rule="none", rate=0.0)


def check_balance(router: RouterConfig, balance: BalanceSpec) -> None:
    """Whether there is a load to be evened out: experts that choose take as many tokens each.

    Raises:
        ConfigError: a rule or a loss where experts choose tokens; the z-loss evens nothing out.
    """
    if router.choice != "expert":
        return
    wrong: list[tuple[str, str | float]] = [("balance.rule", balance.rule)] if balance.rule != "none" else []
    wrong += [(f"balance.losses.{name}", value) for name, value in balance.losses.items() if name != "z"]
    if wrong:
        path, value = wrong[0]
        raise ConfigError(
            path, value, "has no meaning where experts choose tokens: their load is even by itself", "Leave it out"
        )
