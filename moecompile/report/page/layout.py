"""Where things are, and what moves.

(5) Bytes from rank to rank, in blocks of nodes: planned, counted, and the least that any dispatch sends.
(6) Experts on ranks on nodes; the exchanges of a layer; its graph before and after.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moecompile.errors import MoecompileError
from moecompile.mesh import LinkClass, Part
from moecompile.plan import LayerPlan, Plan
from moecompile.planner.traffic import Copies, Wire, copies_per_token, forward_traffic
from moecompile.report.page.document import Chart, Section, chart, details, escape, first_rows, heat, note, table
from moecompile.report.page.read import Run
from moecompile.report.text import bytes_text, fold_paths, plural

# -- (5) traffic -------------------------------------------------------------------------------------------------------


MAX_RANKS = 128
Matrix = NDArray[np.float64]


def traffic_section(run: Run) -> Section | None:
    """The section; None: one rank, or no estimate."""
    plan = run.plan
    if plan is None or plan.estimate is None or plan.estimate.assumes is None or plan.mesh.ep == 1:
        return None
    if not plan.layers or plan.mesh.world_size > MAX_RANKS:
        return None
    planned = planned_bytes(plan)
    counted = np.array(run.profile["traffic"]) if run.profile.get("traffic") else None
    parts: list[str | Chart] = [_traffic_map(plan, planned, counted)]
    text = "Bytes that leave a rank in the forward exchanges of one optimizer step, all of its MoE layers together."
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
        wire = Wire(
            d_model=layer.row_site.d_model, tokens_per_rank=tokens, wire_dtype=layer.dispatch.wire_dtype,
            element_bytes=assumes.number_bytes,
        )  # fmt: skip
        sent = forward_traffic(layer.dispatch.kind, layer.placement, layer.routing, mesh, wire)
        by_link = {LinkClass.INTRA_NODE: sent.intra_node, LinkClass.INTER_NODE: sent.inter_node}
        for rank in plan.ranks_of(layer):
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


def _traffic_map(plan: Plan, planned: Matrix, counted: Matrix | None) -> Chart:
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
    yield first_rows(("", *(label for label, _ in shown)), rows, 64, "pairs of nodes")
    if bound is not None:
        text = "Lower bound, of the last steps: each token's row once to each other node with one of its experts, "
        yield note(f"{text}and one sum back. Without compression, no dispatch that computes the same sends less.")


def blocks(matrix: Matrix, nodes: int) -> Matrix:
    """(R, R) to (N, N): sums over the ranks of nodes."""
    size = len(matrix) // nodes
    found: Matrix = matrix.reshape(nodes, size, nodes, size).sum((1, 3))
    return found


# -- (6) layout --------------------------------------------------------------------------------------------------------


_ROWS = ("all_to_all", "all_gather", "reduce_scatter")  # exchanges whose shape follows from the rows per token
_MOST = 2048  # boxes of the chart
_STAGES = ("captured", "rewritten", "lowered", "fused")


def layout_section(run: Run) -> Section | None:
    """The section; None: no layer is planned."""
    if run.plan is None or not run.plan.layers:
        return None
    plan = run.plan
    parts: list[str | Chart] = [_placement(plan)]
    kinds: dict[tuple[object, ...], list[LayerPlan]] = {}
    for layer in plan.layers:
        placement = replace(layer.placement, order=())
        kinds.setdefault((layer.dispatch, placement, layer.routing, layer.row_site.d_model), []).append(layer)
    for layers in kinds.values():
        parts += _exchanges(run, layers)
    parts += _graphs(run.folder / "graphs")
    return Section(name="layout", title="Experts, ranks, nodes, exchanges", parts=parts)


def _placement(plan: Plan) -> Chart:
    """Boxes: nodes, their ranks, the experts of each rank in one layer."""
    import plotly.graph_objects as go

    mesh, placement = plan.mesh, plan.layers[0].placement
    ids, labels, parents = ["all"], [plural(mesh.num_nodes, "node")], [""]
    ranks = range(min(mesh.world_size, max(placement.ep, _MOST // (1 + placement.experts_per_rank))))
    for node in dict.fromkeys(mesh.node_of(rank) for rank in ranks):
        ids, labels, parents = [*ids, f"n{node}"], [*labels, f"node {node}"], [*parents, "all"]
    for rank in ranks:
        ids.append(f"r{rank}")
        labels.append(f"rank {rank}")
        parents.append(f"n{mesh.node_of(rank)}")
        for expert in placement.experts_of(rank % placement.ep):
            ids.append(f"r{rank}e{expert}")
            labels.append(str(expert))
            parents.append(f"r{rank}")
    trace = go.Icicle(ids=ids, labels=labels, parents=parents, sort=False, pathbar={"visible": False},
                      marker={"line": {"width": 1, "color": "rgba(140,140,140,0.7)"}},
                      hovertemplate="%{parent}: %{label}<extra></extra>")  # fmt: skip
    more = "" if len(ranks) == mesh.world_size else f", the first {len(ranks)} of {mesh.world_size} ranks"
    which = plan.layers[0].site.fqn if any(layer.placement.order for layer in plan.layers) else "a layer"
    return chart("placement", [trace], {"title": {"text": f"Experts of {which}, by rank and node{more}"}}, height=300)


def _exchanges(run: Run, layers: Sequence[LayerPlan]) -> Iterator[str]:
    layer, plan = layers[0], run.plan
    assert plan is not None
    where = ", ".join(path for path, _ in fold_paths([(each.site.fqn, 0) for each in layers]))
    yield f"<h3>Exchanges in forward, {escape(layer.dispatch.kind)}: {escape(where)}</h3>"
    if not layer.lent_steps:
        yield note("None: every rank has all experts.")
        return
    yield table(
        ("", "exchange", "axis", "direction", "rows sent off the rank", "bytes"),
        _rows(plan, layer),
        numbers=False,
    )
    yield note(
        "Expected per rank and micro-batch under even load, in order. Backward sends the same rows the other way. "
        "Counts and assignments are small; their bytes are part of the figure in the verdict."
    )
    found = [row for row in run.profile.get("exchanges", ()) if row["layer"] in {each.site.fqn for each in layers[:1]}]
    if found:
        yield f"<h4>As measured in {escape(layer.site.fqn)}, rank 0, one micro-batch</h4>"
        yield table(
            ("exchange", "axis", "sent", "received", "bytes off the rank"),
            [(row["op"], row["axis"], row["sent"], row["received"], bytes_text(row["bytes"])) for row in found],
            numbers=False,
        )


def _rows(plan: Plan, layer: LayerPlan) -> Iterator[tuple[object, ...]]:
    copies, tokens, width = _copies(plan, layer), _tokens(plan), layer.row_site.d_model
    compute = plan.estimate.assumes.number_bytes if plan.estimate and plan.estimate.assumes else 4
    there, back = layer.dispatch.wire.row_bytes(width, compute)
    half = sum(op in _ROWS for op, _ in layer.lent_steps) // 2
    seen = 0
    for number, (op, axis) in enumerate(layer.lent_steps, start=1):
        is_rows = op in _ROWS
        seen += is_rows
        direction = "back to the tokens" if seen > half else "to the experts"
        if not is_rows or copies is None or tokens is None:
            yield number, op, axis, direction, "", ""
            continue
        by_axis = {"inter": copies.inter_node, "intra": copies.intra_node}
        rows = round(tokens * by_axis.get(axis.rpartition("_")[2], copies.inter_node + copies.intra_node))
        yield number, op, axis, direction, f"{rows} x {width}", bytes_text(rows * (back if seen > half else there))


def _copies(plan: Plan, layer: LayerPlan) -> Copies | None:
    try:
        return copies_per_token(layer.dispatch.kind, layer.placement, layer.routing, plan.mesh)
    except MoecompileError:
        return None


def _tokens(plan: Plan) -> int | None:
    """Tokens of a micro-batch that a rank routes."""
    assumes = plan.estimate.assumes if plan.estimate else None
    return None if assumes is None else plan.mesh.share(assumes.tokens_per_rank, Part.TOKENS)


def _graphs(folder: Path) -> Iterator[str]:
    """Pictures of the first and the last graph of the first kind of layer, and the listings of all stages."""
    captured = sorted(folder.glob("*.captured.txt")) if folder.is_dir() else []
    for path in captured[:1]:
        stem = path.name.removesuffix(".captured.txt")
        stages = [stage for stage in _STAGES if (folder / f"{stem}.{stage}.txt").exists()]
        yield f"<h3>Graph of {escape(stem)}, before and after</h3>"
        pictures = [folder / f"{stem}.{stage}.svg" for stage in (stages[0], stages[-1])]
        inside = "".join(
            f'<figure><img style="width:100%;background:#fff" alt="graph" src="data:image/svg+xml;base64,'
            f'{base64.b64encode(picture.read_bytes()).decode()}"></figure>'
            for picture in pictures
            if picture.exists()
        )
        yield details("Pictures", f'<div class="graphs">{inside}</div>')
        for stage in stages:
            text = (folder / f"{stem}.{stage}.txt").read_text(encoding="utf-8")
            yield details(f"Listing: {stage}", f"<pre>{escape(text.partition('def forward')[0].strip())}</pre>")
