"""Plans the lending of experts: slots, the price of a loan in rows, and whether a loan can pay on a mesh.

D, F: widths of the model and of an expert; n: linears before the activation; P: numbers of an expert; b: bytes of one.

1. Computing a row takes 3 * 2 (n + 1) D F operations: forward, and twice as many in backward.
2. A loan sends an expert there and its gradient back, 2 P b bytes, on one link. Its price is the number of rows that
   are computed in that time, rounded up.                                                              -> `_loan_rows`
3. Lending can pay if a loan costs fewer rows than a rank computes on average. No loan moves more rows than that, or the
   borrower would have more than the mean. `auto` lends if this holds for the cheapest link of an EP group, but not
   where each rank holds whole even groups: all have equally many rows.
4. Weights of borrowed experts are kept until backward, in all layers (in one at a time with checkpointing=full), and
   their gradients in one layer at a time.                                                             -> `lending`
In each micro-batch, moecompile.ops.lending decides with these prices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec, Part
from moecompile.plan import (
    KINDS,
    DispatchPlan,
    ExpertPlacement,
    LayerPlan,
    Lending,
    PlannedSite,
    RoutingPlan,
    check_lends,
    is_even,
)
from moecompile.planner.cost_model.counts import PASSES
from moecompile.planner.cost_model.inputs import links_of
from moecompile.planner.cost_model.seconds import row_seconds
from moecompile.planner.params import RunFacts, ffn_params
from moecompile.ranges import Whole
from moecompile.schema import Config, DispatchBalance

SLOTS = 2  # of `auto`: with one slot, a rank that borrows the rest of a hot expert cannot take anything else


def plan_lending(
    config: Config, mesh: MeshSpec, site: PlannedSite, d_expert: int, kind: str, routing: RoutingPlan,
    placement: ExpertPlacement, number_bytes: int,
) -> DispatchPlan:  # fmt: skip
    """A dispatch of this kind that lends, or does not.

    Args:
        number_bytes: of a number of an expert in compute.

    Raises:
        ConfigError: the kind of dispatch cannot lend, or the number of slots is not possible.
    """
    balance, slots = config.dispatch.balance, config.dispatch.slots
    if balance is DispatchBalance.none:
        if slots != "auto":
            raise ConfigError(
                "dispatch.slots", slots, "needs lending, but dispatch.balance=none",
                "Use dispatch.balance=lend, or slots=auto",
            )  # fmt: skip
        return DispatchPlan(kind=kind)
    if mesh.axes(Part.TOKENS):
        if balance is DispatchBalance.auto:
            return DispatchPlan(kind=kind)
        rule = f"experts are not lent with {mesh.setting(Part.TOKENS)}"
        raise ConfigError("dispatch.balance", "lend", rule, "Use none")
    number = _slots(slots, placement)
    check_lends(kind, balance.value)
    near, far = _loan_rows(config, mesh, site, d_expert, number_bytes)
    rows = mesh.share(config.data.micro_batch_size * config.data.seq_len, Part.SEQUENCE) * routing.top_k
    cheapest = near if mesh.ep > mesh.nodes_per_ep_group else far
    stays_even = config.mesh.placement is None and is_even(routing, placement)
    if balance is DispatchBalance.auto and (KINDS[kind].no_lending or cheapest >= rows or stays_even):
        return DispatchPlan(kind=kind)
    return DispatchPlan(kind=kind, balance="lend", slots=number, loan_rows=near, far_loan_rows=far)


def not_lent(dispatch: DispatchPlan, config: Config, rule: str, fix: str) -> DispatchPlan:
    """The dispatch of experts that cannot be lent.

    Raises:
        ConfigError: they were to be lent in any case.
    """
    if config.dispatch.balance is DispatchBalance.lend:
        raise ConfigError("dispatch.balance", "lend", rule, f"Use none or auto, or {fix}")
    return replace(dispatch, balance="none", slots=0, loan_rows=0, far_loan_rows=0)


def _slots(slots: int | str, placement: ExpertPlacement) -> int:
    others = placement.num_experts - placement.experts_per_rank
    if slots == "auto":
        return min(SLOTS, others)
    Whole(1).check("dispatch.slots", slots)
    if int(slots) > others > 0:
        raise ConfigError(
            "dispatch.slots", slots, f"other ranks have only {others} experts (experts.num_routed, mesh.ep)",
            f"Use at most {others}",
        )  # fmt: skip
    return int(slots)


def _loan_rows(
    config: Config, mesh: MeshSpec, site: PlannedSite, d_expert: int, number_bytes: int
) -> tuple[int, int]:  # fmt: skip
    """Price of a loan in rows, within a node and across nodes (steps 1 and 2)."""
    both_ways = 2 * ffn_params(site, d_expert) * number_bytes
    row, links = PASSES * row_seconds(config.hardware, site, d_expert), links_of(config.hardware)
    near, far = (math.ceil(links.seconds(*sent) / row) for sent in ((both_ways, 0), (0, both_ways)))
    return near, far if mesh.nodes_per_ep_group > 1 else 0


def lending(layers: Sequence[LayerPlan], run: RunFacts) -> Lending | None:
    """What it costs at most."""
    if not any(layer.dispatch.slots for layer in layers):
        return None
    experts = [ffn_params(layer.row_site, layer.experts.d_expert) * run.compute_bytes for layer in layers]
    slots = [layer.dispatch.slots * size for layer, size in zip(layers, experts, strict=True)]
    kept = max(slots) if run.checkpointing == "full" else sum(slots)
    return Lending(expert_bytes=max(experts), bytes_received=max(slots), slot_bytes=kept + max(slots))
