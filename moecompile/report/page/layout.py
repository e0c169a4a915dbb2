"""(6) Experts on ranks on nodes; the exchanges of a layer; its graph before and after."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from moecompile.errors import MoecompileError
from moecompile.mesh import Part
from moecompile.plan import LayerPlan, Plan
from moecompile.planner.traffic import Copies, copies_per_token, row_bytes
from moecompile.report.page.charts import chart
from moecompile.report.page.document import Chart, Section, details, escape, note, table
from moecompile.report.page.read import Run
from moecompile.report.text import bytes_text, fold_paths, plural

_ROWS = ("all_to_all", "all_gather", "reduce_scatter")  # exchanges whose shape follows from the rows per token
_MOST = 2048  # boxes of the chart
_STAGES = ("captured", "rewritten", "lowered", "fused")


def section(run: Run) -> Section | None:
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
        ("", "exchange", "axis", "direction", "rows sent off the rank", "bytes"), _rows(plan, layer), numbers=False
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
    compute = 2 if plan.estimate and plan.estimate.assumes and "bf16" in plan.estimate.assumes.precision else 4
    size = row_bytes(layer.dispatch.wire_dtype, compute)
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
        yield number, op, axis, direction, f"{rows} x {width}", bytes_text(rows * width * size)


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
