"""How tokens are sent to the experts of one site: the exchanges of each kind of dispatch, in order."""

from __future__ import annotations

from dataclasses import dataclass

from moecompile.errors import ConfigError
from moecompile.plan.checks import at_least, plan_errors
from moecompile.plan.sites import PlannedSite
from moecompile.ranges import check_object, check_word
from moecompile.row_formats import ROW_FORMATS
from moecompile.schema import OverlapKind, WireDtype


@dataclass(frozen=True)
class WireFormat:
    """How rows are sent. dtype: torch's name of that of their numbers, and its bytes; None: as the activations are.

    narrow: the format of `row_formats` for rows to the experts, and for the gradients of what experts return, which are
    two of the four ways of a step; the other two add up what experts made, in more digits.
    """

    dtype: str | None
    element_bytes: int | None
    narrow: str = ""

    def row_bytes(self, width: int, activation_bytes: int) -> tuple[int, int]:
        """Bytes of a row of `width` numbers to the experts, and back. Backward has both too, the other way round."""
        back = width * (self.element_bytes or activation_bytes)
        return (ROW_FORMATS[self.narrow].row_bytes(width) if self.narrow else back), back


EXACT = "_of_activations"
WIRE_FORMATS: dict[str, WireFormat] = {
    WireDtype.auto.value: WireFormat(None, None),
    WireDtype.fp32.value: WireFormat("float32", 4),
    WireDtype.bf16.value: WireFormat("bfloat16", 2),
    **{name: WireFormat("bfloat16", 2, narrow=name) for name in ROW_FORMATS},
    # Of plans alone: what is not in eight bits is not rounded, so that it can be compared in float64.
    **{name + EXACT: WireFormat(None, None, narrow=name) for name in ROW_FORMATS},
}
"""By `dispatch.wire_dtype` of a plan; a format that is not here raises."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """An op that communicates; its last argument is a mesh axis.

    sends: counts (split sizes follow from them), rows, assignments (routing weights and ids, with their rows), or the
    weights of experts. inputs: how many of its first arguments travel. in_halves: whether `<op>_start`, which returns a
    token and a ticket, and `<op>_wait`, which takes both and the other arguments, can replace it.
    """

    sends: str
    inputs: int = 1
    in_halves: bool = False


EXCHANGES: dict[str, Exchange] = {
    "exchange_counts": Exchange(sends="counts"),
    "send_counts": Exchange(sends="counts"),
    "gather_counts": Exchange(sends="counts"),
    "all_to_all": Exchange(sends="rows", in_halves=True),
    "exchange_assignments": Exchange(sends="assignments", inputs=2, in_halves=True),
    "all_gather": Exchange(sends="rows"),
    "reduce_scatter": Exchange(sends="rows"),
    "gather_assignments": Exchange(sends="assignments", inputs=2),
    "lend_experts": Exchange(sends="experts", inputs=2),
    "dispatch_tokens": Exchange(sends="rows", inputs=3, in_halves=True),  # of a back end: rows with their assignments
    "combine_tokens": Exchange(sends="rows", in_halves=True),
}
"""By the name of the op; what is not here does not communicate for an experts call."""
HALVES = {name: (f"{name}_start", f"{name}_wait") for name, row in EXCHANGES.items() if row.in_halves}
"""Exchanges that can be asynchronous -> the op that starts one, and the op that waits for it."""
START_OPS, WAIT_OPS = (frozenset(ops) for ops in zip(*HALVES.values(), strict=True))
EXCHANGE_OPS = START_OPS | frozenset(EXCHANGES)
LENDING_OPS = ("gather_counts", "lend_experts")
"""Exchanges of a layer that lends experts: counts before the others, and experts before the first rows."""
SLICE_OPS = ("cut_tokens", "join_tokens")
"""Ops before and after the dispatch of a layer whose tokens are cut over `tp`."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How a kind of dispatch sends tokens.

    steps: the exchanges of a forward, in order, each with the part of the axis that it crosses: "" the whole EP group,
    `_inter` ranks with the same local rank on each of its nodes, `_intra` its ranks on one node. begins: the op that
    reads the chosen experts first. ends: the op whose result is the sum of a token's experts. no_overlap, no_lending,
    no_narrow (rows in eight bits): why it cannot; empty: it can. fuses: whether rows are copied and summed on the rank
    of the experts, so that one op can do both with the experts. for_backends: whether it sends a token once to a rank
    and returns sums, as back ends do. on_one_node: the kind that it is where an EP group is on one node. automatic:
    whether `auto` considers it.
    """

    steps: tuple[tuple[str, str], ...]
    begins: str
    ends: str
    no_overlap: str = ""
    no_lending: str = ""
    no_narrow: str = ""
    fuses: bool = True
    for_backends: bool = False
    on_one_node: str = ""
    automatic: bool = True


KINDS: dict[str, Kind] = {
    "local": Kind(
        steps=(),
        begins="permute",
        ends="unpermute",
        no_overlap="nothing is sent",
        no_lending="mesh.ep=1, and no other rank could borrow",
        automatic=False,
    ),
    "flat": Kind(
        steps=(("exchange_counts", ""), ("all_to_all", ""), ("all_to_all", "")),
        begins="count_experts",
        ends="unpermute",
        fuses=False,  # it copies and sums on the rank of the tokens
    ),
    "dedup": Kind(
        steps=(("exchange_counts", ""), ("all_to_all", ""), ("exchange_assignments", ""), ("all_to_all", "")),
        begins="count_rows",
        ends="combine_rows",
        for_backends=True,
    ),
    "hierarchical": Kind(
        steps=(
            ("send_counts", "_inter"), ("send_counts", "_intra"),
            ("all_to_all", "_inter"), ("exchange_assignments", "_inter"),
            ("all_to_all", "_intra"), ("exchange_assignments", "_intra"),
            ("all_to_all", "_intra"), ("all_to_all", "_inter"),
        ),
        begins="count_hops",
        ends="combine_rows",
        for_backends=True,
        on_one_node="dedup",
    ),
    "allgather": Kind(
        steps=(
            ("exchange_counts", ""),
            ("all_gather", "_inter"), ("gather_assignments", "_inter"),
            ("all_gather", "_intra"), ("gather_assignments", "_intra"),
            ("reduce_scatter", "_intra"), ("reduce_scatter", "_inter"),
        ),
        begins="count_gathered",
        ends="spread_tokens",
        no_overlap="it gathers all tokens at once",
        no_lending="dispatch.kind=allgather gives all tokens to all ranks",
        no_narrow="it gathers rows, and adds up what comes back on the way",
        automatic=False,  # it sends at least what dedup does, and nothing overlaps with it
    ),
}  # fmt: skip
"""By `dispatch.kind`. Also by kind: its lowering (passes/lower), rows and bytes of a token (planner/traffic.py)."""
BACKEND = Kind(steps=(("dispatch_tokens", ""), ("combine_tokens", "")), begins="dispatch_tokens", ends="combine_tokens")
"""The calls of a dispatch back end, in place of the exchanges of its kind."""
IN_FLIGHT = frozenset(kind for kind, row in KINDS.items() if not row.no_overlap)
"""Kinds whose exchanges of rows can be asynchronous."""
LENDING = frozenset(kind for kind, row in KINDS.items() if not row.no_lending)
"""Kinds that send rows to experts, which may be lent."""


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """How tokens are sent to their experts.

    kind: local, flat, dedup, hierarchical or allgather. axis: the logical mesh axis of the exchanges; kinds with two
    levels use `<axis>_inter` and `<axis>_intra`. wire_dtype: format of rows in an exchange (auto: they are not cast).
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
            check_word(KINDS, "dispatch.kind", self.kind)
            check_word(WIRE_FORMATS, "dispatch.wire_dtype", self.wire_dtype)
            check_narrow(self.kind, self.wire_dtype, self.backend)
            check_overlap(self.kind, self.overlap, self.chunks)
            check_backend(self)

    @property
    def wire(self) -> WireFormat:
        """How rows are sent."""
        return WIRE_FORMATS[self.wire_dtype]

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
    def row(self) -> Kind:
        """The exchanges of this kind, or the calls of its back end."""
        return BACKEND if self.backend else KINDS[self.kind]

    @property
    def exchanges(self) -> tuple[str, ...]:
        """Names of the exchange ops of this kind, in order."""
        return tuple(op for op, _ in KINDS[self.kind].steps)

    @property
    def on_two_levels(self) -> bool:
        """Whether ranks on the same node are addressed separately from ranks on other nodes."""
        return any(part for _, part in KINDS[self.kind].steps)

    def steps(self, num_nodes: int) -> tuple[tuple[str, str], ...]:
        """The exchange ops that `lower` inserts and the logical axis of each, in order.

        An EP group on one node has no `_inter` axis, so exchanges over it are left out.
        """
        return tuple((op, self.axis + part) for op, part in self.row.steps if part != "_inter" or num_nodes > 1)

    def lent_steps(self, num_nodes: int) -> tuple[tuple[str, str], ...]:
        """All exchanges of a forward, with those that `lend` adds."""
        steps = self.steps(num_nodes)
        if not self.lends:
            return steps
        counts, experts = ((op, self.axis) for op in LENDING_OPS)
        rows = next(i for i, (op, _) in enumerate(steps) if op in HALVES)
        return (counts, *steps[:rows], experts, *steps[rows:])

    def scheduled_steps(self, num_nodes: int) -> tuple[tuple[str, str], ...]:
        """The exchange ops of the final graph; with overlap, those of rows are replaced by a start for each chunk.

        A stage begins at each exchange of rows. In slot t, chunk c runs stage t - c, the latest chunk first.
        """
        steps = self.lent_steps(num_nodes)
        if not self.in_flight:
            return steps
        stages: list[list[tuple[str, str]]] = []
        for op, axis in (step for step in steps if step[0] in HALVES):
            stages += [[]] if EXCHANGES[op].sends == "rows" else []
            stages[-1].append((HALVES[op][0], axis))
        slots = range(len(stages) + self.chunks - 1)
        order = [stages[t - c] for t in slots for c in reversed(range(self.chunks)) if 0 <= t - c < len(stages)]
        counts = tuple(step for step in steps if step[0] not in HALVES)
        return counts + tuple(step for stage in order for step in stage)


def check_overlap(kind: str, overlap: str, chunks: int) -> None:
    """Raises ConfigError if the dispatch does not support the overlap, or `chunks` does not fit it."""
    check_word([word for word in OverlapKind if word is not OverlapKind.auto], "dispatch.overlap", overlap)
    if overlap != "none" and (reason := KINDS[kind].no_overlap):
        raise ConfigError("dispatch.overlap", overlap, f"dispatch.kind={kind} cannot: {reason}", "Use none")
    if chunks < 1 or (overlap == "chunks") != (chunks > 1):
        raise ConfigError("dispatch.chunks", chunks, "must be at least 2 with overlap=chunks, else 1", "Use 2 or none")


def check_narrow(kind: str, wire_dtype: str, backend: str) -> None:
    """Raises ConfigError if rows are to be sent in eight bits by a dispatch that cannot."""
    if not WIRE_FORMATS[wire_dtype].narrow:
        return
    reason = f"the back end {backend} has a format of its own" if backend else KINDS[kind].no_narrow
    if reason:
        other = "" if backend else ", or dispatch.kind=dedup"
        rule = f"rows cannot be sent in eight bits: {reason}"
        raise ConfigError("dispatch.wire_dtype", wire_dtype, rule, f"Use bf16 or auto{other}")


def check_backend(plan: DispatchPlan) -> None:
    """Raises ConfigError if a dispatch back end cannot do what the plan says."""
    if not plan.backend:
        return
    check_object("dispatch.backend", plan.backend)
    if not KINDS[plan.kind].for_backends:
        raise ConfigError(
            "dispatch.kind", plan.kind, f"dispatch.backend={plan.backend} sends a token once to a rank, in one call",
            "Use dedup, or hierarchical if it forwards rows",
        )  # fmt: skip


def check_lending(plan: DispatchPlan) -> None:
    """Raises ConfigError if the dispatch cannot lend experts, or has slots without lending."""
    check_word(("none", "lend"), "dispatch.balance", plan.balance)
    check_lends(plan.kind, plan.balance)
    if (plan.slots > 0) != plan.lends or plan.slots < 0:
        raise ConfigError("dispatch.slots", plan.slots, "must be at least 1 with balance=lend, else 0", "Use 1 or none")
    at_least(0, "dispatch", loan_rows=plan.loan_rows, far_loan_rows=plan.far_loan_rows)


def check_lends(kind: str, balance: str) -> None:
    """Raises ConfigError if experts are to be lent with a kind of dispatch that cannot."""
    if balance == "lend" and (reason := KINDS[kind].no_lending):
        other = "mesh.ep=2 or more" if kind == "local" else "dispatch.kind=dedup"
        rule = f"experts cannot be lent: {reason}"
        raise ConfigError("dispatch.balance", balance, rule, f"Use none or auto, or {other}")


def can_fuse(site: PlannedSite, dispatch: DispatchPlan) -> bool:
    """Whether the experts at `site` can be computed in one op with `dispatch`."""
    return site.swiglu and KINDS[dispatch.kind].fuses
