"""The experts of one site, and their placement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from moecompile.errors import PlanError
from moecompile.plan.checks import at_least, plan_errors
from moecompile.ranges import check_object, check_word
from moecompile.schema import (
    ExpertInit,
    WeightScaling,
    check_latent,
    check_placement,
    check_slices,
    is_sliced,
    virtual_group,
)


@dataclass(frozen=True, kw_only=True)
class ExpertsPlan:
    """num_routed experts of width d_expert, and a shared expert of width d_shared (0: none) that every token uses.

    init: how the weights are initialized; `existing`: the model has the experts already. shared_gate: whether the
    shared expert's output is multiplied by a learned sigmoid. shared_routed: whether the router weighs its slices
    beside the chosen experts. num_identity: experts behind the routed ones that return their input. latent_size: width
    in which the routed experts work, between a projection down and one up (None: the model's); latent_norm: whether an
    RMSNorm comes before the one up. drop_ratio: fraction of an expert's hidden units that is reinitialized.
    weight_scaling: what compensates for the routing weights (docs/understand/upcycling.md).
    backend: `module:name` of a back end that computes the experts of a rank.
    """

    num_routed: int
    granularity: int
    num_shared: int
    d_expert: int
    d_shared: int
    init: str
    shared_gate: bool = False
    shared_routed: bool = False
    num_identity: int = 0
    latent_size: int | None = None
    latent_norm: bool = False
    drop_ratio: float = 0.0
    weight_scaling: str = "exact"
    backend: str = ""

    def __post_init__(self) -> None:
        with plan_errors():
            at_least(1, "experts", num_routed=self.num_routed, granularity=self.granularity, d_expert=self.d_expert)
            at_least(0, "experts", num_shared=self.num_shared, num_identity=self.num_identity)
            check_word((*(init for init in ExpertInit if init != "widen"), "existing"), "experts.init", self.init)
            check_word(WeightScaling, "experts.weight_scaling", self.weight_scaling)
            if self.backend:
                check_object("experts.backend", self.backend)
        if self.d_shared != self.num_shared * self.d_expert:
            raise PlanError(
                "experts.d_shared", self.d_shared,
                f"must be num_shared * d_expert = {self.num_shared} * {self.d_expert}",
                f"Use {self.num_shared * self.d_expert}",
            )  # fmt: skip
        with plan_errors():
            check_latent(self.latent_size, self.latent_norm)
            check_slices(self.init, self.granularity, self.num_shared)
        if (self.init == "drop") != (0 < self.drop_ratio <= 1):
            raise PlanError(
                "experts.drop_ratio", self.drop_ratio, "must be in (0, 1] with init=drop, else 0", "Correct the plan"
            )

    @property
    def is_sliced(self) -> bool:
        """Whether routed experts are slices of the dense FFN, not full copies of it or randomly initialized."""
        return is_sliced(self.init, self.granularity)

    @property
    def virtual_group(self) -> int:
        """How many routed experts together are one copy of the dense FFN's routed slices (1 without slices)."""
        return virtual_group(self.init, self.granularity, self.num_shared)


@dataclass(frozen=True, kw_only=True)
class ExpertPlacement:
    """Expert -> EP rank: the expert at position p is on EP rank p // experts_per_rank, so each is placed exactly once.

    nodes: nodes that the EP group spans, with the same number of its ranks on each. num_identity: experts behind these
    that return their input; they are on the rank of the token. order: the expert at each position; empty: expert p.
    """

    num_experts: int
    ep: int
    nodes: int = 1
    num_identity: int = 0
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        with plan_errors():
            at_least(1, "placement", num_experts=self.num_experts, ep=self.ep, nodes=self.nodes)
            at_least(0, "placement", num_identity=self.num_identity)
            check_placement(self.num_experts, self.ep)
        if self.ep % self.nodes:
            raise PlanError("placement.nodes", self.nodes, f"must divide placement.ep={self.ep}", "Plan again")
        if self.order and (self.ep == 1 or sorted(self.order) != list(range(self.num_experts))):
            rule = f"must name each of the {self.num_experts} experts once, and is for more than one rank"
            raise PlanError("placement.order", list(self.order), rule, "Place each expert once, or use []")

    @property
    def experts_per_rank(self) -> int:
        """Number of local experts of an EP rank."""
        return self.num_experts // self.ep

    @property
    def share_computed(self) -> float:
        """The share of evenly chosen experts that have weights."""
        return self.num_experts / (self.num_experts + self.num_identity)

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """The position of each expert: the inverse of `order`."""
        order = self.order or range(self.num_experts)
        return tuple(sorted(range(self.num_experts), key=order.__getitem__))

    def rank_of(self, expert: int) -> int:
        """EP rank that holds global `expert`."""
        return self.positions[expert] // self.experts_per_rank

    def node_of(self, expert: int) -> int:
        """Which of the nodes of the EP group holds global `expert`."""
        return self.rank_of(expert) // (self.ep // self.nodes)

    def experts_of(self, ep_rank: int) -> Sequence[int]:
        """Global expert ids on `ep_rank`, in the order in which it holds them."""
        held = slice(ep_rank * self.experts_per_rank, (ep_rank + 1) * self.experts_per_rank)
        return (self.order or range(self.num_experts))[held]

    def has_whole(self, groups: int) -> bool:
        """Whether each rank holds all experts of its groups, of `groups` consecutive ones."""
        size = self.num_experts // groups
        held = ({expert // size for expert in self.experts_of(rank)} for rank in range(self.ep))
        return all(len(of_rank) * size == self.experts_per_rank for of_rank in held)


# -- how FSDP cuts a stack of experts over the ranks that hold the same experts -------------------------------------
#
# These are the ranks along `edp`; without expert parallelism, all over which weights are sharded.
#
#     the ranks divide                  the stack is cut along    a rank has
#     its experts (to 1%)               dim 0                     whole experts
#     another dim                       the first such dim        a part of each expert
#     none of its dims                  dim 0                     ceil(experts / ranks) whole experts or fewer
#
# FSDP2 pads shards along dim 0 to the largest one when it gathers and reduces them, and cuts other dims evenly or not
# at all. So the largest shard is what every rank sends, and times the ranks what each has after a gather.

EVEN = 1.01
"""How much more than its even share of a stack a rank may have, if there is a dim that allows it."""


def cut_dim(shape: Sequence[int], ranks: int) -> int:
    """The dim along which `ranks` ranks cut a stack of `shape`, the experts that they have together first."""
    if -(-shape[0] // ranks) * ranks <= EVEN * shape[0]:
        return 0
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


def largest_shard(shape: Sequence[int], ranks: int) -> int:
    """Numbers of a stack on the rank that has the most."""
    dim = cut_dim(shape, ranks)
    return prod(shape[:dim]) * -(-shape[dim] // ranks) * prod(shape[dim + 1 :])
