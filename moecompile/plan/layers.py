"""The plan of one site: experts, router, balance, placement and dispatch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moecompile.errors import PlanError
from moecompile.plan.adapters import ExpertAdapters
from moecompile.plan.checks import plan_errors
from moecompile.plan.dispatch import DispatchPlan, can_fuse
from moecompile.plan.experts import ExpertPlacement, ExpertsPlan
from moecompile.plan.sites import ExpertsSite, PlannedSite
from moecompile.routing import BalanceSpec, RouterConfig, check_balance

RoutingPlan = RouterConfig
BalancePlan = BalanceSpec
"""Plans hold the same config objects that `nn.Router` takes."""


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One site and all decisions about it.

    fused: whether one op gathers the rows, computes the experts and sums their outputs. mask_padding: whether padding
    is taken out of routing. adapters: of the experts; None: they have none. cut_over: mesh axes over which the tokens
    are cut after routing and joined after combine: `tp`, if there is tensor parallelism.

    Raises:
        PlanError: the parts contradict each other.
    """

    site: PlannedSite
    experts: ExpertsPlan
    routing: RoutingPlan
    balance: BalancePlan
    placement: ExpertPlacement
    dispatch: DispatchPlan
    fused: bool = False
    mask_padding: bool = False
    adapters: ExpertAdapters | None = None
    cut_over: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.fused and not can_fuse(self.site, self.dispatch):
            rule = "needs SwiGLU experts without biases (site.swiglu), and a dispatch that is not flat"
            raise PlanError(f"layers[{self.site.fqn or 'the graph'}].fused", True, rule, "Use false")
        where = f"layers[{self.site.fqn or 'the graph'}]."
        for path, value, rule, fix in self._contradictions():
            raise PlanError(f"{where}{path}", value, rule, fix)
        with plan_errors(where):
            self.routing.check_experts(self.experts.num_routed, self.experts.virtual_group)
            check_balance(self.routing, self.balance)

    @property
    def steps(self) -> tuple[tuple[str, str], ...]:
        """The exchange ops that `lower` inserts and the logical axis of each, in order."""
        return self.dispatch.steps(self.placement.nodes)

    @property
    def lent_steps(self) -> tuple[tuple[str, str], ...]:
        """The exchange ops after `lend`, and the logical axis of each, in order."""
        return self.dispatch.lent_steps(self.placement.nodes)

    @property
    def scheduled_steps(self) -> tuple[tuple[str, str], ...]:
        """The exchange ops of the final graph and the logical axis of each, in order."""
        return self.dispatch.scheduled_steps(self.placement.nodes)

    def _wrong_cut(self) -> Iterator[tuple[str, object, str, str]]:
        if self.cut_over not in ((), ("tp",)):
            value = f"[{', '.join(self.cut_over)}]"
            yield "cut_over", value, "must be [] or [tp]", "Use [tp] if mesh.tp is more than 1"
        elif self.cut_over and self.dispatch.lends:
            yield "dispatch.balance", "lend", "tokens are cut over tp, where experts are not lent", "Use none"

    def _wrong_backend(self) -> Iterator[tuple[str, object, str, str]]:
        backend, dispatch = self.experts.backend, self.dispatch
        if not backend:
            return
        rule = f"experts.backend={backend} computes "
        if not self.fused:
            yield "fused", False, rule + "gather, SwiGLU experts without biases and sum in one", "Use no back end here"
        if dispatch.in_flight:
            yield "dispatch.overlap", dispatch.overlap, rule + "weight gradients itself, at once", "Use none"
        if dispatch.lends:
            yield "dispatch.balance", dispatch.balance, rule + "the experts of its own rank", "Use none"

    def _contradictions(self) -> Iterator[tuple[str, object, str, str]]:
        """(path, value, rule, fix) of every broken rule between the parts."""
        experts, placement = self.experts, self.placement
        yield from self._wrong_cut()
        existing = isinstance(self.site, ExpertsSite)
        if existing != (experts.init == "existing") or existing != self.routing.is_own:
            rule = "init=existing and score=own are for experts that the model has already, and for no others"
            yield "experts.init", experts.init, rule, "Correct the plan, or plan again"
        if placement.num_experts != experts.num_routed:
            rule = f"must be experts.num_routed={experts.num_routed}"
            yield "placement.num_experts", placement.num_experts, rule, "Place every expert once"
        if (self.dispatch.kind == "local") != (placement.ep == 1):
            rule = f"must be local if and only if ep is 1, but ep={placement.ep}"
            yield "dispatch.kind", self.dispatch.kind, rule, "Use local for ep=1, another kind for more"
        if self.dispatch.kind == "hierarchical" and placement.nodes == 1:
            rule = "needs an EP group on two nodes or more, but placement.nodes=1"
            yield "dispatch.kind", self.dispatch.kind, rule, "Use dedup"
        others = placement.num_experts - placement.experts_per_rank
        if self.dispatch.slots > others:
            rule = f"other ranks have only {others} experts"
            yield "dispatch.slots", self.dispatch.slots, rule, f"Use at most {others}"
        if self.adapters is not None and not existing:
            rule = "are for experts that the model has already"
            yield "adapters", self.adapters.weights, rule, "Use null"
        if self.adapters is not None and self.dispatch.lends:
            yield "dispatch.balance", "lend", "experts with adapters are not lent", "Use none, or adapters: null"
        yield from self._wrong_backend()
        if self.adapters is not None and self.fused:
            yield "fused", True, "the fused op has no adapters", "Use false, or adapters: null"
        if experts.d_expert * experts.granularity != self.site.d_ff:
            rule = f"must be site.d_ff / granularity = {self.site.d_ff} / {experts.granularity}"
            yield "experts.d_expert", experts.d_expert, rule, "Correct the plan, or plan again"
