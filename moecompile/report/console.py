"""What the command line prints: the plan, the passes, the sites and the closing summary. Needs no torch.

Cells hold deliberate line breaks, so that tables fit 80 columns also where the output is not a terminal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moecompile.mesh import MeshSpec
from moecompile.plan import EXCHANGES, Estimate, LayerPlan, Plan, Traffic
from moecompile.report.text import bytes_text, count_text, fold_paths, plural, unsuffixed

if TYPE_CHECKING:
    from moecompile.passes.base import PassRecord

_STATUS_STYLE = {"ok": "green", "rewritten": "green", "failed": "bold red", "not_matched": "yellow"}
_EXCHANGE_OPS = {op for ops in EXCHANGES.values() for op in ops}


def print_plan(plan: Plan, console: Console) -> None:
    """The plan for review: mesh, layers, reductions and what the planner predicts."""
    console.print(_header(plan))
    console.print()
    if plan.layers:
        console.print(_layers_table(plan.layers, _path_width(console)))
        console.print()
        for kind in dict.fromkeys(layer.dispatch.kind for layer in plan.layers if layer.dispatch.exchanges):
            console.print(Text(f"{kind}, forward: {', '.join(EXCHANGES[kind])}"))
        console.print()
    console.print(_reductions_table(plan))
    if plan.estimate is not None:
        console.print()
        _print_estimate(plan.estimate, console)


def print_passes(records: Sequence[PassRecord], console: Console) -> None:
    """One numbered line a pass: `5 lower   12 -> 19 nodes   +3 all_to_all, ...   0.02 s`."""
    grid = _grid()
    for number, record in enumerate(records, start=1):
        grid.add_row(
            Text(str(number)),
            Text(record.name, style="bold"),
            Text(_nodes_text(record), no_wrap=True),
            Text(_added_text(record)),
            Text(f"{record.seconds:.2f} s", no_wrap=True),
        )
    console.print(grid)


def print_sites(sites: Sequence[Mapping[str, str]], console: Console) -> None:
    """Every FFN that was found, and each near miss with its reason.

    Args:
        sites: {fqn, kind, where, status, reason}, the `sites` of result.json.
    """
    table = _table("site", "kind", "status", "reason")
    keys = [(s["fqn"] or s["where"], (s["kind"], s["status"], unsuffixed(s["reason"]))) for s in sites]
    for path, positions in fold_paths(keys):
        site = sites[positions[0]]
        table.add_row(
            _path_text(path, len(positions), _path_width(console)),
            Text(site["kind"]),
            Text(site["status"].replace("_", " "), style=_STATUS_STYLE.get(site["status"], "")),
            Text(site["reason"]),
        )
    console.print(table)


def print_result(result: Mapping[str, Any], console: Console) -> None:
    """The closing summary of a training run; what the run did not measure is left out.

    Args:
        result: the content of result.json.
    """
    status = str(result["status"])
    console.print(
        Text.assemble(
            (str(result["recipe"]), "bold"), "  ", (status, _STATUS_STYLE.get(status, "")), f"  {result['seconds']:.1f} s"
        )
    )
    grid = _grid()
    for name, text in _result_lines(result):
        grid.add_row(Text(name, style="dim"), Text(text, overflow="fold"))
    console.print(grid)


def _header(plan: Plan) -> Table:
    mesh, grid = plan.mesh, _grid()
    axes = ", ".join(f"{name} {getattr(mesh, name)}" for name in ("ep", "edp", "dp_replicate", "dp_shard"))
    nodes, ranks = plural(mesh.num_nodes, "node"), plural(mesh.ranks_per_node, "rank")
    grid.add_row(Text("plan", style="bold"), Text(f"{plan.hash}, {plural(len(plan.layers), 'MoE layer')}"))
    grid.add_row(Text("mesh", style="bold"), Text(f"{nodes} x {ranks} = {mesh.world_size} on {mesh.device}"))
    grid.add_row(Text("axes", style="bold"), Text(axes))
    return grid


def _layers_table(layers: Sequence[LayerPlan], path_width: int) -> Table:
    """One row per set of layers that differ in their place alone."""
    table = _table("site", "dense FFN", "experts", "router", "dispatch")
    for path, positions in fold_paths((layer.site.fqn or "the graph", _decisions(layer)) for layer in layers):
        layer = layers[positions[0]]
        table.add_row(_path_text(path, len(positions), path_width), *(Text("\n".join(lines)) for lines in _decisions(layer)))
    return table


def _decisions(layer: LayerPlan) -> tuple[tuple[str, ...], ...]:
    """Everything that is decided about a layer, as the lines of its cells."""
    site, experts, routing = layer.site, layer.experts, layer.routing
    ffn = (site.kind, f"{site.d_model} x {site.d_ff}", site.activation)
    shared = (f"+ shared {experts.d_shared}",) if experts.d_shared else ()
    placed = f"{layer.placement.experts_per_rank} per EP rank"
    router = [f"{routing.score} top-{routing.top_k}"]
    if routing.top_groups < routing.groups:
        router += [f"{routing.top_groups} of {routing.groups} groups", f"by {routing.group_score}"]
    if routing.normalize:
        router.append("normalized")
    if routing.scale != 1:
        router.append(f"scale {routing.scale:g}")
    if layer.balance.rule != "none":
        router += [f"balance: {layer.balance.rule}", f"rate {layer.balance.rate:g}"]
    routed = (f"{experts.num_routed} x {experts.d_expert}", *shared, placed, experts.init)
    return ffn, routed, tuple(router), (layer.dispatch.kind,)


def _reductions_table(plan: Plan) -> Table:
    table = _table("gradients of", "replicated over", "sharded over", "summed over")
    for r in plan.reductions:
        axes = (", ".join(found) or "-" for found in (r.replicated_over, r.sharded_over, r.sum_over))
        table.add_row(Text(r.parameters), *map(Text, axes))
    return table


def _print_estimate(estimate: Estimate, console: Console) -> None:
    memory = estimate.memory_bytes_per_rank
    table = _table("memory/rank", "weights", "grads", "optimizer", "activations", "dispatch", "fits")
    parts = (memory.total, memory.weights, memory.grads, memory.optimizer, memory.activations, memory.dispatch)
    fits = Text("yes", style="green") if estimate.fits else Text("no", style="bold red")
    table.add_row(*(Text(bytes_text(part), no_wrap=True) for part in parts), fits)
    console.print(table)
    console.print()
    grid = _grid()
    used = f"{count_text(estimate.params_total)}, a token uses {count_text(estimate.params_active)}"
    grid.add_row(Text("parameters", style="dim"), Text(used))
    grid.add_row(Text("forward bytes", style="dim"), Text(_traffic_text(estimate.bytes_per_token_per_layer)))
    console.print(grid)


def _traffic_text(traffic: Traffic) -> str:
    intra, inter = bytes_text(traffic.intra_node), bytes_text(traffic.inter_node)
    return f"{intra} intra-node, {inter} inter-node per token and layer"


def _nodes_text(record: PassRecord) -> str:
    if record.nodes_before in (0, record.nodes_after):
        return plural(record.nodes_after, "node")
    return f"{record.nodes_before} -> {record.nodes_after} nodes"


def _added_text(record: PassRecord) -> str:
    """Added ops, exchanges first, then the detail. Tuple unpacking says nothing and is left out."""
    names = sorted((n for n in record.added if n != "getitem"), key=lambda name: (name not in _EXCHANGE_OPS, name))
    added = ", ".join(f"+{record.added[name]} {name}" for name in names) if record.nodes_before else ""
    detail = f"({record.detail})" if added and record.detail else record.detail
    return " ".join(filter(None, (added, detail)))


def _result_lines(result: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """(name, text) of everything that the run measured."""

    def known(*names: str) -> bool:
        return all(result.get(name) is not None for name in names)

    if known("error"):
        yield "error", str(result["error"])
    if known("world_size", "num_rewritten"):
        yield "model", f"{plural(result['num_rewritten'], 'MoE layer')} on {plural(result['world_size'], 'rank')}"
    if known("step0_max_abs_diff"):
        yield "step 0", f"equals the dense model within {result['step0_max_abs_diff']:.1e}"
    elif known("step0_reason"):
        yield "step 0", f"need not equal the dense model: {result['step0_reason']}"
    if known("loss_first", "loss_last", "steps"):
        yield "loss", f"{result['loss_first']:.4f} -> {result['loss_last']:.4f} in {plural(result['steps'], 'step')}"
    if known("val_loss"):
        unigram = f", unigram entropy {result['unigram_entropy']:.4f}" if known("unigram_entropy") else ""
        yield "validation", f"{result['val_loss']:.4f} nats per token{unigram}"
    if known("max_violation_last"):
        yield "balance", f"MaxVio {result['max_violation_last']:.3f} (fullest expert over the mean load, minus 1)"
    if known("tokens_per_second"):
        yield "speed", f"{result['tokens_per_second']:,.0f} tokens/s"
    for name, key in (("forward bytes", "bytes_per_token_per_layer"), ("predicted", "bytes_per_token_per_layer_predicted")):
        if known(key):
            yield name, _traffic_text(Traffic(**result[key]))
    for name in ("checkpoint", "run_dir"):
        if known(name):
            yield name.replace("_", " "), str(result[name])


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, overflow="fold", no_wrap=i == 0)
    return table


def _grid() -> Table:
    return Table.grid(padding=(0, 2, 0, 0))


def _path_width(console: Console) -> int:
    return console.width // 3 - 1


def _path_text(path: str, count: int, width: int) -> Text:
    """A module path, broken at dots where it is long, and how many sites it stands for."""
    lines = [""]
    for part in re.split(r"(?<=[^.]\.)(?=[^.])", path):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("  ")
        lines[-1] += part
    text = Text("\n".join(lines))
    return text.append(f"\n{count} sites", style="dim") if count > 1 else text
