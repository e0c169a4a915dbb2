"""(5) Bytes from rank to rank, in blocks of nodes: planned, counted, and the least that any dispatch sends."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moecompile.mesh import LinkClass, Part
from moecompile.plan import LayerPlan, Plan
from moecompile.planner.traffic import Wire, forward_traffic, row_bytes
from moecompile.report.page.charts import chart, heat
from moecompile.report.page.document import Chart, Section, note, table
from moecompile.report.page.read import Run
from moecompile.report.text import bytes_text

MAX_RANKS = 128
Matrix = NDArray[np.float64]


def section(run: Run) -> Section | None:
    """The section; None: one rank, or no estimate."""
    plan = run.plan
    if plan is None or plan.estimate is None or plan.estimate.assumes is None or plan.mesh.ep == 1:
        return None
    if not plan.layers or plan.mesh.world_size > MAX_RANKS:
        return None
    planned = planned_bytes(plan)
    counted = np.array(run.profile["traffic"]) if run.profile.get("traffic") else None
    parts: list[str | Chart] = [_map(plan, planned, counted)]
    text = "Bytes that leave a rank in the forward exchanges of one optimizer step, all MoE layers together."
    parts.append(note(f"{text} The lines are between nodes."))
    if plan.mesh.num_nodes > 1:
        parts += _by_node(run, plan, planned, counted)
    return Section(name="traffic", title="Traffic", parts=parts)


def planned_bytes(plan: Plan) -> Matrix:
    """(R, R) expected bytes of a step from rank to rank.

    Of hierarchical exchanges, those across nodes go to the rank with the same place on the other node; all others are
    even over the peers of a link class.
    """
    assert plan.estimate is not None and plan.estimate.assumes is not None
    mesh, assumes = plan.mesh, plan.estimate.assumes
    tokens = mesh.share(assumes.tokens_per_rank, Part.TOKENS)
    found = np.zeros((mesh.world_size, mesh.world_size))
    for layer in plan.layers:
        size = row_bytes(layer.dispatch.wire_dtype, 2 if "bf16" in assumes.precision else 4)
        wire = Wire(d_model=layer.row_site.d_model, tokens_per_rank=tokens, element_bytes=size)
        sent = forward_traffic(layer.dispatch.kind, layer.placement, layer.routing, mesh, wire)
        by_link = {LinkClass.INTRA_NODE: sent.intra_node, LinkClass.INTER_NODE: sent.inter_node}
        for rank in range(mesh.world_size):
            for link, count in by_link.items():
                peers = [peer for peer in mesh.ep_peers(rank) if mesh.link(rank, peer) is link]
                if link is LinkClass.INTER_NODE:
                    peers = _across(plan, layer, rank, peers)
                found[rank, peers] += count * tokens * assumes.accumulation / max(1, len(peers))
    return found


def _across(plan: Plan, layer: LayerPlan, rank: int, peers: list[int]) -> list[int]:
    """The peers on other nodes to which a rank sends itself."""
    if not layer.dispatch.on_two_levels:
        return peers
    size = plan.mesh.ranks_per_node
    return [peer for peer in peers if peer % size == rank % size]


def _map(plan: Plan, planned: Matrix, counted: Matrix | None) -> Chart:
    """One map per matrix, side by side, on one scale."""
    mesh = plan.mesh
    maps = [("planned", planned)] + ([("counted", counted)] if counted is not None else [])
    ranks, traces, marks, layout = [str(rank) for rank in range(mesh.world_size)], [], [], dict[str, object]()
    width = 1 / len(maps)
    for i, (label, matrix) in enumerate(maps):
        n = "" if i == 0 else str(i + 1)
        traces.append(heat(matrix, x=ranks, y=ranks, hover=f"{label}: rank %{{y}} to rank %{{x}}<br>%{{text}}",
                           text=[[bytes_text(v) for v in row] for row in matrix.tolist()],
                           xaxis=f"x{n}", yaxis=f"y{n}"))  # fmt: skip
        domain = [i * width, (i + 1) * width - 0.08 * (len(maps) > 1)]
        layout[f"xaxis{n}"] = {"title": {"text": f"{label}: to rank"}, "type": "category", "domain": domain}
        title = {"text": "from rank" if i == 0 else ""}
        layout[f"yaxis{n}"] = {"title": title, "type": "category", "autorange": "reversed", "anchor": f"x{n}"}
        for node in range(1, mesh.num_nodes):
            at = node * mesh.ranks_per_node - 0.5
            ends = {"xref": f"x{n}", "yref": f"y{n}", "line": {"width": 2, "color": "#8a8f99"}, "type": "line"}
            marks.append({**ends, "x0": at, "x1": at, "y0": -0.5, "y1": mesh.world_size - 0.5})
            marks.append({**ends, "y0": at, "y1": at, "x0": -0.5, "x1": mesh.world_size - 0.5})
    bar = {"title": {"text": "bytes"}, "thickness": 12, "exponentformat": "SI"}
    layout |= {"shapes": marks, "coloraxis": {"cmin": 0, "colorbar": bar}, "meta": {"scale": {"coloraxis": "amount"}},
               "title": {"text": "From rank to rank"}}  # fmt: skip
    return chart("traffic-map", traces, layout, height=420)


def _by_node(run: Run, plan: Plan, planned: Matrix, counted: Matrix | None) -> Iterator[str]:
    """Bytes between nodes, beside the lower bound that the measured routes give."""
    bound = np.array(run.profile["lower_bound"]) if run.profile.get("lower_bound") else None
    nodes, rows = plan.mesh.num_nodes, []
    matrices = [blocks(planned, nodes), None if counted is None else blocks(counted, nodes), bound]
    shown = [
        (label, m) for label, m in zip(("planned", "counted", "lower bound"), matrices, strict=True) if m is not None
    ]
    for a in range(nodes):
        for b in range(nodes):
            if a != b:
                rows.append((f"node {a} to node {b}", *(bytes_text(m[a, b]) for _, m in shown)))
    yield table(("", *(label for label, _ in shown)), rows[:64])
    if bound is not None:
        text = "Lower bound, of the last steps: each token's row once to each other node with one of its experts, "
        yield note(f"{text}and one sum back. Without compression, no dispatch that computes the same sends less.")


def blocks(matrix: Matrix, nodes: int) -> Matrix:
    """(R, R) to (N, N): sums over the ranks of nodes."""
    size = len(matrix) // nodes
    found: Matrix = matrix.reshape(nodes, size, nodes, size).sum((1, 3))
    return found
