"""Copies of a token that cross nodes, by dispatch: simulated ranks against the planner's closed form.

    python benchmarks/dispatch_bytes.py                       DeepSeek-V3's routing on 2, 4 and 8 nodes of 8 ranks
    python benchmarks/dispatch_bytes.py --tokens 2048         more tokens a rank: closer to the expectation

No process group is needed: all ranks of an EP group are played in this process, and each packs its rows with the very
ops that a compiled model uses. Routing is drawn as the planner assumes it: independent scores, alike for all experts.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from moecompile import ops  # noqa: F401  (registers the ops)
from moecompile.mesh import LinkClass, MeshSpec
from moecompile.plan import ExpertPlacement, RoutingPlan
from moecompile.planner import Links, Wire, choose_dispatch, copies_per_token, forward_traffic

op = torch.ops.moecompile
KINDS = ("flat", "dedup", "hierarchical", "allgather")
Rows = dict[tuple[str, LinkClass], float]
LINKS = Links(intra=155e9, inter=50e9, latency=20e-6)  # conf/hardware/h800.yaml


def simulate(mesh: MeshSpec, placement: ExpertPlacement, routing: RoutingPlan, tokens_per_rank: int, seed: int) -> Rows:
    """Rows per token that one EP group sends, by dispatch and link class."""
    rng = np.random.default_rng(seed)
    ids = [draw(routing, placement.num_experts, tokens_per_rank, rng) for _ in range(mesh.ep)]
    sends = {"flat": _flat, "dedup": _dedup, "hierarchical": _hierarchical, "allgather": _allgather}
    rows = {(kind, link): 0.0 for kind in KINDS for link in LinkClass}
    for kind, send in sends.items():
        for source, target, number in send(mesh, placement, ids):
            rows[kind, mesh.link(source, target)] += number / (tokens_per_rank * mesh.ep)
    return rows


def draw(routing: RoutingPlan, num_experts: int, num_tokens: int, rng: np.random.Generator) -> Tensor:
    """ids_TK of tokens whose scores are independent and alike for all experts."""
    size = num_experts // routing.groups
    best = {"max": 1, "top2": 2, "topk_over_m": max(1, routing.top_k // routing.top_groups)}[routing.group_score]
    score = rng.standard_normal((num_tokens, num_experts))
    by_group = np.sort(score.reshape(num_tokens, routing.groups, size), axis=2)[:, :, -best:].sum(2)
    open_groups = np.argsort(-by_group, axis=1)[:, : routing.top_groups]
    is_open = (np.arange(num_experts) // size == open_groups[:, :, None]).any(axis=1)
    return torch.from_numpy(np.argsort(np.where(is_open, -score, np.inf), axis=1)[:, : routing.top_k].copy())


Sends = list[tuple[int, int, int]]  # from rank, to rank, rows


def _flat(mesh: MeshSpec, placement: ExpertPlacement, ids: list[Tensor]) -> Sends:
    sends = []
    for source, ids_TK in enumerate(ids):
        *_, counts_E = op.permute(_rows(ids_TK), ids_TK, placement.num_experts)
        sends += _to_each(source, range(mesh.ep), counts_E.view(mesh.ep, -1).sum(1))
    return sends


def _dedup(mesh: MeshSpec, placement: ExpertPlacement, ids: list[Tensor]) -> Sends:
    sends = []
    for source, ids_TK in enumerate(ids):
        codes_A, counts_r2 = op.count_rows(ids_TK, placement.num_experts, mesh.ep)
        packed = op.pack_rows(
            _rows(ids_TK), _weights(ids_TK), codes_A, placement.num_experts, mesh.ep, _table(counts_r2)
        )
        assert packed[0].shape[0] == int(counts_r2[:, 0].sum())
        sends += _to_each(source, range(mesh.ep), counts_r2[:, 0])
    return sends


def _hierarchical(mesh: MeshSpec, placement: ExpertPlacement, ids: list[Tensor]) -> Sends:
    nodes, on_node = mesh.nodes_per_ep_group, mesh.ep // mesh.nodes_per_ep_group
    if nodes == 1:
        return _dedup(mesh, placement, ids)
    sends, mail = [], []  # mail: for each source, what each node gets: counts, rows, weights, codes
    for source, ids_TK in enumerate(ids):
        codes_A, counts_Nn = op.count_hops(ids_TK, placement.num_experts, nodes, on_node)
        rows_VD, weights_TK = _rows(ids_TK), _weights(ids_TK)
        packed = op.pack_rows(rows_VD, weights_TK, codes_A, placement.num_experts, nodes, _table(counts_Nn))
        rows, assignments = counts_Nn[:, 0].tolist(), counts_Nn[:, 1].tolist()
        parts = (packed[0].split(rows), packed[2].split(assignments), packed[3].split(assignments))
        mail.append(list(zip(counts_Nn, *parts, strict=True)))
        sends += _to_each(source, range(source % on_node, mesh.ep, on_node), counts_Nn[:, 0])
    for rank in range(mesh.ep):
        node, position = divmod(rank, on_node)
        arrived = [mail[source][node] for source in range(position, mesh.ep, on_node)]
        counts, rows, weights, codes = zip(*arrived, strict=True)
        onward_L2 = op.onward_counts(torch.stack(counts))
        experts = placement.num_experts // nodes
        packed = op.pack_rows(
            torch.cat(rows), torch.cat(weights), torch.cat(codes), experts, on_node, _table(onward_L2)
        )
        assert packed[0].shape[0] == int(onward_L2[:, 0].sum())
        sends += _to_each(rank, range(node * on_node, (node + 1) * on_node), onward_L2[:, 0])
    return sends


def _allgather(mesh: MeshSpec, placement: ExpertPlacement, ids: list[Tensor]) -> Sends:
    nodes, on_node = mesh.nodes_per_ep_group, mesh.ep // mesh.nodes_per_ep_group
    table = torch.stack([op.count_gathered(ids_TK, placement.num_experts, mesh.ep)[0] for ids_TK in ids])
    sends = []
    for source, ids_TK in enumerate(ids):
        own_N = op.own_tokens(ids_TK, table[source].expand(2, 1, -1), placement.num_experts)
        block, _, _ = op.pad_tokens(_rows(ids_TK), _weights(ids_TK), ids_TK, own_N, table.expand(2, -1, -1))
        column = range(source % on_node, mesh.ep, on_node) if nodes > 1 else ()
        sends += [(source, target, block.shape[0]) for target in column]
        first = source // on_node * on_node
        sends += [(source, target, nodes * block.shape[0]) for target in range(first, first + on_node)]
    return sends


def _to_each(source: int, targets: range, rows: Tensor) -> Sends:
    return [(source, target, number) for target, number in zip(targets, rows.tolist(), strict=True)]


def _rows(ids_TK: Tensor) -> Tensor:
    return torch.zeros(ids_TK.shape[0], 1)


def _weights(ids_TK: Tensor) -> Tensor:
    return torch.zeros(ids_TK.shape)


def _table(sent_rn: Tensor) -> Tensor:
    """A table whose received half nobody reads."""
    return torch.stack((sent_rn, torch.zeros_like(sent_rn)))


def main() -> None:
    """Prints one table a mesh."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="tokens a rank")
    parser.add_argument("--d-model", type=int, default=7168, help="width of a row, for bytes")
    args = parser.parse_args()
    routing = RoutingPlan(
        top_k=8, score="sigmoid", normalize=True, scale=2.5, groups=8, top_groups=4, group_score="top2"
    )
    wire = Wire(d_model=args.d_model, tokens_per_rank=4096, element_bytes=2)
    print(
        "256 experts, top-8, 4 of 8 groups. Rows per token one way; MB per 1000 tokens there and back, bf16, "
        f"{args.d_model} wide."
    )
    for nodes in (2, 4, 8):
        mesh = MeshSpec(num_nodes=nodes, ranks_per_node=8, ep=8 * nodes)
        placement = ExpertPlacement(num_experts=256, ep=mesh.ep)
        found = simulate(mesh, placement, routing, args.tokens, seed=0)
        print(f"\n{nodes} nodes x 8 ranks, auto is {choose_dispatch(placement, routing, mesh, wire, LINKS)}")
        print(f"{'':14}{'across nodes':>24}{'within nodes':>24}{'MB across':>12}{'MB within':>12}{'metadata':>10}")
        print(f"{'':14}{'simulated':>12}{'predicted':>12}" + f"{'simulated':>12}{'predicted':>12}")
        for kind in KINDS:
            copies = copies_per_token(kind, placement, routing, mesh)
            traffic = forward_traffic(kind, placement, routing, mesh, wire)
            total = traffic.inter_node + traffic.intra_node
            rows = 2 * (copies.inter_node + copies.intra_node) * wire.d_model * wire.element_bytes
            print(
                f"{kind:14}{found[kind, LinkClass.INTER_NODE]:12.3f}{copies.inter_node:12.3f}"
                f"{found[kind, LinkClass.INTRA_NODE]:12.3f}{copies.intra_node:12.3f}"
                f"{traffic.inter_node / 1e3:12.1f}{traffic.intra_node / 1e3:12.1f}{(total - rows) / total:10.2%}"
            )


if __name__ == "__main__":
    main()
