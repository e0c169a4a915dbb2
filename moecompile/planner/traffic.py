"""Expected bytes on the wire of one MoE layer's forward pass.

Routing is taken to be as even as its constraint allows: a token's scores are independent and alike for all experts, so
experts are taken in a random order. The groups of the first M different ones are the open groups, and the first K
experts of open groups are chosen.

1. Copies per peer. Every expert is chosen by K/E of the tokens, so `flat` sends K/ep rows per token to each rank.
   `dedup` sends one row unless the token missed all experts of the rank. Draw experts one after another; after k draws
   that all missed the rank, with m open groups of E/G experts that hold h of the rank's experts,

       P(next one is of an open group, and misses) = (m E/G - k - h) / pool
       P(next one opens a group of which the rank holds o, and misses) = (E/G - o) / pool   for each closed group, m < M
       pool = E - k if m < M else M E/G - k                                                 -> `_miss_probability`

   This is exact for groups scored by their best expert. Scored by the sum of their two best, simulated copies differ
   by 0.2% to 0.6% for DeepSeek-V3 (256 experts, 8 groups) and by 3% for groups of two experts.
   A router that starts from virtual groups (docs/upcycling.md) chooses the experts of a group together, and `dedup`
   sends less than this until training has told them apart.

2. Position of the source. EP groups fill whole nodes or fit into one, so every rank has the same number of peers of
   each link class, and the mean over source ranks needs only the mean of step 1 over destination ranks.

3. Bytes per copy, as `moecompile.ops.exchange` sends them (N: bytes of an element, w: of a routing weight):

       flat    dispatch D N a row, combine D N a row, counts 8 e / T to each peer
       dedup   dispatch D N a row, combine D N a row, assignments (w + 2) K/ep, counts 16 / T to each peer

   Combined rows leave the expert's rank, dispatched ones the token's; the mean over ranks is the same for both.

Legend: E experts, e experts per rank, G groups, M open groups, K top-k, D model dim, T tokens per rank and micro-batch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache

from moecompile.errors import PlanError
from moecompile.mesh import MeshSpec
from moecompile.plan import ExpertPlacement, RoutingPlan, Traffic

COUNT_BYTES = 8  # exchange_counts sends int64
CODE_BYTES = 2  # exchange_assignments sends an int16 code beside each weight
DEDUP_COUNTS = 2  # rows and assignments


@dataclass(frozen=True, kw_only=True)
class Wire:
    """What a row weighs.

    d_model: elements of a row. tokens_per_rank: tokens of a micro-batch, over which the counts are spread.
    element_bytes, weight_bytes: of an activation and of a routing weight (4: fp32).
    """

    d_model: int
    tokens_per_rank: int
    element_bytes: int = 4
    weight_bytes: int = 4


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Rows per token that a layer's dispatch sends, by link class; `own` rows stay on their rank."""

    own: float
    intra_node: float
    inter_node: float


def copies_per_token(kind: str, placement: ExpertPlacement, routing: RoutingPlan, mesh: MeshSpec) -> Copies:
    """Expected rows per token of one dispatch; `kind` is local, flat or dedup.

    Raises:
        PlanError: the open groups hold fewer experts than a token uses.
    """
    per_peer = _rows_per_peer(kind, placement, routing)
    intra, inter = _peers(mesh)
    return Copies(own=per_peer, intra_node=intra * per_peer, inter_node=inter * per_peer)


def forward_traffic(kind: str, placement: ExpertPlacement, routing: RoutingPlan, mesh: MeshSpec, wire: Wire) -> Traffic:
    """Expected bytes per token of one layer that leave a rank in the forward pass: dispatch, combine and metadata.

    Raises:
        PlanError: as `copies_per_token`.
    """
    per_peer = 2 * _rows_per_peer(kind, placement, routing) * wire.d_model * wire.element_bytes
    per_peer += _metadata_per_peer(kind, placement, routing, wire)
    intra, inter = _peers(mesh)
    return Traffic(intra_node=intra * per_peer, inter_node=inter * per_peer)


def choose_dispatch(placement: ExpertPlacement, routing: RoutingPlan, mesh: MeshSpec, wire: Wire) -> str:
    """What `dispatch=auto` means: local for ep = 1, else least inter-node bytes, then least bytes in all.

    Raises:
        PlanError: as `copies_per_token`.
    """
    if mesh.ep == 1:
        return "local"

    def cost(kind: str) -> tuple[float, float]:
        traffic = forward_traffic(kind, placement, routing, mesh, wire)
        return traffic.inter_node, traffic.inter_node + traffic.intra_node

    return min(("flat", "dedup"), key=cost)


def _peers(mesh: MeshSpec) -> tuple[int, int]:
    """EP peers of any rank on its own node and on other nodes (step 2)."""
    on_node = min(mesh.ep, mesh.ranks_per_node)
    return on_node - 1, mesh.ep - on_node


@cache  # the layers of a model ask the same question
def _rows_per_peer(kind: str, placement: ExpertPlacement, routing: RoutingPlan) -> float:
    """Expected rows per token to one EP rank, mean over the ranks (step 1)."""
    _check_top_k(placement, routing)
    if kind == "dedup":
        return 1 - sum(_miss_probability(placement, routing, rank) for rank in range(placement.ep)) / placement.ep
    return routing.top_k / placement.ep


def _metadata_per_peer(kind: str, placement: ExpertPlacement, routing: RoutingPlan, wire: Wire) -> float:
    """Bytes per token to one peer beside the rows (step 3)."""
    if kind == "dedup":
        assignments = routing.top_k / placement.ep
        return assignments * (wire.weight_bytes + CODE_BYTES) + COUNT_BYTES * DEDUP_COUNTS / wire.tokens_per_rank
    return COUNT_BYTES * placement.experts_per_rank / wire.tokens_per_rank


def _miss_probability(placement: ExpertPlacement, routing: RoutingPlan, rank: int) -> float:
    """Probability that a token uses no expert of EP rank `rank`."""
    size = placement.num_experts // routing.groups
    overlaps = _overlaps(placement, routing.groups, rank)
    states: dict[tuple[int, ...], float] = {(0,) * len(overlaps): 1.0}  # open groups of each overlap -> probability
    for drawn in range(routing.top_k):
        after: defaultdict[tuple[int, ...], float] = defaultdict(float)
        for opened, probability in states.items():
            num_open = sum(opened)
            held = sum(num * overlap for num, overlap in zip(opened, overlaps, strict=True))
            may_open = num_open < routing.top_groups
            pool = (placement.num_experts if may_open else num_open * size) - drawn
            after[opened] += probability * (num_open * size - drawn - held) / pool
            for i, (overlap, num_groups) in enumerate(overlaps.items() if may_open else ()):
                grown = (*opened[:i], opened[i] + 1, *opened[i + 1 :])
                after[grown] += probability * (num_groups - opened[i]) * (size - overlap) / pool
        states = after
    return sum(states.values())


def _overlaps(placement: ExpertPlacement, groups: int, rank: int) -> Counter[int]:
    """Experts that `rank` holds of a group -> number of such groups; they sum to `groups`."""
    size = placement.num_experts // groups
    held = Counter(expert // size for expert in placement.experts_of(rank))
    return Counter(held[group] for group in range(groups))


def _check_top_k(placement: ExpertPlacement, routing: RoutingPlan) -> None:
    candidates = placement.num_experts // routing.groups * routing.top_groups
    if routing.top_k > candidates:
        raise PlanError(
            "routing.top_k", routing.top_k,
            f"{routing.top_groups} of {routing.groups} groups hold only {candidates} experts",
            f"Use at most {candidates}, or raise routing.top_groups",
        )  # fmt: skip
