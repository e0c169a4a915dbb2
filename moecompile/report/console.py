"""What the command line prints: the plan, the passes, the sites and the closing summary. Needs no torch.

Cells hold deliberate line breaks, so that tables fit 80 columns also where the output is not a terminal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moecompile.plan import EXCHANGE_OPS, Assumptions, Estimate, FFNSite, LayerPlan, Plan, Remedy
from moecompile.report.text import NOT_COMPARED, bytes_text, count_text, fold_paths, plural, unsuffixed

if TYPE_CHECKING:
    from moecompile.passes.run import PassRecord

_STATUS_STYLE = {"ok": "green", "rewritten": "green", "failed": "bold red", "not_matched": "yellow"}


def print_plan(plan: Plan, console: Console, notes: Sequence[str] = ()) -> None:
    """The plan for review: mesh, layers, reductions and what the planner predicts.

    Args:
        notes: what a person should know beside it, one line each.
    """
    console.print(_header(plan))
    console.print()
    if plan.layers:
        console.print(_layers_table(plan.layers, path_width(console)))
        console.print()
        for kind, steps in dict.fromkeys((layer.dispatch.kind, layer.steps) for layer in plan.layers if layer.steps):
            console.print(Text(f"{kind}, forward: {', '.join(op for op, _ in steps)}"))
        console.print()
    console.print(_reductions_table(plan))
    if plan.estimate is not None:
        console.print()
        _print_estimate(plan.estimate, console)
    if notes:
        console.print()
    for note in notes:
        console.print(Text(f"note  {note}"))


def print_passes(records: Sequence[PassRecord], console: Console) -> None:
    """One numbered line a pass: `5  lower  0.02 s  12 -> 19 nodes  +3 all_to_all, ...`."""
    grid = plain_grid()
    for number, record in enumerate(records, start=1):
        grid.add_row(
            Text(str(number)),
            Text(record.name, style="bold"),
            Text(f"{record.seconds:.2f} s", style="dim", no_wrap=True),
            Text(_nodes_text(record), no_wrap=True),
            Text(_added_text(record)),
        )
    console.print()
    console.print(grid)


def print_sites(sites: Sequence[Mapping[str, str]], console: Console) -> None:
    """Every FFN that was found, and each near miss with its reason.

    Args:
        sites: {fqn, kind, where, status, reason}, the `sites` of result.json.
    """
    table = plain_table("site", "kind", "status", "reason")
    keys = [(s["fqn"] or s["where"], (s["kind"], s["status"], unsuffixed(s["reason"]))) for s in sites]
    for path, positions in fold_paths(keys):
        site = sites[positions[0]]
        table.add_row(
            path_text(path, len(positions), path_width(console)),
            Text(site["kind"]),
            Text(site["status"].replace("_", " "), style=_STATUS_STYLE.get(site["status"], "")),
            Text(site["reason"]),
        )
    console.print()
    console.print(table)


def print_result(result: Mapping[str, Any], console: Console) -> None:
    """The closing summary of a training run; what the run did not measure is left out.

    Args:
        result: the content of result.json.
    """
    recipe, status = str(result["recipe"]), str(result["status"])
    console.print()
    console.print(
        Text.assemble((recipe, "bold"), (f"  {status}", _STATUS_STYLE.get(status, "")), f"  {result['seconds']:.1f} s")
    )
    grid = plain_grid()
    for name, needed, text_of in _RESULT_LINES:
        values = [result.get(key) for key in needed]
        if None not in values:
            grid.add_row(Text(name, style="dim"), Text(text_of(*values), overflow="fold"))
    console.print(grid)


def print_checks(checks: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One row a check: what was compared, the error, the tolerance.

    Args:
        checks: {name, max_abs_err, tolerance, passed, where}, the `checks` of result.json.
    """
    table = plain_table("check", "error", "tolerance", "", "worst in")
    for check in checks:
        passed = check["passed"]
        table.add_row(
            Text(check["name"]),
            Text(f"{check['max_abs_err']:.1e}" if check["max_abs_err"] else "0"),
            Text(f"{check['tolerance']:.0e}" if check["tolerance"] else "0"),
            Text("ok" if passed else "FAILED", style=_STATUS_STYLE["ok" if passed else "failed"]),
            Text(check["where"], style="dim"),
        )
    console.print()
    console.print(table)


def _header(plan: Plan) -> Table:
    mesh, grid = plan.mesh, plain_grid()
    axes = ", ".join(f"{name} {getattr(mesh, name)}" for name in ("ep", "edp", "dp_replicate", "dp_shard"))
    nodes, ranks = plural(mesh.num_nodes, "node"), plural(mesh.ranks_per_node, "rank")
    grid.add_row(Text("plan", style="bold"), Text(f"{plan.hash}, {plural(len(plan.layers), 'MoE layer')}"))
    grid.add_row(Text("mesh", style="bold"), Text(f"{nodes} x {ranks} = {mesh.world_size} on {mesh.device}"))
    grid.add_row(Text("axes", style="bold"), Text(axes))
    return grid


def _layers_table(layers: Sequence[LayerPlan], path_width: int) -> Table:
    """One row per set of layers that differ in their place alone."""
    found = {"experts": "expert FFN"}.get(layers[0].site.kind, "dense FFN")
    mixed = len({layer.site.kind == "experts" for layer in layers}) > 1
    table = plain_table("site", "FFN" if mixed else found, "experts", "router", "dispatch")
    for path, positions in fold_paths((layer.site.fqn or "the graph", _decisions(layer)) for layer in layers):
        cells = (Text("\n".join(lines)) for lines in _decisions(layers[positions[0]]))
        table.add_row(path_text(path, len(positions), path_width), *cells)
    return table


def _decisions(layer: LayerPlan) -> tuple[tuple[str, ...], ...]:
    """Everything that is decided about a layer, as the lines of its cells."""
    site, experts = layer.site, layer.experts
    kind = site.kind if isinstance(site, FFNSite) else "gated" if site.num_in_projections == 2 else "up_down"
    ffn = (kind, f"{site.d_model} x {site.d_ff}", site.activation)
    shared = (f"+ shared {experts.d_shared}",) if experts.d_shared else ()
    placed = f"{layer.placement.experts_per_rank} per EP rank"
    init = f"drop {experts.drop_ratio:g}" if experts.init == "drop" else experts.init
    is_scaled = experts.init not in ("existing", "random") and experts.weight_scaling != "exact"
    scaled = (f"scaled: {experts.weight_scaling}",) if is_scaled else ()
    routed = (f"{experts.num_routed} x {experts.d_expert}", *shared, placed, init, *scaled)
    return ffn, routed, _router_lines(layer), (layer.dispatch.kind,)


def _router_lines(layer: LayerPlan) -> tuple[str, ...]:
    routing, balance, own = layer.routing, layer.balance, layer.routing.score == "own"
    limited = routing.top_groups < routing.groups
    lines = (
        (True, f"{routing.score} top-{routing.top_k}"),
        (routing.choice == "expert", "experts choose"),
        (routing.bias, "with bias"),
        (limited, f"{routing.top_groups} of {routing.groups} groups"),
        (limited and not own, f"by {routing.group_score}"),
        (routing.normalize, "normalized"),
        (routing.scale != 1, f"scale {routing.scale:g}"),
        (routing.capacity_factor is not None, f"capacity {routing.capacity_factor}"),
        (routing.drop != "none", f"by {routing.drop}"),
        (routing.jitter > 0, f"jitter {routing.jitter:g}"),
        (routing.workload != "none", f"workload: {routing.workload}"),
        (balance.rule != "none", f"balance: {balance.rule}"),
        (balance.rule != "none", f"rate {balance.rate:g}"),
    )
    losses = (line for name, value in balance.losses.items() for line in (f"{name} loss", f"  {value:g}"))
    return (*(line for holds, line in lines if holds), *losses)


def _reductions_table(plan: Plan) -> Table:
    table = plain_table("gradients of", "replicated over", "sharded over", "summed over")
    for r in plan.reductions:
        axes = (", ".join(found) or "-" for found in (r.replicated_over, r.sharded_over, r.sum_over))
        table.add_row(Text(r.parameters), *map(Text, axes))
    return table


def _print_estimate(estimate: Estimate, console: Console) -> None:
    memory, assumes = estimate.memory_bytes_per_rank, estimate.assumes
    table = plain_table("memory/rank", "weights", "grads", "optimizer", "activations", "dispatch", "fits")
    parts = (memory.weights, memory.grads, memory.optimizer, memory.activations, memory.dispatch)
    whole = bytes_text(memory.total) + (f"\nof {bytes_text(assumes.memory_bytes)}" if assumes else "")
    fits = Text("yes", style="green") if estimate.fits else Text("no", style="bold red")
    table.add_row(Text(whole, no_wrap=True), *(Text(bytes_text(part), no_wrap=True) for part in parts), fits)
    console.print(table)
    console.print()
    if estimate.remedies:
        console.print(_remedies_table(estimate.remedies))
        console.print()
    grid = plain_grid()
    used = f"{count_text(estimate.params_total)}, a token uses {count_text(estimate.params_active)}"
    grid.add_row(Text("parameters", style="dim"), Text(used))
    if assumes is not None:
        grid.add_row(Text("assumes", style="dim"), Text(_assumes_text(assumes, estimate.checkpointing)))
    grid.add_row(Text("forward bytes", style="dim"), Text(_traffic_text(asdict(estimate.bytes_per_token_per_layer))))
    if estimate.checkpointing != "none":
        grid.add_row(Text("recomputation", style="dim"), Text(_recomputation_text(estimate)))
    console.print(grid)


def _remedies_table(remedies: Sequence[Remedy]) -> Table:
    table = plain_table("memory/rank", "fits", "it does not fit; with this change")
    for remedy in remedies:
        fits = Text("yes", style="green") if remedy.fits else Text("no", style="bold red")
        table.add_row(Text(bytes_text(remedy.total)), fits, Text(remedy.change))
    return table


def _assumes_text(assumes: Assumptions, checkpointing: str) -> str:
    """`8,192 tokens a rank and micro-batch (2 sequences of 4,096), 4 of them a step, bf16_params, adamw, ...`"""
    sequences = plural(assumes.tokens_per_rank // assumes.seq_len, "sequence")
    steps = f"accumulated over {assumes.accumulation} micro-batches" if assumes.accumulation > 1 else "no accumulation"
    return (
        f"{assumes.tokens_per_rank:,} tokens a rank ({sequences} of {assumes.seq_len:,}), {steps}, "
        f"{assumes.precision}, {assumes.optimizer}, checkpointing {checkpointing}, "
        f"{assumes.hardware} with {bytes_text(assumes.memory_bytes)} a rank"
    )


def _recomputation_text(estimate: Estimate) -> str:
    again = asdict(estimate.resent_bytes_per_token_per_layer)
    sends = f"sends {_traffic_text(again)} again" if any(again.values()) else "sends nothing again"
    return f"{estimate.checkpointing}: backward {sends}"


def _traffic_text(bytes_by_link: Mapping[str, float]) -> str:
    """Bytes of `plan.Traffic` as a mapping, which is how result.json holds it."""
    intra, inter = (bytes_text(bytes_by_link[link]) for link in ("intra_node", "inter_node"))
    return f"{intra} intra-node, {inter} inter-node per token and layer"


def _nodes_text(record: PassRecord) -> str:
    if record.nodes_before in (0, record.nodes_after):
        return plural(record.nodes_after, "node")
    return f"{record.nodes_before} -> {record.nodes_after} nodes"


def _added_text(record: PassRecord) -> str:
    """Added ops, exchanges first, then the detail. Tuple unpacking says nothing and is left out."""
    names = sorted((n for n in record.added if n != "getitem"), key=lambda name: (name not in EXCHANGE_OPS, name))
    added = ", ".join(f"+{record.added[name]} {name}" for name in names) if record.nodes_before else ""
    detail = f"({record.detail})" if added and record.detail else record.detail
    return " ".join(filter(None, (added, detail)))


def plain_table(*columns: str) -> Table:
    """A table without a frame; its first column is not broken."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, overflow="fold", no_wrap=i == 0)
    return table


def plain_grid() -> Table:
    """Lines of names and values."""
    return Table.grid(padding=(0, 2, 0, 0))


def path_width(console: Console) -> int:
    """Characters of a line of a module path in a table."""
    return console.width // 3 - 1


def path_text(path: str, count: int, width: int) -> Text:
    """A module path, broken at dots where it is long, and how many sites it stands for."""
    lines = [""]
    for part in re.split(r"(?<=[^.]\.)(?=[^.])", path):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("  ")
        lines[-1] += part
    text = Text("\n".join(lines))
    return text.append(f"\n{count} sites", style="dim") if count > 1 else text


def _step0_reason(reason: str) -> str:
    return reason if reason.startswith(NOT_COMPARED) else f"need not equal the dense model: {reason}"


# Lines of `print_result`: (name, keys of result.json that it needs, their values -> text).
_RESULT_LINES: tuple[tuple[str, tuple[str, ...], Callable[..., str]], ...] = (
    ("model", ("num_rewritten", "world_size"), lambda n, world: f"{plural(n, 'MoE layer')} on {plural(world, 'rank')}"),
    ("step 0", ("step0_max_abs_diff",), lambda diff: f"equals the dense model within {diff:.1e}"),
    ("step 0", ("step0_reason",), _step0_reason),
    ("", ("step0_promised_max_abs_diff",), lambda diff: f"with the other layers alone it does, within {diff:.1e}"),
    ("loss", ("loss_first", "loss_last", "steps"), lambda a, b, n: f"{a:.4f} -> {b:.4f} in {plural(n, 'step')}"),
    ("validation", ("val_loss",), lambda loss: f"{loss:.4f} nats per token"),
    ("unigram entropy", ("unigram_entropy",), lambda nats: f"{nats:.4f} nats per token, what token counts alone reach"),
    ("balance", ("max_violation_last",), lambda v: f"MaxVio {v:.3f} (fullest expert over the mean load, minus 1)"),
    ("", ("max_violation_mean_last",), lambda v: f"MaxVio {v:.3f} mean over layers and the last tenth of steps"),
    ("drops", ("drop_rate_last",), lambda rate: f"{rate:.2%} of the assignments, beyond the experts' capacity"),
    ("speed", ("tokens_per_second",), lambda speed: f"{speed:,.0f} tokens/s"),
    ("forward bytes", ("bytes_per_token_per_layer",), _traffic_text),
    ("predicted", ("bytes_per_token_per_layer_predicted",), _traffic_text),
    ("checkpoint", ("checkpoint",), str),
    ("run dir", ("run_dir",), str),
)
