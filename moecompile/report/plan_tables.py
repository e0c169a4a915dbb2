"""Prints a plan: mesh, layers, reductions, estimate. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moecompile.mesh import MeshSpec, Part
from moecompile.plan import (
    EVEN,
    AdaptersPlan,
    Assumptions,
    Estimate,
    ExpertShards,
    FFNSite,
    LayerPlan,
    Lending,
    Plan,
    Remedy,
)
from moecompile.report.tables import path_text, path_width, plain_grid, plain_table
from moecompile.report.text import bytes_text, count_text, fold_paths, plural, traffic_text


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
    """The kind, what is in flight beside experts, and what is lent."""
    dispatch = layer.dispatch
    in_flight = {"none": (), "shared": ("overlap:", "shared"), "chunks": ("overlap:", f"{dispatch.chunks} chunks")}
    prices = [f"from {dispatch.loan_rows} rows"] * (layer.placement.ep > layer.placement.nodes)
    prices += [f"far {dispatch.far_loan_rows} rows"] * (layer.placement.nodes > 1)
    lent = (f"lends: {plural(dispatch.slots, 'slot')}", *prices) if dispatch.lends else ()
    return (dispatch.kind, *in_flight[dispatch.overlap], *lent)


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
        ranks = plan.mesh.size(Part.HEADS)
        numbers = (each.layers, each.query_heads // ranks, each.key_heads * each.key_copies // ranks, each.key_copies)
        table.add_row(Text(each.modules), *(Text(str(number)) for number in numbers))
    return table


def _print_memory(estimate: Estimate, console: Console) -> None:
    memory, assumes = estimate.memory_bytes_per_rank, estimate.assumes
    table = plain_table("memory/rank", "weights", "grads", "optimizer", "activations", "dispatch", "fits")
    parts = (memory.weights, memory.grads, memory.optimizer, memory.activations, memory.dispatch)
    whole = bytes_text(memory.total) + (f"\nof {bytes_text(assumes.memory_bytes)}" if assumes else "")
    fits = Text("yes", style="green") if estimate.fits else Text("no", style="bold red")
    table.add_row(Text(whole, no_wrap=True), *(Text(bytes_text(part), no_wrap=True) for part in parts), fits)
    console.print(table)
    if memory.apart:
        text = f"{bytes_text(memory.apart)} of gradients and activations are never there together"
        console.print(Text(text, style="dim"))
    if estimate.memory_bytes_uneven > memory.total:
        text = f"{bytes_text(estimate.memory_bytes_uneven)} on a rank that gets twice the mean rows"
        console.print(Text(text, style="dim"))
    console.print()


def _print_estimate(estimate: Estimate, plan: Plan, console: Console) -> None:
    assumes = estimate.assumes
    _print_memory(estimate, console)
    if estimate.remedies:
        console.print(_remedies_table(estimate.remedies))
        console.print()
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
    if any(asdict(estimate.optimizer_bytes_per_step).values()):
        text = traffic_text(asdict(estimate.optimizer_bytes_per_step), per="rank and step")
        grid.add_row(Text("optimizer bytes", style="dim"), Text(text))
    for name, text in _experts_texts(estimate):
        grid.add_row(Text(name, style="dim"), Text(text))
    grid.add_row(Text("padding", style="dim"), Text(_padding_text(plan.layers)))
    if estimate.checkpointing != "none":
        grid.add_row(Text("recomputation", style="dim"), Text(_recomputation_text(estimate)))
    console.print(grid)


def _remedies_table(remedies: Sequence[Remedy]) -> Table:
    table = plain_table("memory/rank", "fits", "it does not fit; with this change")
    for remedy in remedies:
        fits = Text("yes", style="green") if remedy.fits else Text("no", style="bold red")
        table.add_row(Text(bytes_text(remedy.total)), fits, Text(remedy.change))
    return table


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
        f"{stored} on each of {shards.ranks} ranks that share them{uneven}; a micro-batch gathers {gathered} twice, "
        f"a reduction sends {reduced}"
    )


def _lending_text(lending: Lending) -> str:
    expert, most, memory = map(bytes_text, (lending.expert_bytes, lending.bytes_received, lending.slot_bytes))
    return (
        f"an expert is {expert}; a rank borrows up to {most} per layer and micro-batch, and as much gradient returns; "
        f"slots need {memory}"
    )


def _padding_text(layers: Sequence[LayerPlan]) -> str:
    if all(layer.mask_padding for layer in layers):
        return "no token: not routed, not counted, in no loss"
    return "none is looked for (data.mask_padding): a padded token would be a token"


def _recomputation_text(estimate: Estimate) -> str:
    resent = asdict(estimate.resent_bytes_per_token_per_layer)
    sends = f"sends {traffic_text(resent)} again" if any(resent.values()) else "sends nothing again"
    return f"{estimate.checkpointing}: backward {sends}"
