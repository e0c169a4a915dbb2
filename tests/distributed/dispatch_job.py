"""One MoE layer over N ranks, and the same layer written plainly: outputs, every gradient and every byte compared.

The reference uses no op of moecompile: for each expert, the tokens that chose it, its FFN, weight and add.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moecompile.match.regions import Region
from moecompile.mesh import MeshSpec
from moecompile.nn import Experts
from moecompile.ops import traffic
from moecompile.passes.base import DispatchNodes, GraphPass, experts_calls, items
from moecompile.passes.delay_gradients import DelayWeightGradients
from moecompile.passes.fuse import Fuse
from moecompile.passes.lend import Lend
from moecompile.passes.lower import LOWERINGS, lower_to_backend
from moecompile.passes.overlap import Overlap
from moecompile.passes.place import Place
from moecompile.passes.run import run_passes
from moecompile.passes.shard import bind_axes, device_mesh_of
from moecompile.plan import (
    EXACT,
    BalancePlan,
    DispatchPlan,
    ExpertPlacement,
    ExpertsPlan,
    FFNSite,
    LayerPlan,
    RoutingPlan,
    can_fuse,
)

D_MODEL, D_EXPERT = 6, 5
KINDS = ("flat", "dedup", "hierarchical", "allgather")
ROUTINGS = ("uniform", "one expert", "few experts", "drops", "all dropped")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer, the tokens of each rank and how they choose."""

    kind: str
    mesh: MeshSpec
    experts_per_rank: int
    top_k: int
    tokens: tuple[int, ...]
    routing: str = "uniform"
    seed: int = 0
    dtype: torch.dtype = torch.float64
    wire_dtype: str = "auto"
    chunks: int = 0  # 0: exchanges are not in flight
    slots: int = 0  # for borrowed experts on each rank
    loan_rows: tuple[int, int] = (0, 0)
    backend: str = ""  # of the dispatch
    experts_backend: str = ""
    order: tuple[int, ...] = ()  # the expert at each position; empty: in the order of ids

    @property
    def num_experts(self) -> int:
        return self.mesh.ep * self.experts_per_rank

    @property
    def num_nodes(self) -> int:
        return self.mesh.nodes_per_ep_group

    @property
    def on_node(self) -> int:
        return self.mesh.ep // self.num_nodes

    def layer(self) -> LayerPlan:
        drops = self.routing in ("drops", "all dropped")
        site = FFNSite(
            fqn="", kind="gated", d_model=D_MODEL, d_ff=D_EXPERT, bias_up=False, bias_down=False, activation="silu",
            index=0, swiglu=True,
        )  # fmt: skip
        overlap = ("none", "shared")[self.chunks] if self.chunks < 2 else "chunks"
        dispatch = DispatchPlan(
            kind=self.kind, wire_dtype=self.wire_dtype, overlap=overlap, chunks=max(1, self.chunks),
            backend=self.backend, **self.lending,
        )  # fmt: skip
        return LayerPlan(
            site=site,
            experts=ExpertsPlan(
                num_routed=self.num_experts, granularity=1, num_shared=0, d_expert=D_EXPERT, d_shared=0, init="random",
                backend=self.experts_backend,
            ),
            routing=RoutingPlan(
                top_k=self.top_k, score="softmax", normalize=True, scale=1.0, groups=1, top_groups=1,
                group_score="max", capacity_factor=1.0 if drops else None, drop="position" if drops else "none",
            ),
            balance=BalancePlan(rule="none", rate=0.0),
            placement=ExpertPlacement(
                num_experts=self.num_experts, ep=self.mesh.ep, nodes=self.num_nodes, order=self.order
            ),
            dispatch=dispatch,
            fused=can_fuse(site, dispatch),
        )  # fmt: skip

    @property
    def lending(self) -> dict[str, Any]:
        near, far = self.loan_rows
        return {"balance": "lend", "slots": self.slots, "loan_rows": near, "far_loan_rows": far} if self.slots else {}

    def ids(self, rank: int) -> Tensor:
        """ids_TK of one global rank; `num_experts` is a dropped assignment."""
        generator = torch.Generator().manual_seed(1000 * self.seed + rank)
        shape = (self.tokens[rank], self.top_k)
        if self.routing == "one expert":
            return torch.full(shape, self.num_experts - 1)
        if self.routing == "all dropped":
            return torch.full(shape, self.num_experts)
        scores = torch.rand(self.tokens[rank], self.num_experts, generator=generator)
        if self.routing == "few experts":  # the first ones, as few as a token needs
            scores[:, self.top_k :] -= 1
        ids = scores.argsort(1, descending=True)[:, : self.top_k]
        if self.routing == "drops":
            ids[torch.rand(shape, generator=generator) < 0.4] = self.num_experts
            ids[:1] = self.num_experts
        return ids

    def inputs(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """x_TD, weights_TK and the gradient of the output, of one global rank."""
        generator = torch.Generator().manual_seed(1000 * self.seed + rank + 500)
        num_tokens = self.tokens[rank]

        def draw(width: int) -> Tensor:
            return torch.randn(num_tokens, width, generator=generator, dtype=torch.float64).to(self.dtype)

        return draw(D_MODEL), draw(self.top_k).abs(), draw(D_MODEL)

    def weights(self) -> tuple[Tensor, Tensor]:
        """gate_up_proj and down_proj of all experts."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = ((self.num_experts, 2 * D_EXPERT, D_MODEL), (self.num_experts, D_MODEL, D_EXPERT))
        up, down = (torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype) for shape in shapes)
        return up, down


Results = dict[str, Tensor | None]  # output, and gradients of x, weights, gate_up and down; None: missing


# -- the layer over ranks --------------------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


def lowered(case: Case, ep_rank: int) -> fx.GraphModule:
    """permute -> experts -> unpermute with the exchanges of the case, and the experts of one EP rank."""
    experts = Experts(D_MODEL, D_EXPERT, case.num_experts, gated=True, activation=SwiGLU())
    for name, full in zip(("gate_up_proj", "down_proj"), case.weights(), strict=True):
        setattr(experts, name, nn.Parameter(full[list(case.layer().placement.experts_of(ep_rank))]))
    graph, layer, ops = fx.Graph(), case.layer(), torch.ops.moecompile
    x, ids, weights = (graph.placeholder(name) for name in ("x", "ids", "weights"))
    dropless = layer.routing.drop == "none"
    permuted = graph.call_function(ops.permute, (x, ids, case.num_experts, *(() if dropless else (False,))))
    rows, order, counts = items(graph, permuted, "rows", "order", "counts")
    outputs = graph.call_module("experts", (rows, counts))
    result = graph.call_function(ops.unpermute, (outputs, order, weights))
    graph.output(result)
    module = fx.GraphModule({"experts": experts}, graph)
    region = Region(path="", graph=module, module=module, matches={})
    module = Place().run(region, [layer]).graph
    graph, (outputs,) = module.graph, experts_calls(module)
    (lower_to_backend if case.backend else LOWERINGS[case.kind])(graph, DispatchNodes.around(outputs), layer)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    steps: list[GraphPass] = [Lend()] * (case.slots > 0) + [Overlap(), DelayWeightGradients()] * (case.chunks > 0)
    steps += [Fuse()] * bool(case.experts_backend)
    region = Region(path="", graph=module, module=module, matches={})
    return run_passes(steps, {"": region}, {"": [layer]})[""].graph


def run(
    module: fx.GraphModule, case: Case, rank: int, forward: Callable[..., Tensor] | None = None
) -> tuple[Results, dict[int, int]]:
    """One forward (of the module, or what it was compiled to) and backward; results, bytes sent to each global rank."""
    x, weights, grad = case.inputs(rank)
    x.requires_grad_()
    weights.requires_grad_()
    traffic.take()
    out = (module if forward is None else forward)(x, case.ids(rank), weights)
    sent = traffic.take()
    out.backward(grad)
    assert traffic.take() == {}
    experts = module.experts
    found = {
        "output": out.detach(), "x": x.grad, "weights": weights.grad,
        "gate_up": experts.gate_up_proj.grad, "down": experts.down_proj.grad,
    }  # fmt: skip
    return found, sent


# -- the same, plainly -----------------------------------------------------------------------------------------------


Travel = Callable[[Tensor], Tensor]  # what a row suffers on the wire
AS_IT_IS: Travel = lambda rows: rows  # noqa: E731


def reference(case: Case, rank: int, travel: Travel = AS_IT_IS, back: Travel | None = None) -> Results:
    """What `run` must find on this rank, from the tokens of its whole EP group.

    Args:
        travel: to the experts, and back if `back` is not given.
    """
    back = travel if back is None else back
    peers = case.mesh.ep_peers(rank)
    xs, ws, gs = zip(*(case.inputs(peer) for peer in peers), strict=True)
    x, weights, ids = torch.cat(xs).requires_grad_(), torch.cat(ws).requires_grad_(), torch.cat([*map(case.ids, peers)])
    up, down = (weight.requires_grad_() for weight in case.weights())
    copies, combine = _ways(case, x, travel, back)
    # flat: every (token, expert) travels for itself
    there, return_ = (travel, back) if case.kind == "flat" else (AS_IT_IS, AS_IT_IS)
    sums = []
    for ep_rank, rows in enumerate(copies):
        total = torch.zeros_like(x)
        for expert in case.layer().placement.experts_of(ep_rank):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            gate, value = (there(rows[token]) @ up[expert].T).chunk(2, -1)
            hidden = return_((F.silu(gate) * value) @ down[expert].T)
            total = total.index_add(0, token, weights[token, slot].unsqueeze(1) * hidden)
        sums.append(total)
    out = combine(sums)
    out.backward(torch.cat(gs))
    start = sum(case.tokens[peer] for peer in peers if peer < rank)
    mine = slice(start, start + case.tokens[rank])
    held = list(case.layer().placement.experts_of(peers.index(rank)))
    return {
        "output": out.detach()[mine], "x": x.grad[mine], "weights": weights.grad[mine],
        "gate_up": up.grad[held], "down": down.grad[held],
    }  # fmt: skip


def _ways(case: Case, x: Tensor, travel: Travel, back: Travel) -> tuple[list[Tensor], Callable[[list[Tensor]], Tensor]]:
    """Each EP rank's copy of all tokens as it got there, and how the ranks' sums come back."""
    nodes = case.num_nodes if case.kind in ("hierarchical", "allgather") else 1
    ranks = case.mesh.ep // nodes

    def spread(rows: Tensor, parts: int) -> list[Tensor]:
        if case.kind == "flat":
            return [rows] * parts
        if case.kind == "allgather":  # the gradients are summed on the wire's side of the cast
            rows = travel(rows)
        return [travel(rows) for _ in range(parts)]

    def collect(parts: list[Tensor]) -> Tensor:
        if case.kind == "flat":
            return sum(parts[1:], start=parts[0])
        first, *rest = (back(part) for part in parts)
        total = sum(rest, start=first)
        return back(total) if case.kind == "allgather" else total

    def combine(sums: list[Tensor]) -> Tensor:
        by_node = [collect(sums[node * ranks : (node + 1) * ranks]) for node in range(nodes)]
        return collect(by_node) if nodes > 1 else by_node[0]

    on_nodes = spread(x, nodes) if nodes > 1 else [x]
    return [copy for rows in on_nodes for copy in spread(rows, ranks)], combine


def recount(case: Case, rank: int) -> dict[int, int]:
    """Bytes that `rank` sends to each peer in forward, by counting ids; nothing to a peer is left out."""
    peers = case.mesh.ep_peers(rank)
    me, width = peers.index(rank), case.dtype.itemsize
    way_back = D_MODEL * {"auto": width, "fp32": 4, "fp8" + EXACT: width}.get(case.wire_dtype, 2)
    scales = {"fp8": 1, "fp8" + EXACT: 1, "fp8_128": 4}  # of one block with less than 32 numbers
    row = D_MODEL + scales[case.wire_dtype] if case.wire_dtype in scales else way_back
    assignment = max(width, 4) + 2
    links = [_Links(case.ids(peer).tolist(), case) for peer in peers]
    sent: Counter[int] = Counter(dict.fromkeys(range(case.mesh.ep), 0))
    count = {
        "flat": _flat,
        "dedup": _dedup,
        "hierarchical": _hierarchical,
        "allgather": _allgather,
        "local": _local,
    }[case.kind]
    for peer, there, back, assignments, numbers in count(case, links, me):
        sent[peer] += there * row + back * way_back + assignments * assignment + 8 * numbers * max(1, case.chunks)
    return {peers[position]: number for position, number in sent.items()}


class _Links:
    """Where the tokens of one source go, per rank and per node.

    num_tokens: those that have an expert. rows: tokens. assignments: (token, slot) pairs.
    """

    def __init__(self, ids: list[list[int]], case: Case) -> None:
        rank_of = case.layer().placement.rank_of
        ranks = [[rank_of(i) for i in chosen if i < case.num_experts] for chosen in ids]
        self.num_tokens = sum(any(i < case.num_experts for i in chosen) for chosen in ids)
        self.rank_assignments = Counter(r for chosen in ranks for r in chosen)
        self.rank_rows = Counter(r for chosen in ranks for r in set(chosen))
        nodes = [[r // case.on_node for r in chosen] for chosen in ranks]
        self.node_assignments = Counter(n for chosen in nodes for n in chosen)
        self.node_rows = Counter(n for chosen in nodes for n in set(chosen))


Messages = Iterable[tuple[int, int, int, int, int]]  # to peer, rows, rows back, assignments, int64 numbers


def _local(case: Case, links: list[_Links], me: int) -> Messages:
    return ()


def _flat(case: Case, links: list[_Links], me: int) -> Messages:
    for peer, link in enumerate(links):
        there, back = links[me].rank_assignments[peer], link.rank_assignments[me]
        yield peer, there, back, 0, case.experts_per_rank


def _dedup(case: Case, links: list[_Links], me: int) -> Messages:
    for peer, link in enumerate(links):
        yield peer, links[me].rank_rows[peer], link.rank_rows[me], links[me].rank_assignments[peer], 2


def _hierarchical(case: Case, links: list[_Links], me: int) -> Messages:
    on_node = case.on_node
    node, position = divmod(me, on_node)
    column = [m * on_node + position for m in range(case.num_nodes)]  # the sources whose rows pass through me
    for m, peer in enumerate(column):
        there, back = links[me].node_rows[m], links[peer].node_rows[node]
        yield peer, there, back, links[me].node_assignments[m], 2 + 2 * on_node
    for j in range(on_node):
        peer = node * on_node + j
        passed = [links[source] for source in column]
        others = [links[m * on_node + j] for m in range(case.num_nodes)]  # those whose rows peer passed to me
        there, back = (sum(link.rank_rows[p] for link in each) for p, each in ((peer, passed), (me, others)))
        yield peer, there, back, sum(link.rank_assignments[peer] for link in passed), 2


def _allgather(case: Case, links: list[_Links], me: int) -> Messages:
    longest, on_node, nodes = max(link.num_tokens for link in links), case.on_node, case.num_nodes
    node, position = divmod(me, on_node)
    for peer in range(len(links)):
        yield peer, 0, 0, 0, 3
    for m in range(nodes) if nodes > 1 else ():
        yield m * on_node + position, longest, longest, longest * case.top_k, 0
    for j in range(on_node):
        yield node * on_node + j, nodes * longest, nodes * longest, nodes * longest * case.top_k, 0


# -- many cases on this rank -----------------------------------------------------------------------------------------


Change = Callable[[Case, fx.GraphModule], None]


def results_of(cases: list[Case], rank: int, change: Change | None = None) -> list[tuple[Results, dict[int, int]]]:
    """`run` for each case. All cases must be of one mesh. `change` may break the lowered graphs."""
    (mesh,) = {case.mesh for case in cases}
    modules = nn.ModuleList(lowered(case, rank % mesh.ep) for case in cases)
    for case, module in zip(cases, modules, strict=True):
        if change is not None:
            change(case, module)
    bind_axes(modules, device_mesh_of(mesh, "cpu"), mesh.nodes_per_ep_group)
    return [run(module, case, rank) for case, module in zip(cases, modules, strict=True)]


def errors_of(
    cases: list[Case],
    rank: int,
    *,
    change: Change | None = None,
    travel: Travel = AS_IT_IS,
    back: Travel | None = None,
) -> list[dict[str, float]]:
    """For each case the largest absolute errors, and how many bytes differ from a recount (`bytes`)."""
    found = []
    for case, (got, sent) in zip(cases, results_of(cases, rank, change), strict=True):
        found.append(compare(case, rank, got, sent, travel, back))
    return found


def compare(
    case: Case, rank: int, got: Results, sent: dict[int, int], travel: Travel = AS_IT_IS, back: Travel | None = None
) -> dict[str, float]:
    """Largest absolute errors against the plain layer, and, without lending, how many bytes differ from a recount."""
    wanted = reference(case, rank, travel, back)
    errors = {name: error(got[name], wanted[name]) for name in wanted}
    if case.slots or case.backend:  # where rows go is not known from the ids alone, or the test's own back end counts
        return errors
    counted = recount(case, rank)
    errors["bytes"] = float(sum(abs(sent.get(peer, 0) - counted.get(peer, 0)) for peer in {*sent, *counted}))
    return errors


def error(got: Tensor | None, wanted: Tensor) -> float:
    """Largest absolute difference; a gradient that is missing is infinitely wrong."""
    if got is None:
        return float("inf")
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    return float((got - wanted).abs().max()) if got.numel() else 0.0


def random_cases(mesh: MeshSpec, seed: int, number: int) -> list[Case]:
    """Every kind that the mesh has, with the same random tokens, widths and choices for each."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    cases = []
    for i in range(number):
        experts_per_rank = between(1, 4)
        shared = {
            "mesh": mesh,
            "experts_per_rank": experts_per_rank,
            "top_k": between(1, min(8, mesh.ep * experts_per_rank)),
            "tokens": tuple(between(1, 9) * (between(0, 3) > 0) for _ in range(mesh.world_size)),
            "routing": ROUTINGS[i % len(ROUTINGS)],
            "seed": 100 * seed + i,
        }
        cases += [Case(kind=kind, **shared) for kind in kinds_on(mesh)]
    none = {"mesh": mesh, "experts_per_rank": 2, "top_k": 2, "tokens": (0,) * mesh.world_size}
    return cases + [Case(kind=kind, **none) for kind in kinds_on(mesh)]


def kinds_on(mesh: MeshSpec) -> tuple[str, ...]:
    if mesh.ep == 1:
        return ()
    return tuple(kind for kind in KINDS if kind != "hierarchical" or mesh.nodes_per_ep_group > 1)


def row_exchanges(module: fx.GraphModule) -> list[fx.Node]:
    """What an exchange brings that has a gradient: rows, or the weights among the assignments."""
    found = []
    for node in module.graph.nodes:
        name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
        first = node.target is operator.getitem and node.args[1] == 0
        if name in ("all_to_all", "all_gather", "reduce_scatter") or (
            first and "assignments" in str(node.args[0].target)
        ):
            found.append(node)
    return found
