"""Expected bytes on the wire of one MoE layer's forward pass.

Routing is assumed to be as even as its group limit allows: a token's scores are independent and identically distributed
over experts, so experts are drawn in random order. The first M different groups drawn are the open groups, and the
first K experts of open groups are chosen.

1. How often a token needs a set of experts. Draw experts one after another; after k draws that all missed the set, with
   m open groups of E/G experts that contain h experts of the set,

       P(next one is in an open group, and misses) = (m E/G - k - h) / pool
       P(next one opens a group of which the set has o, and misses) = (E/G - o) / pool     for each closed group, m < M
       pool = E - k if m < M else M E/G - k                                                 -> `_miss_probability`

   p is 1 - this for the experts of one rank, q for those of one node, as means over the group  -> `_hit_rates`
   This is exact for groups scored by their best expert. If they are scored by the sum of their two best, simulated
   copies differ by 0.2% to 0.6% for DeepSeek-V3 (256 experts, 8 groups) and by 3% for groups of two experts.
   With expert choice, experts choose independently, and all S of a set miss with probability (1 - c K/E)^S; c is the
   capacity factor. Dropped assignments of token choice are not subtracted, so the numbers are upper bounds then.
   With `even_groups`, K/G experts are drawn in every group, and a rank with o_g of group g is missed with
   the product over g of C(E/G - o_g, K/G) / C(E/G, K/G).
   With Z identity experts, experts are drawn from E + Z, and a token has K E / (E + Z) of those with weights.
   A router that starts from virtual groups (docs/understand/upcycling.md) chooses the experts of a group together, so
   all kinds except `flat` and `allgather` send less than this until training has made the experts differ.

2. Rows per token, by link class. EP groups fill whole nodes or fit into one, so every rank has L - 1 peers on its node
   and L (N - 1) on others, and the mean over source ranks needs only the means over destinations of step 1.

                      within the node      across nodes
       flat           (L - 1) K/ep         L (N - 1) K/ep
       dedup          (L - 1) p            L (N - 1) p
       hierarchical   N (L - 1) p          (N - 1) q          within: on all nodes of the token, also its own
       allgather      N (L - 1)            N - 1              padding to the longest micro-batch not counted
                                                                                             -> `copies_per_token`
3. Bytes, as `moecompile.ops.exchange` sends them (b: of an element, w: of a routing weight). Each row is sent in
   dispatch and in combine, D b bytes; in dispatch, in eight bits, D and those of the scales. Also sent are

       flat           counts 8 e / T                                    to each peer
       dedup          assignments (w + 2) K/ep, counts 16 / T           to each peer
       hierarchical   assignments (w + 2) K/N, counts 16 (1 + L) / T    to one rank of each other node
                      assignments (w + 2) K/L, counts 16 / T            to each peer within the node
       allgather      assignments (w + 2) K, or E with expert choice    with each row
                      counts 24 / T                                     to each peer             -> `_SENT`

   Dispatch sends from the token's rank, combine from the expert's; the mean over ranks is the same for both.
4. Seconds: bytes over the bandwidth of their links, and a latency for each exchange but that of assignments, which
   follows its rows to the same ranks.                                                      -> `exchange_seconds`

Legend: E experts, e experts per rank, G groups, M open groups, K top-k, D model dim, T tokens per rank and micro-batch,
N nodes of an EP group, L ranks of an EP group on a node.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import comb, prod

from moecompile.mesh import MeshSpec
from moecompile.plan import EXCHANGES, KINDS, WIRE_FORMATS, ExpertPlacement, RoutingPlan, Traffic, plan_errors

COUNT_BYTES = 8  # exchange_counts sends int64
ROUTING_WEIGHT_BYTES = 4
CODE_BYTES = 2  # exchange_assignments sends an int16 code with each weight
DEDUP_COUNTS = 2  # rows and assignments
ALLGATHER_COUNTS = 3  # tokens, assignments, first expert
PACKING_BYTES = 8
"""Of memory, to narrow a number of a row: bf16 is read twice and a byte written; a byte is read and bf16 written."""


@dataclass(frozen=True, kw_only=True)
class Wire:
    """Sizes that determine the bytes of an exchange.

    d_model: elements of a row. tokens_per_rank: tokens of a micro-batch; bytes of counts are divided by it.
    element_bytes, weight_bytes: of an activation and of a routing weight (4: fp32). wire_dtype: of a plan's dispatch.
    """

    d_model: int
    tokens_per_rank: int
    element_bytes: int = 4
    weight_bytes: int = 4
    wire_dtype: str = "auto"

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Of a row in dispatch and in combine; in backward, of gradients in combine and in dispatch."""
        return WIRE_FORMATS[self.wire_dtype].row_bytes(self.d_model, self.element_bytes)

    @property
    def assignment_bytes(self) -> int:
        """Of a routing weight and its code."""
        return self.weight_bytes + CODE_BYTES

    @property
    def count_bytes(self) -> float:
        """Of one count, per token."""
        return COUNT_BYTES / self.tokens_per_rank


@dataclass(frozen=True, kw_only=True)
class Links:
    """Bytes/s that a rank reaches within a node and across nodes, and seconds of an exchange without rows."""

    intra: float
    inter: float
    latency: float = 0.0

    def seconds(self, intra: float, inter: float, exchanges: float = 0.0) -> float:
        """Seconds of bytes within a node and across nodes, and of so many exchanges."""
        return intra / self.intra + inter / self.inter + exchanges * self.latency


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Rows per token that a layer's dispatch sends, by link class; `own`: those that stay on their rank."""

    own: float
    intra_node: float
    inter_node: float


def rows_given(kind: str, placement: ExpertPlacement, routing: RoutingPlan, mesh: MeshSpec) -> dict[str, float]:
    """Rows per token that a rank gives to the dispatch's exchanges of rows, with those for itself: part of the axis
    (`_inter`, `_intra`; "" all of it) -> rows; their sum is that of `copies_per_token`. With allgather, before they are
    gathered.
    """
    nodes, on_node = _shape(mesh)
    if kind == "allgather":
        return ({"_inter": 1.0} if nodes > 1 else {}) | {"_intra": float(nodes)}
    if kind == "hierarchical":
        rank, node = _hit_rates(placement, routing, nodes)
        return ({"_inter": nodes * node} if nodes > 1 else {}) | {"_intra": nodes * on_node * rank}
    copies = copies_per_token(kind, placement, routing, mesh)
    return {"": copies.own + copies.intra_node + copies.inter_node}


def rows_brought(kind: str, placement: ExpertPlacement, routing: RoutingPlan, mesh: MeshSpec) -> float:
    """Rows per token of a rank that the last exchange of the dispatch brings to its experts, those of the rank itself
    included; balanced."""
    if kind == "allgather":
        return float(placement.ep)
    return list(rows_given(kind, placement, routing, mesh).values())[-1]


def bytes_given(
    kind: str, placement: ExpertPlacement, routing: RoutingPlan, mesh: MeshSpec, widths: tuple[int, int], *,
    forwards: int, fullest: float,
) -> dict[str, float]:  # fmt: skip
    """Bytes per token that a rank gives to a layer's exchanges of rows and assignments in a step, by the part of the
    axis.

    Args:
        widths: bytes of a row in dispatch and in combine (`WireFormat.row_bytes`). forwards: 2 if backward sends a
            forward again. fullest: rows of the rank's experts over the mean; its node has as many as any other.
    """
    (nodes, on_node), (width, summed) = _shape(mesh), widths
    ranks, found = {"": placement.ep, "_inter": nodes, "_intra": on_node}, {}
    for part, rows in rows_given(kind, placement, routing, mesh).items():
        if kind == "allgather":  # blocks, which all ranks get
            columns = placement.num_experts if routing.choice == "expert" else routing.top_k
            there = rows * (width + columns * (ROUTING_WEIGHT_BYTES + CODE_BYTES))
            back = rows * ranks[part] * width
            gradients = rows * width + rows * ranks[part] * (width + columns * ROUTING_WEIGHT_BYTES)
        else:
            got = 1.0 if part == "_inter" else fullest
            sent = 0.0 if kind == "flat" else assignments(placement, routing)
            there, back = rows * width + sent * (ROUTING_WEIGHT_BYTES + CODE_BYTES), got * rows * summed
            gradients = rows * width + got * (rows * summed + sent * ROUTING_WEIGHT_BYTES)
        found[part] = forwards * (there + back) + gradients
    return found


def counts_given(kind: str, placement: ExpertPlacement, part: str) -> int:
    """Numbers that a rank gives to one exchange of counts over a part of the axis."""
    on_node = placement.ep // placement.nodes
    numbers = {
        "flat": placement.num_experts,
        "dedup": DEDUP_COUNTS * placement.ep,
        "hierarchical": DEDUP_COUNTS * (placement.nodes * (1 + on_node) if part == "_inter" else on_node),
        "allgather": ALLGATHER_COUNTS * placement.ep,
    }
    return numbers[kind]


def assignments(placement: ExpertPlacement, routing: RoutingPlan) -> float:
    """Experts with weights per token, on average."""
    if routing.choice != "expert":
        return routing.top_k * placement.share_computed
    return min(routing.top_k * (routing.capacity_factor or 1), placement.num_experts)


def copies_per_token(kind: str, placement: ExpertPlacement, routing: RoutingPlan, mesh: MeshSpec) -> Copies:
    """Expected rows per token of one dispatch (step 2); `kind` is local, flat, dedup, hierarchical or allgather.

    Raises:
        PlanError: the open groups have fewer than top_k experts.
    """
    _check_top_k(placement, routing)
    return _SENT[kind].copies(placement, routing, *_shape(mesh))


@cache
def even_copies(kind: str, experts: int, routed: tuple[int, int, int, bool], nodes: int, on_node: int) -> Copies:
    """`copies_per_token` of a dispatch that is described by numbers alone.

    Args:
        routed: as of `params.routed`. nodes, on_node: shape of the EP group.
    """
    top_k, groups, top_groups, even_groups = routed
    mesh = MeshSpec(num_nodes=nodes, ranks_per_node=on_node, ep=nodes * on_node)
    routing = RoutingPlan(
        top_k=top_k,
        groups=groups,
        top_groups=top_groups,
        even_groups=even_groups,
        score="sigmoid",
        normalize=True,
        scale=1.0,
        group_score="top2",
    )
    return copies_per_token(kind, ExpertPlacement(num_experts=experts, ep=mesh.ep, nodes=nodes), routing, mesh)


def forward_traffic(kind: str, placement: ExpertPlacement, routing: RoutingPlan, mesh: MeshSpec, wire: Wire) -> Traffic:
    """Expected bytes per token of one layer that leave a rank in the forward pass: dispatch, combine and metadata.

    Raises:
        PlanError: as in `copies_per_token`.
    """
    copies = copies_per_token(kind, placement, routing, mesh)
    intra, inter = _SENT[kind].metadata(placement, routing, *_shape(mesh), wire)
    both_ways = sum(wire.row_bytes)
    return Traffic(intra_node=copies.intra_node * both_ways + intra, inter_node=copies.inter_node * both_ways + inter)


def exchange_seconds(
    kind: str, placement: ExpertPlacement, routing: RoutingPlan, mesh: MeshSpec, wire: Wire, links: Links
) -> float:
    """Predicted time of one layer's exchanges in a forward (step 4); backward sends as much.

    Raises:
        PlanError: as in `copies_per_token`.
    """
    traffic = forward_traffic(kind, placement, routing, mesh, wire)
    per_token = links.seconds(traffic.intra_node, traffic.inter_node)
    rounds = sum(EXCHANGES[op].sends != "assignments" for op, _ in KINDS[kind].steps)
    return rounds * links.latency + wire.tokens_per_rank * per_token


def choose_dispatch(placement: ExpertPlacement, routing: RoutingPlan, mesh: MeshSpec, wire: Wire, links: Links) -> str:
    """The kind for `dispatch=auto`: local for ep = 1, else the one whose exchanges are predicted to take least time.

    Raises:
        PlanError: as in `copies_per_token`.
    """
    if mesh.ep == 1:
        return "local"
    two_levels = all(size > 1 for size in _shape(mesh))  # one hop needs no second level
    kinds = [kind for kind, row in KINDS.items() if row.automatic and (two_levels or not row.on_one_node)]
    return min(kinds, key=lambda kind: exchange_seconds(kind, placement, routing, mesh, wire, links))


def _shape(mesh: MeshSpec) -> tuple[int, int]:
    """Nodes of an EP group, and its ranks on each of them."""
    return mesh.nodes_per_ep_group, mesh.ep // mesh.nodes_per_ep_group


# -- what each kind sends ----------------------------------------------------------------------------------------------


def _flat_copies(placement: ExpertPlacement, routing: RoutingPlan, nodes: int, on_node: int) -> Copies:
    per_peer = assignments(placement, routing) / placement.ep
    return Copies(own=per_peer, intra_node=(on_node - 1) * per_peer, inter_node=(nodes - 1) * on_node * per_peer)


def _dedup_copies(placement: ExpertPlacement, routing: RoutingPlan, nodes: int, on_node: int) -> Copies:
    rank, _ = _hit_rates(placement, routing, nodes)
    return Copies(own=rank, intra_node=(on_node - 1) * rank, inter_node=(nodes - 1) * on_node * rank)


def _hierarchical_copies(placement: ExpertPlacement, routing: RoutingPlan, nodes: int, on_node: int) -> Copies:
    if nodes == 1:
        return _dedup_copies(placement, routing, nodes, on_node)
    rank, node = _hit_rates(placement, routing, nodes)
    return Copies(own=node + nodes * rank, intra_node=nodes * (on_node - 1) * rank, inter_node=(nodes - 1) * node)


def _allgather_copies(placement: ExpertPlacement, routing: RoutingPlan, nodes: int, on_node: int) -> Copies:
    return Copies(own=1 + (nodes if nodes > 1 else 0), intra_node=nodes * (on_node - 1), inter_node=nodes - 1)


def _flat_metadata(
    placement: ExpertPlacement, routing: RoutingPlan, nodes: int, on_node: int, wire: Wire
) -> tuple[float, float]:
    return _to_peers(placement.experts_per_rank * wire.count_bytes, nodes, on_node)


def _dedup_metadata(
    placement: ExpertPlacement, routing: RoutingPlan, nodes: int, on_node: int, wire: Wire
) -> tuple[float, float]:
    assigned = assignments(placement, routing) / placement.ep
    return _to_peers(assigned * wire.assignment_bytes + DEDUP_COUNTS * wire.count_bytes, nodes, on_node)


def _hierarchical_metadata(
    placement: ExpertPlacement, routing: RoutingPlan, nodes: int, on_node: int, wire: Wire
) -> tuple[float, float]:
    assigned = assignments(placement, routing)
    to_rank = assigned / on_node * wire.assignment_bytes + DEDUP_COUNTS * wire.count_bytes
    to_node = assigned / nodes * wire.assignment_bytes + DEDUP_COUNTS * (1 + on_node) * wire.count_bytes
    return (on_node - 1) * to_rank, (nodes - 1) * to_node


def _allgather_metadata(
    placement: ExpertPlacement, routing: RoutingPlan, nodes: int, on_node: int, wire: Wire
) -> tuple[float, float]:
    intra, inter = _to_peers(ALLGATHER_COUNTS * wire.count_bytes, nodes, on_node)
    columns = placement.num_experts if routing.choice == "expert" else routing.top_k
    intra += nodes * (on_node - 1) * columns * wire.assignment_bytes
    return intra, inter + (nodes - 1) * columns * wire.assignment_bytes


def _to_peers(to_peer: float, nodes: int, on_node: int) -> tuple[float, float]:
    return (on_node - 1) * to_peer, (nodes - 1) * on_node * to_peer


@dataclass(frozen=True)
class _Sent:
    """What a kind sends a token: copies (step 2), and bytes within the node and across nodes beside them (step 3)."""

    copies: Callable[[ExpertPlacement, RoutingPlan, int, int], Copies]
    metadata: Callable[[ExpertPlacement, RoutingPlan, int, int, Wire], tuple[float, float]]


_SENT: dict[str, _Sent] = {
    "local": _Sent(_flat_copies, _flat_metadata),  # to no peer
    "flat": _Sent(_flat_copies, _flat_metadata),
    "dedup": _Sent(_dedup_copies, _dedup_metadata),
    "hierarchical": _Sent(_hierarchical_copies, _hierarchical_metadata),
    "allgather": _Sent(_allgather_copies, _allgather_metadata),
}


# -- how often a token needs a rank ------------------------------------------------------------------------------------


def _hit_rates(placement: ExpertPlacement, routing: RoutingPlan, nodes: int) -> tuple[float, float]:
    """p and q: probability that a token needs a rank, and a node, as means over the EP group (step 1)."""
    if not routing.has_groups:  # any experts of a rank are needed as often
        placement = replace(placement, order=())
    return _known_hit_rates(placement, routing, nodes)


@cache  # most layers of a model have the same arguments
def _known_hit_rates(placement: ExpertPlacement, routing: RoutingPlan, nodes: int) -> tuple[float, float]:
    order = placement.order or range(placement.num_experts)

    def rate(parts: int) -> float:
        size = placement.num_experts // parts
        held = [order[part * size : (part + 1) * size] for part in range(parts)]
        if routing.choice == "expert":
            return 1 - (1 - assignments(placement, routing) / placement.num_experts) ** size
        drawn = placement.num_experts + placement.num_identity
        return 1 - sum(_miss_probability(drawn, routing, experts) for experts in held) / parts

    return rate(placement.ep), rate(nodes)


def _miss_probability(num_experts: int, routing: RoutingPlan, experts: Sequence[int]) -> float:
    """Probability that a token uses none of `experts`."""
    size = num_experts // routing.groups
    return _miss_of_overlaps(num_experts, routing, tuple(sorted(_overlaps(size, routing.groups, experts).items())))


@cache  # ranks differ in few ways
def _miss_of_overlaps(num_experts: int, routing: RoutingPlan, of_groups: tuple[tuple[int, int], ...]) -> float:
    size, overlaps = num_experts // routing.groups, dict(of_groups)
    if routing.even_groups:
        each = routing.top_k // routing.groups
        return prod((comb(size - overlap, each) / comb(size, each)) ** count for overlap, count in of_groups)
    states: dict[tuple[int, ...], float] = {(0,) * len(overlaps): 1.0}  # open groups of each overlap -> probability
    for drawn in range(routing.top_k):
        after: defaultdict[tuple[int, ...], float] = defaultdict(float)
        for opened, probability in states.items():
            num_open = sum(opened)
            held = sum(num * overlap for num, overlap in zip(opened, overlaps, strict=True))
            may_open = num_open < routing.top_groups
            pool = (num_experts if may_open else num_open * size) - drawn
            after[opened] += probability * (num_open * size - drawn - held) / pool
            for i, (overlap, num_groups) in enumerate(overlaps.items() if may_open else ()):
                grown = (*opened[:i], opened[i] + 1, *opened[i + 1 :])
                after[grown] += probability * (num_groups - opened[i]) * (size - overlap) / pool
        states = after
    return sum(states.values())


def _overlaps(size: int, groups: int, experts: Sequence[int]) -> Counter[int]:
    """How many of `experts` are in a group of `size` -> number of such groups; they sum to `groups`."""
    held = Counter(expert // size for expert in experts)
    return Counter(held[group] for group in range(groups))


def _check_top_k(placement: ExpertPlacement, routing: RoutingPlan) -> None:
    with plan_errors():
        routing.check_experts(placement.num_experts)
