"""What becomes of one site: its experts, its router, where the experts live and how tokens reach them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from moecompile.errors import PlanError
from moecompile.plan.sites import ExpertsSite, PlannedSite
from moecompile.schema import (
    BalanceRule,
    BiasUpdate,
    Choice,
    DropPolicy,
    ExpertInit,
    GroupScore,
    Score,
    WeightScaling,
    WireDtype,
    Workload,
)

# What a plan may say: what configs offer, and what is read from a model.
_INITS = (*ExpertInit, "existing")
_SCORES = (*Score, "own")
_DROPS = ("none", *DropPolicy)


def _at_least(least: int, path: str, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise PlanError(f"{path}.{name}", value, f"must be at least {least}", "Mend the plan")


def _one_of(known: Iterable[str], path: str, value: str) -> None:
    words = [item.value if isinstance(item, Enum) else item for item in known]
    if value not in words:
        raise PlanError(path, value, f"must be one of {words}", "Use one of these")


@dataclass(frozen=True, kw_only=True)
class ExpertsPlan:
    """num_routed experts of width d_expert, and a shared expert of width d_shared (0: none) that every token visits.

    init: where the weights come from; `existing`: the model has the experts already. shared_gate: whether the shared
    expert's output is multiplied by a learned sigmoid. drop_ratio: part of an expert's hidden units that is drawn anew.
    weight_scaling: what makes up for the routing weights (docs/understand/upcycling.md).
    """

    num_routed: int
    granularity: int
    num_shared: int
    d_expert: int
    d_shared: int
    init: str
    shared_gate: bool = False
    drop_ratio: float = 0.0
    weight_scaling: str = "exact"

    def __post_init__(self) -> None:
        _at_least(1, "experts", num_routed=self.num_routed, granularity=self.granularity, d_expert=self.d_expert)
        _at_least(0, "experts", num_shared=self.num_shared)
        _one_of(_INITS, "experts.init", self.init)
        _one_of(WeightScaling, "experts.weight_scaling", self.weight_scaling)
        if self.d_shared != self.num_shared * self.d_expert:
            raise PlanError(
                "experts.d_shared", self.d_shared,
                f"must be num_shared * d_expert = {self.num_shared} * {self.d_expert}",
                f"Use {self.num_shared * self.d_expert}",
            )  # fmt: skip
        if self.init == "copy" and self.granularity != 1:
            raise PlanError("experts.granularity", self.granularity, "must be 1, init=copy copies whole FFNs", "Use 1")
        if (self.init == "drop") != (0 < self.drop_ratio <= 1):
            raise PlanError(
                "experts.drop_ratio", self.drop_ratio, "lies in (0, 1] with init=drop, else is 0", "Mend the plan"
            )
        if self.is_sliced and self.num_shared >= self.granularity:
            raise PlanError(
                "experts.num_shared", self.num_shared,
                f"must leave a slice to the routed experts, granularity={self.granularity}", "Lower it",
            )  # fmt: skip

    @property
    def is_sliced(self) -> bool:
        """Whether routed experts are slices of the dense FFN, else they are copies of it or have nothing of it."""
        return self.init == "virtual_group" or (self.init == "drop" and self.granularity > 1)

    @property
    def virtual_group(self) -> int:
        """Routed experts that together are one copy of the dense FFN's routed slices (1 without slices)."""
        return self.granularity - self.num_shared if self.is_sliced else 1


@dataclass(frozen=True, kw_only=True)
class RoutingPlan:
    """The router as a function of its logits: every field is part of the model, none of the mesh.

    score: `own` is a router that the model has already and that stays as it is. capacity_factor: None is dropless, and
    drop is then `none`. workload, skew: routing for benchmarks.
    """

    top_k: int
    score: str
    normalize: bool
    scale: float
    groups: int
    top_groups: int
    group_score: str
    choice: str = "token"
    bias: bool = False
    capacity_factor: float | None = None
    drop: str = "none"
    jitter: float = 0.0
    workload: str = "none"
    skew: float = 1.0

    def __post_init__(self) -> None:
        _at_least(1, "routing", top_k=self.top_k, groups=self.groups)
        _one_of(Choice, "routing.choice", self.choice)
        _one_of(_SCORES, "routing.score", self.score)
        _one_of(GroupScore, "routing.group_score", self.group_score)
        _one_of(_DROPS, "routing.drop", self.drop)
        _one_of(Workload, "routing.workload", self.workload)
        if (self.capacity_factor is None) != (self.drop == "none"):
            raise PlanError("routing.drop", self.drop, "is none without a capacity_factor, else not", "Mend the plan")
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise PlanError("routing.capacity_factor", self.capacity_factor, "must be positive", "Use 1.25")
        if not 0 <= self.jitter < 1:
            raise PlanError("routing.jitter", self.jitter, "must lie in [0, 1)", "Use 0.0")
        if not self.scale > 0:
            raise PlanError("routing.scale", self.scale, "must be positive", "Use 1.0")
        if not 1 <= self.top_groups <= self.groups:
            raise PlanError("routing.top_groups", self.top_groups, f"must lie in 1 .. groups={self.groups}", "Lower it")

    @property
    def dropless(self) -> bool:
        """Whether every token gets all of its top_k experts, so that the number of assignments is known in advance."""
        return self.choice == "token" and self.capacity_factor is None


@dataclass(frozen=True, kw_only=True)
class BalancePlan:
    """rule: none or bias. rate: step of the correction bias per optimizer step. update: how it moves.

    micro_batch, sequence, global_batch, z: coefficients of auxiliary losses, 0 for none.
    """

    rule: str
    rate: float
    update: str = "sign"
    micro_batch: float = 0.0
    sequence: float = 0.0
    global_batch: float = 0.0
    z: float = 0.0

    def __post_init__(self) -> None:
        _one_of(BalanceRule, "balance.rule", self.rule)
        _one_of(BiasUpdate, "balance.update", self.update)
        for name, value in self.losses.items():
            if not value > 0:
                raise PlanError(f"balance.{name}", value, "must not be negative", "Use 0 for none")
        if not self.rate >= 0 or (self.rule == "none" and self.rate):
            raise PlanError("balance.rate", self.rate, "must be positive, or 0 without a rule", "Mend the plan")

    @property
    def losses(self) -> dict[str, float]:
        """Auxiliary losses in use -> coefficient."""
        names = ("micro_batch", "sequence", "global_batch", "z")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


@dataclass(frozen=True, kw_only=True)
class ExpertPlacement:
    """Expert -> EP rank: expert i lives on EP rank i // experts_per_rank, so every expert is placed exactly once.

    nodes: nodes that the EP group spans, equally many of its ranks on each.
    """

    num_experts: int
    ep: int
    nodes: int = 1

    def __post_init__(self) -> None:
        _at_least(1, "placement", num_experts=self.num_experts, ep=self.ep, nodes=self.nodes)
        if self.num_experts % self.ep:
            raise PlanError(
                "experts.num_routed",
                self.num_experts,
                f"must be a multiple of mesh.ep={self.ep}",
                f"Use {(self.num_experts // self.ep + 1) * self.ep}",
            )
        if self.ep % self.nodes:
            raise PlanError("placement.nodes", self.nodes, f"must divide placement.ep={self.ep}", "Plan again")

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


# Forward exchanges that each dispatch inserts for one layer, in order, each with the part of the axis that it crosses:
# "" the whole EP group, "_inter" the same local position on each of its nodes, "_intra" its ranks on one node.
_STEPS: dict[str, tuple[tuple[str, str], ...]] = {
    "local": (),
    "flat": (("exchange_counts", ""), ("all_to_all", ""), ("all_to_all", "")),
    "dedup": (("exchange_counts", ""), ("all_to_all", ""), ("exchange_assignments", ""), ("all_to_all", "")),
    "hierarchical": (
        ("send_counts", "_inter"), ("send_counts", "_intra"),
        ("all_to_all", "_inter"), ("exchange_assignments", "_inter"),
        ("all_to_all", "_intra"), ("exchange_assignments", "_intra"),
        ("all_to_all", "_intra"), ("all_to_all", "_inter"),
    ),
    "allgather": (
        ("exchange_counts", ""),
        ("all_gather", "_inter"), ("gather_assignments", "_inter"),
        ("all_gather", "_intra"), ("gather_assignments", "_intra"),
        ("reduce_scatter", "_intra"), ("reduce_scatter", "_inter"),
    ),
}  # fmt: skip
EXCHANGES: dict[str, tuple[str, ...]] = {kind: tuple(op for op, _ in steps) for kind, steps in _STEPS.items()}
HALVES = {name: (f"{name}_start", f"{name}_wait") for name in ("all_to_all", "exchange_assignments")}
"""Exchanges that can be in flight -> the op that starts one and the op that waits for it."""
EXCHANGE_OPS = frozenset(op for ops in EXCHANGES.values() for op in ops) | {start for start, _ in HALVES.values()}
WAIT_OPS = frozenset(wait for _, wait in HALVES.values())
IN_FLIGHT = frozenset(kind for kind, ops in EXCHANGES.items() if set(ops) & set(HALVES))
"""Kinds whose exchanges of rows can be in flight."""
FUSABLE = frozenset(EXCHANGES) - {"flat"}
"""Kinds that copy and sum rows on the rank of the experts. flat does it on the rank of the tokens, around the wire."""


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """How tokens reach their experts.

    kind: local, flat, dedup, hierarchical or allgather. axis: the logical mesh axis of the exchanges; those on two
    levels use `<axis>_inter` and `<axis>_intra`. wire_dtype: what rows are cast to for an exchange (auto: nothing).
    overlap: what is computed while rows are on the wire: nothing (none), the shared experts (shared), or those and the
    experts of other `chunks` of the tokens (chunks).
    """

    kind: str
    axis: str = "ep"
    wire_dtype: str = "auto"
    overlap: str = "none"
    chunks: int = 1

    def __post_init__(self) -> None:
        _one_of(tuple(EXCHANGES), "dispatch.kind", self.kind)
        _one_of(WireDtype, "dispatch.wire_dtype", self.wire_dtype)
        _one_of(("none", "shared", "chunks"), "dispatch.overlap", self.overlap)
        if self.in_flight and self.kind not in IN_FLIGHT:
            raise PlanError("dispatch.overlap", self.overlap, f"is not there for dispatch.kind={self.kind}", "Use none")
        if (self.overlap == "chunks") != (self.chunks > 1) or self.chunks < 1:
            raise PlanError(
                "dispatch.chunks", self.chunks, "is at least 2 with dispatch.overlap=chunks, else 1", "Use 2, or none"
            )

    @property
    def in_flight(self) -> bool:
        """Whether exchanges of rows are started and waited for apart."""
        return self.overlap != "none"

    @property
    def exchanges(self) -> tuple[str, ...]:
        """Names of the exchange ops of this kind, in order."""
        return EXCHANGES[self.kind]

    @property
    def on_two_levels(self) -> bool:
        """Whether ranks of the own node are told from others."""
        return any(part for _, part in _STEPS[self.kind])

    def steps(self, num_nodes: int) -> tuple[tuple[str, str], ...]:
        """The exchange ops that `lower` inserts and the logical axis of each, in order.

        An EP group on one node has no `_inter` axis, and exchanges over it fall away.
        """
        steps = _STEPS[self.kind]
        return tuple((op, self.axis + part) for op, part in steps if part != "_inter" or num_nodes > 1)


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One site and everything that is decided about it.

    fused: whether its experts gather their rows and sum their outputs themselves, in one op.

    Raises:
        PlanError: parts that contradict each other.
    """

    site: PlannedSite
    experts: ExpertsPlan
    routing: RoutingPlan
    balance: BalancePlan
    placement: ExpertPlacement
    dispatch: DispatchPlan
    fused: bool = False

    def __post_init__(self) -> None:
        if self.fused and not can_fuse(self.site, self.dispatch):
            rule = "needs SwiGLU experts without biases (site.swiglu), and a dispatch that is not flat"
            raise PlanError(f"layers[{self.site.fqn or 'the graph'}].fused", True, rule, "Use false")
        for path, value, rule, fix in self._contradictions():
            raise PlanError(f"layers[{self.site.fqn or 'the graph'}].{path}", value, rule, fix)

    @property
    def steps(self) -> tuple[tuple[str, str], ...]:
        """The exchange ops that `lower` inserts and the logical axis of each, in order."""
        return self.dispatch.steps(self.placement.nodes)

    @property
    def scheduled_steps(self) -> tuple[tuple[str, str], ...]:
        """The exchange ops of the final graph and their axes, in order: with overlap, starts, for each chunk.

        A stage begins at each all-to-all. In slot t chunk c does stage t - c, the latest chunk first.
        """
        if not self.dispatch.in_flight:
            return self.steps
        counts = tuple(step for step in self.steps if step[0] not in HALVES)
        stages: list[list[tuple[str, str]]] = []
        for op, axis in (step for step in self.steps if step[0] in HALVES):
            stages += [[]] if op == "all_to_all" else []
            stages[-1].append((HALVES[op][0], axis))
        chunks = self.dispatch.chunks
        slots = range(len(stages) + chunks - 1)
        order = [stages[t - c] for t in slots for c in reversed(range(chunks)) if 0 <= t - c < len(stages)]
        return counts + tuple(step for stage in order for step in stage)

    def _contradictions(self) -> Iterator[tuple[str, object, str, str]]:
        """(path, value, rule, fix) of every rule between the parts that is broken."""
        experts, routing, placement = self.experts, self.routing, self.placement
        existing = isinstance(self.site, ExpertsSite)
        if existing != (experts.init == "existing") or existing != (routing.score == "own"):
            rule = "init=existing and score=own hold for experts that the model has, and for no others"
            yield "experts.init", experts.init, rule, "Mend the plan, or plan again"
        if placement.num_experts != experts.num_routed:
            rule = f"must be experts.num_routed={experts.num_routed}"
            yield "placement.num_experts", placement.num_experts, rule, "Place every expert once"
        if (self.dispatch.kind == "local") != (placement.ep == 1):
            rule = f"local means one EP rank and nothing else does, but ep={placement.ep}"
            yield "dispatch.kind", self.dispatch.kind, rule, "Use local for ep=1, another kind for more"
        if self.dispatch.kind == "hierarchical" and placement.nodes == 1:
            rule = "needs an EP group on two nodes or more, but placement.nodes=1"
            yield "dispatch.kind", self.dispatch.kind, rule, "Use dedup"
        if experts.d_expert * experts.granularity != self.site.d_ff:
            rule = f"must be site.d_ff / granularity = {self.site.d_ff} / {experts.granularity}"
            yield "experts.d_expert", experts.d_expert, rule, "Mend the plan, or plan again"
        if experts.num_routed % routing.groups:
            yield (
                "routing.groups",
                routing.groups,
                f"must divide experts.num_routed={experts.num_routed}",
                "Use a divisor",
            )
        per_group, size = experts.num_routed // routing.groups, experts.virtual_group
        if routing.top_k > routing.top_groups * per_group:
            rule = f"only {routing.top_groups * per_group} experts are open to a token"
            yield "routing.top_k", routing.top_k, rule, f"Use at most {routing.top_groups * per_group}"
        if routing.top_k % size or per_group % size:
            path, value = (
                ("routing.top_k", routing.top_k) if routing.top_k % size else ("routing.groups", routing.groups)
            )
            yield path, value, f"a virtual group of {size} experts would be split", "Mend the plan, or plan again"


def can_fuse(site: PlannedSite, dispatch: DispatchPlan) -> bool:
    """Whether experts at `site` can be computed in one op under `dispatch`."""
    return site.swiglu and dispatch.kind in FUSABLE
