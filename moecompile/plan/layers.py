"""The plan of one site: experts, router, balance, placement and dispatch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from moecompile.errors import PlanError
from moecompile.mesh import Part, axes_that_split
from moecompile.plan.adapters import ExpertAdapters
from moecompile.plan.checks import plan_errors
from moecompile.plan.dispatch import KINDS, DispatchPlan, can_fuse
from moecompile.plan.experts import ExpertPlacement, ExpertsPlan
from moecompile.plan.sites import ExpertsSite, FFNSite, PlannedSite
from moecompile.routing import NO_BALANCE, BalanceSpec, RouterConfig, check_balance
from moecompile.schema import check_shared

RoutingPlan = RouterConfig
BalancePlan = BalanceSpec
"""Plans hold the same config objects that `nn.Router` takes."""


def is_even(routing: RoutingPlan, placement: ExpertPlacement) -> bool:
    """Whether all ranks compute equally many rows, whatever the router does."""
    return routing.choice == "expert" or (routing.even_groups and placement.has_whole(routing.groups))


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One site and all decisions about it.

    fused: whether one op gathers the rows, computes the experts and sums their outputs. mask_padding: whether padding
    is taken out of routing. adapters: of the experts; None: they have none. cut_over: mesh axes over which the tokens
    are cut after routing and joined after combine (`Part.TOKENS`).

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
            check_shared(self.experts, self.routing)

    def slice_of(self, expert: int) -> int:
        """Which of the dense FFN's routed slices an expert begins with: a copy is consecutive, or a slice's copies."""
        slices = self.experts.virtual_group
        copies = self.experts.num_routed // slices
        return expert // copies if self.routing.even_groups else expert % slices

    def copy_of(self, expert: int) -> int:
        """Which copy of the dense FFN an expert begins as a slice of."""
        slices = self.experts.virtual_group
        return expert % (self.experts.num_routed // slices) if self.routing.even_groups else expert // slices

    @cached_property
    def alike(self) -> Hashable:
        """Equal for layers that share their parts, as those that were planned together do, and differ in their name
        alone. Only while both are there.
        """
        own = (id(value) for name, value in vars(self).items() if name != "site")
        return (*own, *(value for name, value in vars(self.site).items() if name not in ("fqn", "index")))

    @cached_property
    def is_even(self) -> bool:
        """Whether all ranks compute equally many rows, whatever the router does."""
        return is_even(self.routing, self.placement)

    @property
    def row_site(self) -> PlannedSite:
        """The site with the width of a row of a routed expert as d_model, the latent width if there is one."""
        latent = self.experts.latent_size
        return self.site if latent is None else replace(self.site, d_model=latent)

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
        cutting, over = axes_that_split(Part.TOKENS), ", ".join(self.cut_over)
        if self.cut_over != tuple(axis for axis in cutting if axis in self.cut_over):
            all_ = ", ".join(cutting)
            fix = f"Use [{all_}] if mesh.{all_} is more than 1"
            yield "cut_over", f"[{over}]", f"must be [] or [{all_}]", fix
        elif self.cut_over and self.dispatch.lends:
            yield "dispatch.balance", "lend", f"tokens are cut over {over}, where experts are not lent", "Use none"
        elif self.cut_over and self.experts.shared_routed:
            rule = f"weighs a shared expert for tokens that are not cut over {over}"
            yield "experts.shared_routed", True, rule, f"Use mesh.{over}=1, or experts.shared_routed=false"

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

    def _wrong_latent(self) -> Iterator[tuple[str, object, str, str]]:
        latent, d_model = self.experts.latent_size, self.site.d_model
        if latent is None:
            return
        if not 1 <= latent <= d_model:
            yield "experts.latent_size", latent, f"must be 1 to site.d_model={d_model}", f"Use {d_model // 2}, or null"
        if isinstance(self.site, ExpertsSite):
            rule = "is for upcycled experts; site.d_model is that of existing ones"
            yield "experts.latent_size", latent, rule, "Use null"

    def _wrong_identity(self) -> Iterator[tuple[str, object, str, str]]:
        experts, routing = self.experts, self.routing
        own = self.site.num_identity if isinstance(self.site, ExpertsSite) else experts.num_identity
        if self.placement.num_identity != experts.num_identity:
            rule = f"must be experts.num_identity={experts.num_identity}"
            yield "placement.num_identity", self.placement.num_identity, rule, "Correct the plan"
        if experts.num_identity != own:
            yield "experts.num_identity", experts.num_identity, f"the model has {own}", f"Use {own}"
        limits = (
            ("routing.choice", routing.choice, routing.choice != "token"),
            ("routing.capacity_factor", routing.capacity_factor, routing.capacity_factor is not None),
            ("routing.workload", routing.workload, routing.workload != "none"),
            ("routing.even_groups", True, routing.even_groups),
            ("routing.groups", routing.groups, routing.groups > 1),
        )
        if self.cut_over and experts.num_identity and isinstance(self.site, FFNSite):
            over = ", ".join(self.cut_over)
            rule, fix = f"experts without weights are not cut over {over}", "experts.num_identity=0"
            yield "experts.num_identity", experts.num_identity, rule, f"Use mesh.{over}=1, or {fix}"
        for path, value, broken in limits:
            if broken and experts.num_identity:
                rule = f"is not for a router with experts.num_identity={experts.num_identity} experts without weights"
                yield path, value, rule, "Leave it out, or use experts.num_identity=0"

    def _wrong_placement(self) -> Iterator[tuple[str, object, str, str]]:
        placement, groups = self.placement, self.routing.groups
        if not placement.order or self.routing.top_groups >= groups or groups % placement.nodes:
            return
        size = placement.num_experts // groups
        for group in range(groups):
            if len({placement.node_of(expert) for expert in range(group * size, (group + 1) * size)}) > 1:
                rule = f"splits the experts of group {group} over nodes, so tokens would reach more nodes than planned"
                yield "placement.order", list(placement.order), rule, "Place each group on one node"
                return

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
        if placement.nodes == 1 and (instead := KINDS[self.dispatch.kind].on_one_node):
            rule = "needs an EP group on two nodes or more, but placement.nodes=1"
            yield "dispatch.kind", self.dispatch.kind, rule, f"Use {instead}"
        others = placement.num_experts - placement.experts_per_rank
        if self.dispatch.slots > others:
            rule = f"other ranks have only {others} experts"
            yield "dispatch.slots", self.dispatch.slots, rule, f"Use at most {others}"
        yield from self._wrong_placement()
        yield from self._wrong_latent()
        yield from self._wrong_identity()
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


# -- the plan of a model's existing experts, as far as the model itself determines it -------------------------------


def own_routing(site: ExpertsSite, capacity_factor: float | None = None, drop: str = "none") -> RoutingPlan:
    """The routing of the model's own router, which is kept; what is over the capacity is dropped behind it."""
    return RoutingPlan(
        top_k=site.top_k,
        score="own",
        normalize=False,
        scale=1.0,
        groups=site.groups,
        top_groups=site.top_groups,
        group_score="max",
        capacity_factor=capacity_factor,
        drop=drop,
    )


def layer_of(
    site: ExpertsSite,
    placement: ExpertPlacement,
    dispatch: DispatchPlan,
    balance: BalancePlan | None = None,
    routing: RoutingPlan | None = None,
) -> LayerPlan:
    """The plan of one layer. balance, routing: None leaves the model's own router and what it chose unchanged."""
    experts = ExpertsPlan(
        num_routed=site.num_experts,
        granularity=1,
        num_shared=0,
        d_expert=site.d_ff,
        d_shared=0,
        init="existing",
        num_identity=site.num_identity,
        weight_scaling="none",
    )
    return LayerPlan(
        site=site,
        experts=experts,
        routing=routing or own_routing(site),
        balance=balance or NO_BALANCE,
        placement=placement,
        dispatch=dispatch,
        fused=can_fuse(site, dispatch),
    )


def layer_on_one_device(site: ExpertsSite) -> LayerPlan:
    """The layer without a mesh, with which the site is checked numerically before planning."""
    return layer_of(
        site,
        ExpertPlacement(num_experts=site.num_experts, ep=1, num_identity=site.num_identity),
        DispatchPlan(kind="local"),
    )


# -- checks that a plan fits a model --------------------------------------------------------------------------------


def check_sites(layers: Iterable[LayerPlan], sites: Iterable[PlannedSite]) -> None:
    """Checks that the sites of a model match those that the layers were planned for.

    Raises:
        PlanError: a site is missing or has other sizes or another form.
    """
    by_fqn = {site.fqn: site for site in sites}
    for layer in layers:
        _check_site(layer.site, by_fqn)


def _check_site(site: PlannedSite, sites: Mapping[str, PlannedSite]) -> None:
    actual = sites.get(site.fqn)
    if actual is None:
        what = "experts" if isinstance(site, ExpertsSite) else "FFN"
        raise PlanError(
            "plan.layers", site.fqn, f"the model has no {what} there", f"Plan again; it has {list(sites)[:3]}"
        )
    if _form(site) != _form(actual):
        raise PlanError(
            f"plan.layers[{site.fqn or 'the graph'}]",
            _form(site),
            f"the model has {_form(actual)} there",
            "Plan again for this model",
        )
    if site.swiglu and not actual.swiglu:
        raise PlanError(
            f"plan.layers[{site.fqn or 'the graph'}].site.swiglu", True,
            f"the model computes {actual.activation} there", "Plan again for this model",
        )  # fmt: skip


def _form(site: PlannedSite) -> str:
    """What a plan relies on: `gated 64x128`, `up_down 64x256 with bias_up, bias_down`, `8 experts 64x128 top-2`."""
    biases = [name for name in ("bias_up", "bias_down") if getattr(site, name)]
    kind, routing = site.kind, ""
    if isinstance(site, ExpertsSite):
        kind, routing = f"{site.num_experts} {site.form} {site.kind}", f" top-{site.top_k}"
        if site.groups > 1:
            routing += f" in {site.top_groups} of {site.groups} groups"
    return f"{kind} {site.d_model}x{site.d_ff}{routing}" + (f" with {', '.join(biases)}" if biases else "")
