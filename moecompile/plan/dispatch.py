"""How tokens are sent to the experts of one site: the exchanges of each kind of dispatch, in order."""

from __future__ import annotations

from dataclasses import dataclass

from moecompile.plan.checks import plan_errors
from moecompile.plan.sites import PlannedSite
from moecompile.ranges import check_word
from moecompile.schema import WireDtype

# Forward exchanges that each dispatch inserts for one layer, in order, each with the part of the axis that it crosses:
# "" the whole EP group, "_inter" ranks with the same local rank on each of its nodes, "_intra" its ranks on one node.
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
FUSABLE = frozenset(EXCHANGES) - {"flat"}
"""Kinds that copy and sum rows on the rank of the experts. flat does it on the rank of the tokens."""


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """How tokens are sent to their experts.

    kind: local, flat, dedup, hierarchical or allgather. axis: the logical mesh axis of the exchanges; kinds with two
    levels use `<axis>_inter` and `<axis>_intra`. wire_dtype: dtype of rows in an exchange (auto: they are not cast).
    """

    kind: str
    axis: str = "ep"
    wire_dtype: str = "auto"

    def __post_init__(self) -> None:
        with plan_errors():
            check_word(EXCHANGES, "dispatch.kind", self.kind)
            check_word(WireDtype, "dispatch.wire_dtype", self.wire_dtype)

    @property
    def exchanges(self) -> tuple[str, ...]:
        """Names of the exchange ops of this kind, in order."""
        return EXCHANGES[self.kind]

    @property
    def on_two_levels(self) -> bool:
        """Whether ranks on the same node are addressed separately from ranks on other nodes."""
        return any(part for _, part in _STEPS[self.kind])

    def steps(self, num_nodes: int) -> tuple[tuple[str, str], ...]:
        """The exchange ops that `lower` inserts and the logical axis of each, in order.

        An EP group on one node has no `_inter` axis, so exchanges over it are left out.
        """
        steps = _STEPS[self.kind]
        return tuple((op, self.axis + part) for op, part in steps if part != "_inter" or num_nodes > 1)


def can_fuse(site: PlannedSite, dispatch: DispatchPlan) -> bool:
    """Whether the experts at `site` can be computed in one op with `dispatch`."""
    return site.swiglu and dispatch.kind in FUSABLE
