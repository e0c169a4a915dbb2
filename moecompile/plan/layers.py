"""What becomes of one site: its experts, its router, where the experts live and how tokens reach them."""

from __future__ import annotations

from dataclasses import dataclass

from moecompile.errors import PlanError
from moecompile.plan.sites import FFNSite


@dataclass(frozen=True, kw_only=True)
class ExpertsPlan:
    """num_routed experts of width d_expert, and a shared expert of width d_shared (0: none) that every token visits."""

    num_routed: int
    granularity: int
    num_shared: int
    d_expert: int
    d_shared: int
    init: str


@dataclass(frozen=True, kw_only=True)
class RoutingPlan:
    """The router as a function of its logits: every field is part of the model, none of the mesh."""

    top_k: int
    score: str
    normalize: bool
    scale: float
    groups: int
    top_groups: int
    group_score: str

    def __post_init__(self) -> None:
        if not 1 <= self.top_groups <= self.groups:
            raise PlanError("routing.top_groups", self.top_groups, f"must lie in 1 .. groups={self.groups}", "Lower it")


@dataclass(frozen=True, kw_only=True)
class BalancePlan:
    """rule: none or bias. rate: step of the correction bias per optimizer step."""

    rule: str
    rate: float


@dataclass(frozen=True, kw_only=True)
class ExpertPlacement:
    """Expert -> EP rank: expert i lives on EP rank i // experts_per_rank, so every expert is placed exactly once."""

    num_experts: int
    ep: int

    def __post_init__(self) -> None:
        if self.num_experts % self.ep:
            raise PlanError(
                "experts.num_routed",
                self.num_experts,
                f"must be a multiple of mesh.ep={self.ep}",
                f"Use {(self.num_experts // self.ep + 1) * self.ep}",
            )

    @property
    def experts_per_rank(self) -> int:
        """Local experts of one EP rank."""
        return self.num_experts // self.ep

    def rank_of(self, expert: int) -> int:
        """EP rank that holds global `expert`."""
        return expert // self.experts_per_rank

    def experts_of(self, ep_rank: int) -> range:
        """Global expert ids on `ep_rank`."""
        return range(ep_rank * self.experts_per_rank, (ep_rank + 1) * self.experts_per_rank)


# Forward exchanges that each dispatch inserts for one layer, in order.
EXCHANGES: dict[str, tuple[str, ...]] = {
    "local": (),
    "flat": ("exchange_counts", "all_to_all", "all_to_all"),
    "dedup": ("exchange_counts", "all_to_all", "exchange_assignments", "all_to_all"),
}


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """kind: local, flat or dedup. axis: the logical mesh axis of the exchanges."""

    kind: str
    axis: str = "ep"

    def __post_init__(self) -> None:
        if self.kind not in EXCHANGES:
            raise PlanError("dispatch.kind", self.kind, f"must be one of {list(EXCHANGES)}", "Use one of these")

    @property
    def exchanges(self) -> tuple[str, ...]:
        """Names of the exchange ops that `lower` inserts, in order."""
        return EXCHANGES[self.kind]


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One site and everything that is decided about it.

    Raises:
        PlanError: parts that contradict each other.
    """

    site: FFNSite
    experts: ExpertsPlan
    routing: RoutingPlan
    balance: BalancePlan
    placement: ExpertPlacement
    dispatch: DispatchPlan

    def __post_init__(self) -> None:
        where = self.site.fqn or "the graph"
        if self.placement.num_experts != self.experts.num_routed:
            raise PlanError(
                f"layers[{where}].placement.num_experts", self.placement.num_experts,
                f"must be experts.num_routed={self.experts.num_routed}", "Place every expert once",
            )  # fmt: skip
        if (self.dispatch.kind == "local") != (self.placement.ep == 1):
            raise PlanError(
                f"layers[{where}].dispatch.kind", self.dispatch.kind,
                f"local means one EP rank and nothing else does, but ep={self.placement.ep}",
                "Use local for ep=1, flat or dedup for more",
            )  # fmt: skip
        if self.experts.num_routed % self.routing.groups:
            raise PlanError(
                f"layers[{where}].routing.groups", self.routing.groups,
                f"must divide experts.num_routed={self.experts.num_routed}", "Use a divisor",
            )  # fmt: skip
