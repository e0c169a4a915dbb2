"""How tokens are sent to the experts of one site: the exchanges of each kind of dispatch, in order."""

from __future__ import annotations

from dataclasses import dataclass

from moecompile.errors import ConfigError
from moecompile.plan.checks import at_least, plan_errors
from moecompile.plan.sites import PlannedSite
from moecompile.ranges import check_object, check_word
from moecompile.schema import OverlapKind, WireDtype


@dataclass(frozen=True)
class WireFormat:
    """How an element of a row is sent. dtype: torch's name of it, and its bytes; None: as the activations are."""

    dtype: str | None
    element_bytes: int | None


WIRE_FORMATS: dict[str, WireFormat] = {
    WireDtype.auto.value: WireFormat(None, None),
    WireDtype.fp32.value: WireFormat("float32", 4),
    WireDtype.bf16.value: WireFormat("bfloat16", 2),
}
"""By `dispatch.wire_dtype`; a format that is not here raises."""

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
HALVES = {name: (f"{name}_start", f"{name}_wait") for name in ("all_to_all", "exchange_assignments")}
"""Exchanges that can be asynchronous -> the op that starts one, and the op that waits for it."""
LENDING_OPS = ("gather_counts", "lend_experts")
"""Exchanges of a layer that lends experts: counts before the others, and experts before the first rows."""
BACKEND_OPS = ("dispatch_tokens", "combine_tokens")
"""The calls of a dispatch back end, in place of the exchanges."""
EXCHANGE_OPS = frozenset(
    {op for ops in EXCHANGES.values() for op in ops}
    | {start for start, _ in HALVES.values()}
    | {*LENDING_OPS, *BACKEND_OPS}
)
WAIT_OPS = frozenset(wait for _, wait in HALVES.values())
IN_FLIGHT = frozenset(kind for kind, ops in EXCHANGES.items() if set(ops) & set(HALVES))
"""Kinds whose exchanges of rows can be asynchronous."""
SLICE_OPS = ("cut_tokens", "join_tokens")
"""Ops before and after the dispatch of a layer whose tokens are cut over `tp`."""
BACKEND_KINDS = frozenset({"dedup", "hierarchical"})
"""Kinds that send a token once to a rank and return sums, as back ends do."""
LENDING = frozenset({"flat", "dedup", "hierarchical"})
"""Kinds that send rows to experts, which may be lent."""
FUSABLE = frozenset(EXCHANGES) - {"flat"}
"""Kinds that copy and sum rows on the rank of the experts. flat does it on the rank of the tokens."""


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """How tokens are sent to their experts.

    kind: local, flat, dedup, hierarchical or allgather. axis: the logical mesh axis of the exchanges; kinds with two
    levels use `<axis>_inter` and `<axis>_intra`. wire_dtype: dtype of rows in an exchange (auto: they are not cast).
    overlap: what runs while rows are on the wire: nothing (none), the shared experts (shared), or the shared experts
    and the experts on other `chunks` of the tokens (chunks). balance: `none`, or `lend`: a rank has `slots` for experts
    of other ranks, and each micro-batch decides which ones are there. loan_rows, far_loan_rows: an expert in a slot
    costs as much time as computing this many rows, within a node and across nodes; it is lent if that saves more.
    backend: `module:name` of a back end that does the exchanges instead; the kind says which bytes it sends.
    """

    kind: str
    axis: str = "ep"
    wire_dtype: str = "auto"
    overlap: str = "none"
    chunks: int = 1
    balance: str = "none"
    slots: int = 0
    loan_rows: int = 0
    far_loan_rows: int = 0
    backend: str = ""

    def __post_init__(self) -> None:
        with plan_errors():
            check_lending(self)
            check_word(EXCHANGES, "dispatch.kind", self.kind)
            check_word(WireDtype, "dispatch.wire_dtype", self.wire_dtype)
            check_overlap(self.kind, self.overlap, self.chunks)
            check_backend(self)

    @property
    def lends(self) -> bool:
        """Whether experts may be lent to other ranks."""
        return self.balance == "lend"

    @property
    def in_flight(self) -> bool:
        """Whether exchanges of rows are started, and waited for later."""
        return self.overlap != "none"

    @property
    def collects(self) -> bool:
        """Whether weight gradients are an op of their own; gradients of borrowed experts must leave earlier."""
        return self.in_flight and not self.lends

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
        if self.backend:
            return tuple((op, self.axis) for op in BACKEND_OPS)
        steps = _STEPS[self.kind]
        return tuple((op, self.axis + part) for op, part in steps if part != "_inter" or num_nodes > 1)

    def lent_steps(self, num_nodes: int) -> tuple[tuple[str, str], ...]:
        """All exchanges of a step, with those that `lend` adds."""
        steps = self.steps(num_nodes)
        if not self.lends:
            return steps
        counts, experts = ((op, self.axis) for op in LENDING_OPS)
        rows = next(i for i, (op, _) in enumerate(steps) if op in HALVES)
        return (counts, *steps[:rows], experts, *steps[rows:])

    def scheduled_steps(self, num_nodes: int) -> tuple[tuple[str, str], ...]:
        """The exchange ops of the final graph; with overlap, those of rows are replaced by a start for each chunk.

        A stage begins at each all-to-all. In slot t, chunk c runs stage t - c, the latest chunk first.
        """
        steps = self.lent_steps(num_nodes)
        if not self.in_flight:
            return steps
        stages: list[list[tuple[str, str]]] = []
        for op, axis in (step for step in steps if step[0] in HALVES):
            stages += [[]] if op == "all_to_all" else []
            stages[-1].append((HALVES[op][0], axis))
        slots = range(len(stages) + self.chunks - 1)
        order = [stages[t - c] for t in slots for c in reversed(range(self.chunks)) if 0 <= t - c < len(stages)]
        counts = tuple(step for step in steps if step[0] not in HALVES)
        return counts + tuple(step for stage in order for step in stage)


def check_overlap(kind: str, overlap: str, chunks: int) -> None:
    """Raises ConfigError if the dispatch does not support the overlap, or `chunks` does not fit it."""
    check_word([word for word in OverlapKind if word is not OverlapKind.auto], "dispatch.overlap", overlap)
    if overlap != "none" and kind not in IN_FLIGHT:
        reason = "nothing is sent" if kind == "local" else "it gathers all tokens at once"
        raise ConfigError("dispatch.overlap", overlap, f"dispatch.kind={kind} cannot: {reason}", "Use none")
    if chunks < 1 or (overlap == "chunks") != (chunks > 1):
        raise ConfigError("dispatch.chunks", chunks, "must be at least 2 with overlap=chunks, else 1", "Use 2 or none")


def check_backend(plan: DispatchPlan) -> None:
    """Raises ConfigError if a dispatch back end cannot do what the plan says."""
    if not plan.backend:
        return
    check_object("dispatch.backend", plan.backend)
    wrong = {
        "dispatch.kind": (plan.kind, plan.kind not in BACKEND_KINDS, "Use dedup, or hierarchical if it forwards rows"),
        "dispatch.overlap": (plan.overlap, plan.in_flight, "Use none"),
        "dispatch.balance": (plan.balance, plan.lends, "Use none"),
    }
    for path, (value, is_wrong, fix) in wrong.items():
        if is_wrong:
            rule = f"dispatch.backend={plan.backend} sends a token once to a rank, in one call, to its own experts"
            raise ConfigError(path, value, rule, fix)


def check_lending(plan: DispatchPlan) -> None:
    """Raises ConfigError if the dispatch cannot lend experts, or has slots without lending."""
    check_word(("none", "lend"), "dispatch.balance", plan.balance)
    check_lends(plan.kind, plan.balance)
    if (plan.slots > 0) != plan.lends or plan.slots < 0:
        raise ConfigError("dispatch.slots", plan.slots, "must be at least 1 with balance=lend, else 0", "Use 1 or none")
    at_least(0, "dispatch", loan_rows=plan.loan_rows, far_loan_rows=plan.far_loan_rows)


def check_lends(kind: str, balance: str) -> None:
    """Raises ConfigError if experts are to be lent with a kind of dispatch that cannot."""
    if balance == "lend" and kind not in LENDING:
        local = kind == "local"
        reason = (
            "mesh.ep=1, and no other rank could borrow"
            if local
            else f"dispatch.kind={kind} gives all tokens to all ranks"
        )
        fix = "Use none or auto, or mesh.ep=2 or more" if local else "Use none or auto, or dispatch.kind=dedup"
        raise ConfigError("dispatch.balance", balance, f"experts cannot be lent: {reason}", fix)


def can_fuse(site: PlannedSite, dispatch: DispatchPlan) -> bool:
    """Whether the experts at `site` can be computed in one op with `dispatch`."""
    return site.swiglu and dispatch.kind in FUSABLE
