"""Prints a plan, its placement and its forecast, what differs between two plans, and what a search found.

Needs no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moecompile.mesh import MeshSpec, Part
from moecompile.plan import (
    EVEN,
    EXPERTS,
    FITS,
    IF_EVEN,
    LAYER,
    TOO_LARGE,
    AdaptersPlan,
    Assumptions,
    Estimate,
    ExpertShards,
    FFNSite,
    LayerPlan,
    Lending,
    Lookup,
    LookupTraffic,
    Plan,
    Recomputation,
    Remedy,
    WeightTraffic,
)
from moecompile.planner.cost_model.forecast import COMMUNICATION, Forecast
from moecompile.planner.cost_model.host import WAITING
from moecompile.planner.cost_model.inputs import REPEATED
from moecompile.planner.placement import PlacedLayer
from moecompile.planner.search.found import Candidate
from moecompile.planner.search.run import Found
from moecompile.report.console import path_text, path_width, plain_grid, plain_table
from moecompile.report.text import bytes_text, count_text, fold_paths, plural, seconds_text, traffic_text
from moecompile.schema import Config
from moecompile.stages import NONE, Pipeline

# -- a plan ------------------------------------------------------------------------------------------------------------


def print_plan(plan: Plan, console: Console, notes: Sequence[str] = ()) -> None:
    """Prints the plan for review: mesh, layers, reductions and the planner's estimate.

    Args:
        notes: further lines for the user.
    """
    console.print(_header(plan))
    console.print()
    if plan.layers:
        console.print(_layers_table(plan.layers, path_width(console)))
        console.print()
        for kind, steps in dict.fromkeys(
            (layer.dispatch.kind, layer.lent_steps) for layer in plan.layers if layer.steps
        ):
            console.print(Text(f"{kind}, forward: {', '.join(op for op, _ in steps)}"))
        console.print()
    console.print(_reductions_table(plan))
    if plan.tensor_parallel:
        console.print()
        console.print(_split_table(plan))
    if plan.context_parallel:
        console.print()
        console.print(_exchanged_table(plan))
    if plan.pipeline is not None:
        console.print()
        console.print(_stages_table(plan, plan.pipeline))
        console.print(Text(_pipeline_text(plan, plan.pipeline), style="dim"))
    if plan.estimate is not None:
        console.print()
        _print_estimate(plan.estimate, plan, console)
    if notes:
        console.print()
    for note in notes:
        console.print(Text(f"note  {note}"))


def _header(plan: Plan) -> Table:
    mesh, grid = plan.mesh, plain_grid()
    axes = ", ".join(
        f"{name} {getattr(mesh, name)}" for name in ("ep", "edp", "dp_replicate", "dp_shard", *mesh.sharing)
    )
    nodes, ranks = plural(mesh.num_nodes, "node"), plural(mesh.ranks_per_node, "rank")
    grid.add_row(Text("plan", style="bold"), Text(f"{plan.hash}, {plural(len(plan.layers), 'MoE layer')}"))
    grid.add_row(Text("mesh", style="bold"), Text(f"{nodes} x {ranks} = {mesh.world_size} on {mesh.device}"))
    grid.add_row(Text("axes", style="bold"), Text(axes))
    if plan.adapters is not None:
        grid.add_row(Text("adapters", style="bold"), Text(_adapters_text(plan, plan.adapters)))
    return grid


def _adapters_text(plan: Plan, adapters: AdaptersPlan) -> str:
    """`rank 16, alpha 32: 8 linears, 4 weights of experts; routers frozen`."""
    stacked = sum(len(layer.adapters.weights) for layer in plan.layers if layer.adapters is not None)
    dropout = f", dropout {adapters.dropout:g}" if adapters.dropout else ""
    where = f"{plural(len(adapters.linears), 'linear')}, {plural(stacked, 'stacked weight')} of experts"
    routers = "trained" if adapters.train_router else "frozen"
    return f"rank {adapters.rank}, alpha {adapters.alpha:g}{dropout}: {where}; routers {routers}"


def _layers_table(layers: Sequence[LayerPlan], path_width: int) -> Table:
    """One row per set of layers that differ only in their position."""
    heading = {"experts": "expert FFN"}.get(layers[0].site.kind, "dense FFN")
    mixed = len({layer.site.kind == "experts" for layer in layers}) > 1
    table = plain_table("site", "FFN" if mixed else heading, "experts", "router", "dispatch")
    for path, positions in fold_paths((layer.site.fqn or "the graph", _decisions(layer)) for layer in layers):
        cells = (Text("\n".join(lines)) for lines in _decisions(layers[positions[0]]))
        table.add_row(path_text(path, len(positions), path_width), *cells)
    return table


def _decisions(layer: LayerPlan) -> tuple[tuple[str, ...], ...]:
    """All decisions about a layer, as the lines of its cells."""
    site, experts = layer.site, layer.experts
    kind = site.kind if isinstance(site, FFNSite) else "gated" if site.num_in_projections == 2 else "up_down"
    ffn = (kind, f"{site.d_model} x {site.d_ff}", site.activation)
    shared = (f"+ shared {experts.d_shared}",) if experts.d_shared else ()
    identity = (f"+ {experts.num_identity} identity",) if experts.num_identity else ()
    latent = (f"latent {experts.latent_size}",) if experts.latent_size else ()
    placed = f"{layer.placement.experts_per_rank} per EP rank{', placed' * bool(layer.placement.order)}"
    init = f"drop {experts.drop_ratio:g}" if experts.init == "drop" else experts.init
    is_scaled = experts.init not in ("existing", "random") and experts.weight_scaling != "exact"
    scaled = (f"scaled: {experts.weight_scaling}",) if is_scaled else ()
    routed = (f"{experts.num_routed} x {experts.d_expert}", *identity, *shared, *latent, placed, init, *scaled)
    return ffn, routed, _router_lines(layer), _dispatch_lines(layer)


def _dispatch_lines(layer: LayerPlan) -> tuple[str, ...]:
    """The kind, rows in eight bits, what is in flight beside experts, and what is lent."""
    dispatch = layer.dispatch
    in_flight = {"none": (), "shared": ("overlap:", "shared"), "chunks": ("overlap:", f"{dispatch.chunks} chunks")}
    prices = [f"from {dispatch.loan_rows} rows"] * (layer.placement.ep > layer.placement.nodes)
    prices += [f"far {dispatch.far_loan_rows} rows"] * (layer.placement.nodes > 1)
    lent = (f"lends: {plural(dispatch.slots, 'slot')}", *prices) if dispatch.lends else ()
    narrow = (f"rows {dispatch.wire.narrow}",) if dispatch.wire.narrow else ()
    return (dispatch.kind, *narrow, *in_flight[dispatch.overlap], *lent)


def _router_lines(layer: LayerPlan) -> tuple[str, ...]:
    routing, balance, own = layer.routing, layer.balance, layer.routing.score == "own"
    limited = routing.top_groups < routing.groups
    lines = (
        (True, f"{routing.score} top-{routing.top_k}"),
        (routing.choice == "expert", "experts choose"),
        (routing.choice == "hash", "by a hash of the id"),
        (routing.norm, "normed input"),
        (routing.bias, "with bias"),
        (limited, f"{routing.top_groups} of {routing.groups} groups"),
        (limited and not own, f"by {routing.group_score}"),
        (routing.even_groups, f"{routing.top_k // routing.groups} of each of {routing.groups} groups"),
        (routing.normalize, "normalized"),
        (routing.scale != 1, f"scale {routing.scale:g}"),
        (routing.expert_scale, "scale per expert"),
        (routing.capacity_factor is not None, f"capacity {routing.capacity_factor}"),
        (routing.drop != "none", f"by {routing.drop}"),
        (routing.jitter > 0, f"jitter {routing.jitter:g}"),
        (routing.workload != "none", f"workload: {routing.workload}"),
        (balance.rule != "none", f"balance: {balance.rule}"),
        (balance.rate > 0, f"rate {balance.rate:g}"),
        (balance.recenter, "recentred"),
    )
    losses = (line for name, value in balance.losses.items() for line in (f"{name} loss", f"  {value:g}"))
    return (*(line for holds, line in lines if holds), *losses)


def _reductions_table(plan: Plan) -> Table:
    table = plain_table("gradients of", "replicated over", "sharded over", "summed over")
    for r in plan.reductions:
        axes = (", ".join(names) or "-" for names in (r.replicated_over, r.sharded_over, r.sum_over))
        table.add_row(Text(r.parameters), *map(Text, axes))
    return table


def _split_table(plan: Plan) -> Table:
    """The modules outside of MoE layers that are split, by style."""
    table = plain_table(f"split over {', '.join(plan.mesh.axes(Part.WEIGHTS))}", "modules")
    styles = dict.fromkeys(entry.style for entry in plan.tensor_parallel)
    for style in styles:
        modules = [entry.modules for entry in plan.tensor_parallel if entry.style == style]
        table.add_row(Text(style), Text("\n".join(modules)))
    return table


def _exchanged_table(plan: Plan) -> Table:
    """The attention that exchanges positions for heads."""
    over = f"attention over {', '.join(plan.mesh.axes(Part.SEQUENCE))}"
    table = plain_table(over, "layers", "heads of a rank", "key heads of a rank", "copies")
    for each in plan.context_parallel:
        ranks = plan.mesh.size(Part.SEQUENCE)
        numbers = (each.layers, each.query_heads // ranks, each.key_heads * each.key_copies // ranks, each.key_copies)
        table.add_row(Text(each.modules), *(Text(str(number)) for number in numbers))
    return table


def _stages_table(plan: Plan, pipeline: Pipeline) -> Table:
    """What each stage has and receives, and how many micro-batches it keeps for backward at most."""
    table = plain_table("stage", "ranks", "layers", "and", "receives a token", "kept")
    assumes = plan.estimate.assumes if plan.estimate else None
    for number, stage in enumerate(pipeline.stages):
        index, each = pipeline.rank_of(number), plan.mesh.ranks_per_stage
        ranks = f"{index * each} to {(index + 1) * each - 1}" if each > 1 else str(index)
        layers, others = stage.layers, [unit.path for unit in stage.units if not unit.is_layer]
        ends = list(dict.fromkeys(path.rpartition(".")[2] for path in (layers[0], layers[-1])))
        received = [
            f"{crossing.numbers:,g} of {'.'.join(crossing.unit.split('.')[-2:])}" for crossing in stage.receives
        ]
        place = pipeline.stages_of(index).index(number)
        kept = "" if assumes is None else str(pipeline.in_flight(index, assumes.accumulation)[place])
        of_layers = f"{len(layers)}: {' to '.join(ends)}"
        cells = (str(number), ranks, of_layers, "\n".join(others) or "-", "\n".join(received) or "-", kept or "?")
        table.add_row(*map(Text, cells))
    return table


def _pipeline_text(plan: Plan, pipeline: Pipeline) -> str:
    """The schedule, what it costs, and the stages in Megatron's words."""
    estimate, text = plan.estimate, pipeline.schedule + ", both of a pair at once" * (pipeline.overlap != NONE)
    if estimate is not None and estimate.assumes is not None:
        number = estimate.assumes.accumulation
        waits = pipeline.waits(number, 2 + bool(REPEATED[estimate.checkpointing]))
        sent, share = bytes_text(estimate.stage_bytes_per_step), waits / (number + waits)
        text += f": {number} micro-batches of a step through {len(pipeline.stages)} stages; a rank waits for "
        text += f"{share:.0%} of a step, and sends at most {sent} to other stages"
    return f"{text}; {pipeline.layout}"


def _print_memory(estimate: Estimate, console: Console) -> None:
    memory, assumes = estimate.memory_bytes_per_rank, estimate.assumes
    table = plain_table("memory/rank", "weights", "grads", "optimizer", "activations", "dispatch", "fits")
    parts = (memory.weights, memory.grads, memory.optimizer, memory.activations, memory.dispatch)
    whole = bytes_text(memory.total) + (f"\nof {bytes_text(assumes.memory_bytes)}" if assumes else "")
    fits = Text(estimate.fits, style=_STYLES[estimate.fits], no_wrap=True)
    table.add_row(Text(whole, no_wrap=True), *(Text(bytes_text(part), no_wrap=True) for part in parts), fits)
    console.print(table)
    if estimate.largest:
        size = bytes_text(getattr(memory, memory.largest))
        console.print(Text(f"{_PARTS.get(memory.largest, memory.largest)} {size}: {estimate.largest}", style="dim"))
    if memory.apart:
        why = "less at peak: gradients and activations never coexist"
        if memory.apart < 0:
            why = "more at peak: gradients of one layer beside sums of all, and weights of the next"
        console.print(Text(f"{bytes_text(abs(memory.apart))} {why}", style="dim"))
    if estimate.memory_bytes_uneven > memory.total:
        console.print(Text(f"{_uneven_text(estimate)} (expected: {estimate.expected_from})", style="dim"))
    console.print()


def _recomputation_table(rows: Sequence[Recomputation], layers: Sequence[LayerPlan]) -> Table:
    """What a budget chose: one row for layers that are alike."""
    table = plain_table("computed again", "exchanges", "layers", "each keeps", "if uneven", "a step")
    for each in rows:
        parts = "the whole layer" if each.parts == (LAYER,) else ", ".join(each.parts) or "nothing"
        inside = [layer for layer in layers if f"{layer.site.fqn}.".startswith(f"{each.site}.")]
        exchanged = {LAYER, EXPERTS} & {*each.parts} and any(layer.dispatch.exchanges for layer in inside)
        exchanges = ("sent again" if each.sends else "kept") if exchanged else "-"
        seconds = f"+ {seconds_text(each.seconds)}" if each.parts else "-"
        which = f"{each.layers} from {each.site.rpartition('.')[2]}"
        sizes = (bytes_text(each.kept), bytes_text(each.kept_uneven))
        table.add_row(*(Text(cell, no_wrap=True) for cell in (parts, exchanges, which, *sizes, seconds)))
    return table


def _print_estimate(estimate: Estimate, plan: Plan, console: Console) -> None:
    assumes = estimate.assumes
    _print_memory(estimate, console)
    if estimate.recomputation:
        console.print(_recomputation_table(estimate.recomputation, plan.layers))
        console.print()
    _print_remedies(estimate, console)
    grid = plain_grid()
    used = f"{count_text(estimate.params_total)}, a token uses {count_text(estimate.params_active)}"
    if estimate.params_trained != estimate.params_total:
        used += f", {count_text(estimate.params_trained)} are trained"
    if estimate.params_muon:
        used += f", {count_text(estimate.params_muon)} in matrices of Muon"
    grid.add_row(Text("parameters", style="dim"), Text(used))
    if assumes is not None:
        grid.add_row(Text("assumes", style="dim"), Text(_assumes_text(assumes, estimate.checkpointing, plan.mesh)))
    grid.add_row(Text("forward bytes", style="dim"), Text(traffic_text(asdict(estimate.bytes_per_token_per_layer))))
    for axis, sent in estimate.bytes_over.items():
        near, far = bytes_text(sent.intra_node), bytes_text(sent.inter_node)
        text = f"{near} intra-node, {far} inter-node per token over {axis}, all layers together"
        if sent.intra_node or sent.inter_node:
            grid.add_row(Text(f"{axis} bytes", style="dim"), Text(text))
    for name, text in _more_traffic(estimate, plan):
        grid.add_row(Text(name, style="dim"), Text(text))
    if estimate.weight_traffic is not None:
        grid.add_row(Text("weights", style="dim"), Text(_weights_text(plan, estimate.weight_traffic)))
    recomputed = [("recomputation", _recomputation_text(estimate))] * (estimate.checkpointing != "none")
    for name, text in (*_experts_texts(estimate), ("padding", _padding_text(plan.layers)), *recomputed):
        grid.add_row(Text(name, style="dim"), Text(text))
    console.print(grid)


def _more_traffic(estimate: Estimate, plan: Plan) -> Iterator[tuple[str, str]]:
    """What is sent beside the rows of experts: by Muon, and for rows of tables."""
    if any(asdict(estimate.optimizer_bytes_per_step).values()):
        yield "optimizer bytes", traffic_text(asdict(estimate.optimizer_bytes_per_step), per="rank and step")
    if estimate.lookup_bytes is not None:
        yield "tables", _tables_text(plan.lookups, estimate.lookup_bytes)


def _print_remedies(estimate: Estimate, console: Console) -> None:
    if estimate.remedies:
        console.print(_remedies_table(estimate.remedies))
    if estimate.tried:
        console.print(Text(estimate.tried, style="dim"))
        console.print()


def _remedies_table(remedies: Sequence[Remedy]) -> Table:
    table = plain_table("memory/rank", "expected", "step", "fits", "with this change")
    for remedy in remedies:
        cells = (bytes_text(remedy.total), bytes_text(remedy.uneven), seconds_text(remedy.seconds))
        fits = Text(remedy.fits, style=_STYLES[remedy.fits], no_wrap=True)
        table.add_row(*(Text(cell, no_wrap=True) for cell in cells), fits, Text(remedy.change))
    return table


_STYLES = {FITS: "green", IF_EVEN: "yellow", TOO_LARGE: "bold red"}
_PARTS = {"grads": "gradients", "dispatch": "exchange buffers"}
_VERDICTS = {FITS: "fits", IF_EVEN: "FITS ONLY IF THE LOAD IS EVEN", TOO_LARGE: "DOES NOT FIT"}


@dataclass(frozen=True, kw_only=True)
class Described:
    """Memory of a described layout: bytes with an even and with the expected load, and whether it fits."""

    memory_bytes: int
    memory_bytes_uneven: int
    fits: str


def _uneven_text(estimate: Estimate) -> str:
    return f"{bytes_text(estimate.memory_bytes_uneven)} on a rank with {estimate.expected_load:.2f} x the average load"


def verdict(estimate: Estimate, described: Described | None = None) -> str:
    """One line: whether it fits, into what, and what to add if not; of a described layout, if there is one."""
    fits, needed = estimate.fits, estimate.memory_bytes_per_rank.total
    if described is not None:
        fits, needed = described.fits, described.memory_bytes
    size, limit = bytes_text(needed), "" if estimate.assumes is None else bytes_text(estimate.assumes.memory_bytes)
    if size.split()[-1:] == limit.split()[-1:]:
        size = size.split()[0]  # `190 of 74.5 GiB`
    text = f"{_VERDICTS[fits]}: {size}{f' of {limit}' * bool(limit)}"
    if described is not None:
        uneven = bytes_text(described.memory_bytes_uneven)
        return f"{text} as described, {uneven} on a rank with {estimate.expected_load:.2f} x the average load"
    if estimate.memory_bytes_uneven > needed:
        text += f", {_uneven_text(estimate)}"
    if fits == FITS:
        return text
    if not estimate.remedies:
        return f"{text}; nothing that was tried fits"
    best = estimate.remedies[0]
    return f"{text}; add: {best.change}" + " (fits only if the load is even)" * (best.fits != FITS)


def _assumes_text(assumes: Assumptions, checkpointing: str, mesh: MeshSpec) -> str:
    """`8,192 tokens a rank and micro-batch (2 sequences of 4,096), 4 of them a step, bf16_params, adamw, ...`"""
    ranks = mesh.size(Part.SEQUENCE)
    sequences = f"{plural(assumes.tokens_per_rank * ranks // assumes.seq_len, 'sequence')} of {assumes.seq_len:,}"
    sequences += f" over {ranks} ranks" if ranks > 1 else ""
    steps = f"accumulated over {assumes.accumulation} micro-batches" if assumes.accumulation > 1 else "no accumulation"
    return (
        f"{assumes.tokens_per_rank:,} tokens a rank ({sequences}), {steps}, "
        f"{assumes.precision}, {assumes.optimizer}, checkpointing {checkpointing}, "
        f"{assumes.hardware} with {bytes_text(assumes.memory_bytes)} a rank"
    )


def _experts_texts(estimate: Estimate) -> Iterator[tuple[str, str]]:
    if estimate.expert_shards is not None:
        yield "experts", _shards_text(estimate.expert_shards)
    if estimate.lending is not None:
        yield "lending", _lending_text(estimate.lending)


def _shards_text(shards: ExpertShards) -> str:
    stored, gathered, reduced = map(bytes_text, (shards.stored, shards.gathered, shards.reduced))
    uneven = ""
    if shards.times_even > EVEN:
        uneven = (
            f", up to {shards.times_even:.2f} times an even share, as no dim of some is a multiple of {shards.ranks}"
        )
    return (
        f"{stored} on each of {shards.ranks} ranks that share them{uneven}; gathering them receives {gathered}, "
        f"reducing their gradients sends {reduced}"
    )


def _weights_text(plan: Plan, traffic: WeightTraffic) -> str:
    gathered, reduced = bytes_text(traffic.gathered), bytes_text(traffic.reduced)
    how = {"layer": "a layer at a time, twice in a micro-batch", "step": "once in a step, and kept"}[plan.gather]
    when = {"each": "after each micro-batch", "last": "once in a step"}[plan.reduce]
    text = f"gathered {how}: {gathered} a step; gradients reduced {when}: {reduced}"
    return text + f", and between replicas {bytes_text(traffic.replicas)}" * bool(traffic.replicas)


def _tables_text(lookups: Sequence[Lookup], cost: LookupTraffic) -> str:
    """What is spread, and what lookups send."""
    names = ", ".join(path for path, _ in fold_paths([(each.weight, None) for each in lookups]))
    rows, numbers = (count_text(sum(n)) for n in zip(*((each.rows, each.numbers) for each in lookups), strict=True))
    how = f", stepped by rows ({lookups[0].by_rows})" * bool(lookups[0].by_rows)
    sent = f"sends {bytes_text(cost.forward)} in forward and {bytes_text(cost.backward)} of gradients"
    return (
        f"{names}: {rows} rows with {numbers} numbers, {bytes_text(cost.stored)} on a rank{how}; in a micro-batch a "
        f"rank {sent}, if {cost.share:.1%} of the rows that tokens read are different"
    )


def _lending_text(lending: Lending) -> str:
    expert, most, memory = map(bytes_text, (lending.expert_bytes, lending.bytes_received, lending.slot_bytes))
    return (
        f"an expert is {expert}; a rank borrows up to {most} per layer and micro-batch, and as much gradient returns; "
        f"slots need {memory}"
    )


def _padding_text(layers: Sequence[LayerPlan]) -> str:
    others = sum(not layer.mask_padding for layer in layers)
    if others < len(layers):
        text = f"; {others} of {len(layers)} layers get other tokens than the mask has, and mask none"
        return "no token: not routed, not counted, in no loss" + text * (others > 0)
    return "not masked: padded tokens are routed like any other (set data.mask_padding)"


def _recomputation_text(estimate: Estimate) -> str:
    resent = asdict(estimate.resent_bytes_per_token_per_layer)
    sends = f"sends {traffic_text(resent)} again" if any(resent.values()) else "sends nothing again"
    return f"{estimate.checkpointing}: backward {sends}"


# -- its placement -----------------------------------------------------------------------------------------------------


def print_placement(layers: Sequence[PlacedLayer], console: Console) -> None:
    """One row per layer."""
    table = plain_table("site", "fullest rank / mean, by id", "placed")
    for layer in layers:
        values = (Text(f"{value:.3f}") for value in (layer.before, layer.after))
        table.add_row(path_text(layer.site, 1, path_width(console)), *values)
    console.print()
    console.print(table)


def placement_fields(layers: Sequence[PlacedLayer]) -> dict[str, Any]:
    """The field of result.json: rows of the fullest rank over the mean, before and after."""
    return {"placement": [{"site": each.site, "before": each.before, "after": each.after} for each in layers]}


# -- its forecast ------------------------------------------------------------------------------------------------------


_LEAST = 0.002  # parts below this share of a step are joined


def print_forecast(forecast: Forecast, console: Console, dense_flops: float | None = None) -> None:
    """Prints the time of a step, its parts, the price of imbalance, and the changes that would help most.

    Args:
        dense_flops: per token, of the dense model.
    """
    console.print()
    console.print(_forecast_head(forecast, dense_flops))
    console.print()
    console.print(_parts(forecast))
    if forecast.prices:
        console.print()
        console.print(_prices(forecast))
    if forecast.changes:
        console.print()
        console.print(_changes(forecast))


def _forecast_head(forecast: Forecast, dense_flops: float | None) -> Table:
    grid = plain_grid()
    count = forecast.micro_batches
    step = f"{seconds_text(forecast.seconds)}, {count} micro-batch{'es' * (count != 1)}"
    if WAITING in forecast.parts:
        step += f", {seconds_text(forecast.seconds - forecast.parts[WAITING])} of CPU time"
    speed = f"{forecast.tokens_per_second_per_rank:,.0f} tokens/s, {forecast.tflops_per_rank:,.3g} model TFLOP/s"
    grid.add_row(Text("predicted step", style="bold"), Text(step))
    grid.add_row(Text("per rank", style="bold"), Text(f"{speed}, {100 * forecast.mfu:.1f}% of the peak (MFU)"))
    flops = f"{forecast.flops_per_token:.3g} model FLOPs"
    if dense_flops is not None:
        flops += f", {forecast.flops_per_token / dense_flops:.2f} x the dense model's {dense_flops:.3g}"
    grid.add_row(Text("a token", style="bold"), Text(flops))
    return grid


def _parts(forecast: Forecast) -> Table:
    """The addends; a part's share is also the step's elasticity to it."""
    table = plain_table("part of the step", "time", "share = elasticity")
    rest = 0.0
    for name, seconds in sorted(forecast.parts.items(), key=lambda item: -item[1]):
        if seconds < _LEAST * forecast.seconds:
            rest += seconds
            continue
        shown = f"{name} (communication)" if name in COMMUNICATION else name
        table.add_row(Text(shown), Text(seconds_text(seconds)), Text(f"{100 * seconds / forecast.seconds:.1f}%"))
    if rest:
        table.add_row(Text("all others"), Text(seconds_text(rest)), Text(f"{100 * rest / forecast.seconds:.1f}%"))
    return table


def _prices(forecast: Forecast) -> Table:
    table = plain_table("load of the fullest rank", "median", "step", "99th percentile", "step")
    for price in forecast.prices:
        cells = (
            f"{price.p50_load:.2f} x mean", seconds_text(price.p50_seconds), f"{price.p99_load:.2f} x mean",
            seconds_text(price.p99_seconds),
        )  # fmt: skip
        table.add_row(Text(price.name), *map(Text, cells))
    return table


def _changes(forecast: Forecast) -> Table:
    table = plain_table("step", "saves", "fits", "with this change (stack.*: other software, not run)")
    for change in forecast.changes:
        saved = 100 * (1 - change.seconds / forecast.seconds)
        fits = change.fits or ("-" if change.change.startswith("stack.") else "?")
        table.add_row(Text(seconds_text(change.seconds)), Text(f"{saved:.1f}%"), Text(fits), Text(change.change))
    return table


# -- two plans ---------------------------------------------------------------------------------------------------------


Rows = dict[str, tuple[Any, Any]]
_LEFT_OUT = ("layers", "estimate", "reductions", "tensor_parallel")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A plan, its forecast and the config values that it was made with, flat."""

    plan: Plan
    forecast: Forecast
    config: Mapping[str, Any]


def differences(this: Compared, other: Compared) -> Rows:
    """Dotted name -> (this, other): decisions of the plans, and config values that a forecast reads.

    Layers are compared by their site; layers that differ in the same way are one entry, with their number.
    """
    rows = _differing(_flat(_without_layers(this.plan)), _flat(_without_layers(other.plan)))
    by_site = [{layer.site.fqn: dict(_flat(asdict(layer))) for layer in each.plan.layers} for each in (this, other)]
    counted: dict[tuple[str, str, str], int] = {}
    for fqn in dict.fromkeys([*by_site[0], *by_site[1]]):
        mine, theirs = (sites.get(fqn) for sites in by_site)
        if mine is None or theirs is None:
            rows[fqn] = ("planned" if mine else "not planned", "planned" if theirs else "not planned")
            continue
        for name, (a, b) in _differing(mine.items(), theirs.items()).items():
            counted[name, str(a), str(b)] = counted.get((name, str(a), str(b)), 0) + 1
    for (name, a, b), count in counted.items():
        key = f"{name} ({count} layers)" if count > 1 else name
        rows[key if key not in rows else f"{key}, {a} -> {b}"] = (a, b)
    return rows | {
        f"config {name}": pair for name, pair in _differing(this.config.items(), other.config.items()).items()
    }


def costs(this: Compared, other: Compared) -> Rows:
    """Name -> (this, other): predicted seconds of the step and of its parts, bytes on links, memory by kind."""
    rows: Rows = {"step, seconds": (this.forecast.seconds, other.forecast.seconds)}
    rows["tokens/s per rank"] = tuple(each.forecast.tokens_per_second_per_rank for each in (this, other))  # type: ignore[assignment]
    for name in dict.fromkeys([*this.forecast.parts, *other.forecast.parts]):
        rows[f"{name}, seconds"] = (this.forecast.parts.get(name, 0.0), other.forecast.parts.get(name, 0.0))
    if this.plan.estimate is not None and other.plan.estimate is not None:
        pair = [each.estimate for each in (this.plan, other.plan) if each.estimate is not None]
        memory = [{**asdict(each.memory_bytes_per_rank), "total": each.memory_bytes_per_rank.total} for each in pair]
        traffic = [asdict(each.bytes_per_token_per_layer) for each in pair]
        rows |= {f"memory {name}, bytes": (memory[0][name], memory[1][name]) for name in memory[0]}
        rows |= {f"{name} per token and layer, bytes": (traffic[0][name], traffic[1][name]) for name in traffic[0]}
    return rows


def print_comparison(this: Compared, other: Compared, console: Console) -> None:
    """Prints both tables; of the costs, those that differ."""
    console.print()
    found = differences(this, other)
    if not found:
        console.print(Text("compared: the same plan, with the same config"))
        return
    table = plain_table("differs", "this", "other")
    for name, (a, b) in found.items():
        table.add_row(Text(name), Text(str(a)), Text(str(b)))
    console.print(table)
    changed = {name: pair for name, pair in costs(this, other).items() if pair[0] != pair[1]}
    if changed:
        console.print()
        console.print(_costs(changed))


def _costs(rows: Rows) -> Table:
    table = plain_table("predicted", "this", "other", "this costs")
    for name, (a, b) in rows.items():
        what, _, unit = name.partition(", ")
        write = {"seconds": seconds_text, "bytes": bytes_text}.get(unit, "{:,.0f}".format)
        change = f"{100 * (a / b - 1):+.1f}%" if b else ""
        table.add_row(Text(what), Text(write(a)), Text(write(b)), Text(change))
    return table


def _without_layers(plan: Plan) -> dict[str, Any]:
    values = {name: value for name, value in asdict(plan).items() if name not in _LEFT_OUT}
    values["recomputed"] = "; ".join(
        f"{', '.join(each.parts)}{' and its exchanges' * each.sends} of {plural(len(each.layers), 'layer')}"
        for each in plan.recomputed
    )
    values["lookups"] = ", ".join(each.weight for each in plan.lookups)
    if plan.pipeline is not None:
        values["pipeline"] = {**values["pipeline"], "stages": plan.pipeline.layout}
    return values


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _differing(this: Any, other: Any) -> Rows:
    mine, theirs = dict(this), dict(other)
    names = dict.fromkeys([*mine, *theirs])
    return {name: (mine.get(name), theirs.get(name)) for name in names if mine.get(name) != theirs.get(name)}


# -- a search ----------------------------------------------------------------------------------------------------------


def print_search(found: Found, config: Config, console: Console) -> None:
    """Prints both fronts, the best layout as overrides, what was kept and why candidates were rejected."""
    console.print(_search_head(found, config))
    for title, front in (("runs", found.runs), ("described, not run", found.described)):
        if front:
            console.print()
            console.print(_front(title, front, config.search.show))
    console.print()
    if found.runs:
        best = found.runs[0]
        only = "" if best.fits == FITS else ", only if the load is even"
        console.print(Text(f"best layout that runs{only}; add this to your command:", style="bold"))
        console.print(Text(best.overrides), soft_wrap=True)
        if found.tight is not None:
            console.print(Text(_tight_text(found.tight), style="dim"), soft_wrap=True)
    elif found.least is not None:
        needed, settings = found.least
        shown = " ".join(f"{key}={value}" for key, value in settings.items())
        console.print(Text(f"no layout that runs fits into memory; the least is {bytes_text(needed)}, with {shown}"))
    if found.described:
        other, is_faster = found.described[0], not found.runs or found.described[0].seconds < found.runs[0].seconds
        console.print()
        speed = "faster" if is_faster else "slower"
        console.print(Text(f"best described layout, {speed}; task=plan shows it, it is not run as described:"))
        console.print(Text(other.overrides), soft_wrap=True)
    if found.rejected:
        console.print()
        console.print(_rejected(found))


def _tight_text(candidate: Candidate) -> str:
    even, expected = bytes_text(candidate.memory_bytes), bytes_text(candidate.memory_bytes_uneven)
    return (
        f"{seconds_text(candidate.seconds)} only if the load is even ({even}, with the expected one {expected}): "
        f"{candidate.overrides}"
    )


def _search_head(found: Found, config: Config) -> Table:
    grid, data = plain_grid(), config.data
    considered = f"{found.considered:,} candidates in {found.cpu_seconds:.1f} s, {found.fitting:,} fit"
    considered += f", {found.if_even:,} only if the load is even" * (found.if_even > 0)
    grid.add_row(Text("search", style="bold"), Text(considered))
    grid.add_row(Text("kept", style="bold"), Text(f"{data.global_batch_size:,} sequences of {data.seq_len:,} tokens"))
    for axis, reason in found.kept.items():
        grid.add_row(Text(""), Text(f"{axis}: {reason}"))
    return grid


def _front(title: str, front: Sequence[Candidate], rows: int) -> Table:
    only = "" if front[0].fits == FITS else ", only if the load is even"
    table = plain_table("step", "tokens/s", "memory", "expected", f"{title}: fastest for its memory{only}")
    for candidate in front[:rows]:
        table.add_row(
            Text(seconds_text(candidate.seconds)), Text(f"{candidate.tokens_per_second_per_rank:,.0f}"),
            Text(bytes_text(candidate.memory_bytes)), Text(bytes_text(candidate.memory_bytes_uneven)),
            Text(_short(candidate.settings)),
        )  # fmt: skip
    if len(front) > rows:
        table.add_row(Text("..."), Text(""), Text(""), Text(""), Text(f"{len(front) - rows} more in result.json"))
    return table


def _short(settings: Mapping[str, object]) -> str:
    """Settings by the last part of their keys, if one key alone has it; sizes of 1 are left out."""
    named = Counter(key.rpartition(".")[2] for key in settings)
    return " ".join(
        f"{key if named[key.rpartition('.')[2]] > 1 else key.rpartition('.')[2]}={value}"
        for key, value in settings.items()
        if value not in (1, "auto", None) or key in ("mesh.ep", "data.micro_batch_size", "workload.zero")
    )


def _rejected(found: Found) -> Table:
    table = plain_table("rejected", "because", "the first one")
    for reason in found.rejected:
        table.add_row(Text(f"{reason.count:,}"), Text(reason.rule), Text(reason.example))
    return table
