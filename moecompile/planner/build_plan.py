"""build_plan: sites and config -> Plan. What is impossible raises an error that says what to change.

Algorithm:
  1. Validate the config and derive the mesh.
  2. Select the sites that match the config.
  3. Plan experts, routing, placement and dispatch of each, and the adapters.
  4. Derive the reductions, what tensor and context parallelism split (tensor_parallel.py, context_parallel.py) and
     the estimate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec, Part
from moecompile.plan import (
    BUDGET,
    KINDS,
    AdaptersPlan,
    DispatchPlan,
    ExpertAdapters,
    ExpertPlacement,
    ExpertsPlan,
    ExpertsSite,
    FFNSite,
    LayerPlan,
    Plan,
    PlannedSite,
    Recomputation,
    RoutingPlan,
    can_fuse,
    check_narrow,
    reductions,
)
from moecompile.planner import estimate
from moecompile.planner.budget import (
    Budget,
    Prices,
    Within,
    budget_of,
    costs_of,
    fastest,
    rank_prices,
    together_within,
    within,
)
from moecompile.planner.context_parallel import exchanged_attention
from moecompile.planner.cost_model.forecast import expected_load, step_of
from moecompile.planner.cost_model.inputs import Inputs, inputs_of, links_of, pass_bytes
from moecompile.planner.cost_model.seconds import LayerSeconds, choose_chunks, choose_overlap, row_seconds
from moecompile.planner.cost_model.shapes import ModelShape, with_recomputed
from moecompile.planner.existing import (
    check_given,
    existing_layer,
    only_existing,
    own_balance,
    selection,
    stack_of,
)
from moecompile.planner.lending import not_lent, plan_lending
from moecompile.planner.lookups import plan_lookups
from moecompile.planner.memory import buffer_bytes, model_state_bytes
from moecompile.planner.params import BF16_BYTES, Expected, ModelFacts, RunFacts
from moecompile.planner.pipeline import fullest, plan_pipeline, ranks_of
from moecompile.planner.placement import placed
from moecompile.planner.schedule import choose, sharded, ways
from moecompile.planner.tensor_parallel import split_modules
from moecompile.planner.traffic import (
    PACKING_BYTES,
    Wire,
    choose_dispatch,
    exchange_seconds,
    forward_traffic,
    rows_given,
)
from moecompile.ranges import Whole
from moecompile.routing import is_of_router
from moecompile.schema import (
    AdapterKind,
    Choice,
    Config,
    DataKind,
    DispatchKind,
    ExpertInit,
    LayerSettings,
    MaskPadding,
    OverlapKind,
    Precision,
    WireDtype,
    balance_spec,
    check_adapters,
    check_numbers,
    check_selections,
    layer_settings,
    mesh_spec,
    router_config,
    site_slice,
    validate_settings,
    validate_transform,
    virtual_group,
)

# -- the dispatch of a layer: its kind, the dtype of rows in an exchange, and the overlap ---------------------------


def plan_dispatch(
    config: Config, mesh: MeshSpec, site: PlannedSite, d_expert: int, d_shared: int, routing: RoutingPlan,
    placement: ExpertPlacement, number_bytes: int,
) -> DispatchPlan:  # fmt: skip
    """The dispatch of one layer.

    Args:
        site: with the width of a row as d_model.
        d_expert, d_shared: widths of a routed expert, and of the shared experts in the region.
        number_bytes: of a number of a row, and of a weight in compute.

    Raises:
        ConfigError: the kind, the overlap, the number of chunks or lending is not possible here.
    """
    wire, backend = _wire(config, mesh, site, number_bytes), config.dispatch.backend or ""
    kind = _dispatch_kind(config, mesh, routing, placement, wire)
    lending = plan_lending(config, mesh, site, d_expert, kind, routing, placement, number_bytes)
    if kind == "local":
        return lending  # nothing is sent
    if config.dispatch.wire_dtype is WireDtype.fp8_if_faster and not (backend or KINDS[kind].no_narrow):
        wire = _faster(config, mesh, wire, kind, routing, placement)
    check_narrow(kind, wire.wire_dtype, backend)
    overlap, chunks = _overlap(config, mesh, wire, site, (d_expert, d_shared), kind, routing, placement)
    return dataclasses.replace(
        lending, kind=kind, wire_dtype=wire.wire_dtype, overlap=overlap, chunks=chunks, backend=backend
    )


def _wire_dtype(config: Config) -> WireDtype:
    """Under autocast, experts cast their rows to bf16 and return bf16, so a cast before the exchange is exact."""
    if config.dispatch.wire_dtype not in (WireDtype.auto, WireDtype.fp8_if_faster):
        return config.dispatch.wire_dtype
    return WireDtype.bf16 if config.trainer.precision is Precision.bf16_mixed else WireDtype.auto


def _faster(
    config: Config, mesh: MeshSpec, wire: Wire, kind: str, routing: RoutingPlan, placement: ExpertPlacement
) -> Wire:
    """Rows in eight bits, if nodes are crossed, and packing them takes less time than it saves of the exchanges."""
    if mesh.nodes_per_ep_group == 1:
        return wire
    narrow, links = dataclasses.replace(wire, wire_dtype=WireDtype.fp8.value), links_of(config.hardware)
    before, after = (exchange_seconds(kind, placement, routing, mesh, each, links) for each in (wire, narrow))
    rows = wire.tokens_per_rank * sum(rows_given(kind, placement, routing, mesh).values())
    packing = rows * wire.d_model * PACKING_BYTES / pass_bytes(config.hardware)
    return narrow if after + packing < before else wire


def _dispatch_kind(config: Config, mesh: MeshSpec, routing: RoutingPlan, placement: ExpertPlacement, wire: Wire) -> str:
    """For every configured kind: with one EP rank nothing is sent (local), and on one node hierarchical is dedup."""
    kind = config.dispatch.kind
    if kind is DispatchKind.local and mesh.ep > 1:
        raise ConfigError(
            "dispatch.kind", "local", f"experts are spread over mesh.ep={mesh.ep} ranks", "Use auto, flat or dedup"
        )
    if mesh.ep == 1:
        return str(DispatchKind.local.value)
    if kind is DispatchKind.auto and config.dispatch.backend:
        return next(name for name, row in KINDS.items() if row.for_backends)
    if kind is not DispatchKind.auto:
        return (mesh.nodes_per_ep_group == 1 and KINDS[kind.value].on_one_node) or str(kind.value)
    return choose_dispatch(placement, routing, mesh, wire, links_of(config.hardware))


def _tokens(config: Config, mesh: MeshSpec) -> int:
    """Tokens of a micro-batch that a rank sends to experts."""
    return mesh.share(config.data.micro_batch_size * config.data.seq_len, Part.SEQUENCE, Part.TOKENS)


def _wire(config: Config, mesh: MeshSpec, site: PlannedSite, number_bytes: int) -> Wire:
    return Wire(
        d_model=site.d_model,
        tokens_per_rank=_tokens(config, mesh),
        element_bytes=number_bytes,
        wire_dtype=_wire_dtype(config).value,
    )


def _overlap(
    config: Config, mesh: MeshSpec, wire: Wire, site: PlannedSite, widths: tuple[int, int], kind: str,
    routing: RoutingPlan, placement: ExpertPlacement,
) -> tuple[str, int]:  # fmt: skip
    """The overlap and the number of chunks."""
    overlap, chunks = config.dispatch.overlap, config.dispatch.chunks
    tokens = _tokens(config, mesh)
    if overlap is not OverlapKind.chunks:
        if chunks != "auto":
            raise ConfigError(
                "dispatch.chunks", chunks, f"needs overlap=chunks, but dispatch.overlap={overlap.value}",
                "Use dispatch.overlap=chunks, or chunks=auto",
            )  # fmt: skip
        if overlap is not OverlapKind.auto:
            return overlap.value, 1
    elif chunks != "auto":
        _check_chunks(chunks, tokens, mesh)
        return "chunks", int(chunks)
    if overlap is OverlapKind.auto and (KINDS[kind].no_overlap or config.dispatch.backend):
        return "none", 1
    times = _seconds(config, mesh, wire, site, widths, kind, routing, placement)
    rows_per_expert = tokens * mesh.ep * routing.top_k / placement.num_experts
    if overlap is OverlapKind.chunks:
        return "chunks", choose_chunks(times, rows_per_expert)
    return choose_overlap(times, rows_per_expert)


def _check_chunks(chunks: int | str, tokens: int, mesh: MeshSpec) -> None:
    Whole(2).check("dispatch.chunks", chunks)
    cut = "".join(f" / mesh.{axis}" for axis in mesh.axes(Part.SEQUENCE, Part.TOKENS))
    if int(chunks) > tokens:
        raise ConfigError(
            "dispatch.chunks", chunks, f"a micro-batch has {tokens} tokens (data.micro_batch_size * data.seq_len{cut})",
            f"Use at most {tokens}",
        )  # fmt: skip


def _seconds(
    config: Config, mesh: MeshSpec, wire: Wire, site: PlannedSite, widths: tuple[int, int], kind: str,
    routing: RoutingPlan, placement: ExpertPlacement,
) -> LayerSeconds:  # fmt: skip
    """Times of one layer's forward on one rank, from the bandwidths and the speed of `hardware`."""
    tokens, (routed, shared) = _tokens(config, mesh), (row_seconds(config.hardware, site, width) for width in widths)
    traffic = forward_traffic(kind, placement, routing, mesh, wire)
    return LayerSeconds(
        wire=tokens * links_of(config.hardware).seconds(traffic.intra_node, traffic.inter_node),
        routed=tokens * routing.top_k * routed,
        shared=tokens * shared,
    )


# -- low-rank adapters: which linears and which weights of experts get them -----------------------------------------
#
# Algorithm:
#   1. Refuse what adapters do not support: dense FFNs that become experts, and experts that are modules.
#   2. Weights of experts whose path matches `adapters.experts`, which must be of a form that can have adapters. Such a
#      layer is not fused: that op has no adapters.
#   3. Linears whose path matches `adapters.dense`, but no routers, and none that do not run: a module that reads their
#      weight would not read an adapter.
#   4. A pattern that matches nothing is an error. So is a correction bias that follows the load of a frozen router.

Layers = tuple[LayerPlan, ...]


def plan_adapters(
    layers: Layers, mesh: MeshSpec, config: Config, facts: ModelFacts
) -> tuple[Layers, AdaptersPlan | None, ModelFacts]:
    """The layers with adapters of their experts, the adapters of the model, and facts that count the latter.

    Raises:
        ConfigError: the adapters do not fit the model.
    """
    check_adapters(config)
    chosen = config.adapters
    if chosen.kind is AdapterKind.none:
        return layers, None, facts
    for axis in mesh.axes(Part.WEIGHTS):
        rule, fix = f"adapters are not split over {axis}", f"Use mesh.{axis}=1, or adapters=none"
        raise ConfigError(f"mesh.{axis}", mesh.size(axis), rule, fix)
    _check_sites(layers)  # Step 1
    adapted = tuple(_with_adapters(layer, config, facts) for layer in layers)  # Step 2
    known = [f"{layer.site.fqn}.{name}" for layer in layers for name in _weights(layer)]
    if chosen.experts is not None and not any(layer.adapters for layer in adapted):
        raise _no_match("adapters.experts", chosen.experts, "weights of experts", known)
    run = {path: sizes for path, sizes in facts.linears.items() if path not in facts.idle}
    linears = {path: sizes for path, sizes in run.items() if not _is_router(path, sizes, layers, facts)}
    matched = [path for path in linears if chosen.dense is not None and fnmatchcase(path, chosen.dense)]  # Step 3
    if chosen.dense is not None and not matched:
        raise _no_match("adapters.dense", chosen.dense, "linears", list(linears))
    _check_balance(layers, config)  # Step 4
    plan = AdaptersPlan(
        rank=chosen.rank, alpha=float(chosen.alpha), dropout=float(chosen.dropout), linears=tuple(matched),
        train_router=chosen.train_router,
    )  # fmt: skip
    if chosen.dropout and plan.as_parameters:
        raise ConfigError(
            "adapters.dropout", chosen.dropout,
            f"is not possible in peft for linears with the names of experts ({plan.as_parameters[0]})",
            "Use 0, or leave them out of adapters.dense",
        )  # fmt: skip
    dense = sum(chosen.rank * sum(linears[path]) for path in matched)
    return adapted, plan, replace(facts, adapters=(dense, chosen.train_router))


def _check_sites(layers: Sequence[LayerPlan]) -> None:
    for site in (layer.site for layer in layers):
        if not isinstance(site, ExpertsSite):
            raise ConfigError(
                "adapters.kind", "lora", f"{site.fqn or 'the graph'} is a dense FFN that becomes experts, and adapters "
                "are for experts that the model has already", "Use adapters=none",
            )  # fmt: skip
        if site.form == "modules":
            raise ConfigError(
                "adapters.kind", "lora", f"{site.fqn} has one module per expert, and adapters are for stacked weights",
                "Use adapters=none, or leave this site out (experts.match)",
            )  # fmt: skip


def _weights(layer: LayerPlan) -> Iterator[str]:
    """Names of the matrices of a layer's experts."""
    assert isinstance(layer.site, ExpertsSite)
    yield "gate_up_proj" if layer.site.num_in_projections == 2 else "up_proj"
    yield "down_proj"


def _with_adapters(layer: LayerPlan, config: Config, facts: ModelFacts) -> LayerPlan:
    chosen = config.adapters
    pattern = chosen.experts
    names = [n for n in _weights(layer) if pattern is not None and fnmatchcase(f"{layer.site.fqn}.{n}", pattern)]
    if not names:
        return layer
    if reason := facts.no_adapters.get(layer.site.fqn):
        raise ConfigError(
            "adapters.experts", pattern, f"the experts of {layer.site.fqn} {reason}",
            "Use adapters.experts=null, or adapters=none",
        )  # fmt: skip
    adapters = ExpertAdapters(rank=chosen.rank, alpha=float(chosen.alpha), weights=tuple(names))
    dispatch = not_lent(layer.dispatch, config, "experts with adapters are not lent", "adapters.experts=null")
    return replace(layer, adapters=adapters, fused=False, dispatch=dispatch)


def _is_router(path: str, sizes: tuple[int, int], layers: Sequence[LayerPlan], facts: ModelFacts) -> bool:
    """Whether a linear is in the block of some experts and has one output per expert; of the router, if it is known."""
    return any(
        path.startswith(f"{layer.site.fqn.rpartition('.')[0]}.")
        and sizes[1] == layer.experts.num_routed + layer.experts.num_identity
        and is_of_router(path, facts.routers.get(layer.site.fqn, path))
        for layer in layers
    )  # fmt: skip


def _check_balance(layers: Sequence[LayerPlan], config: Config) -> None:
    for layer in layers:
        if layer.balance.has_bias and not config.adapters.train_router:
            raise ConfigError(
                "balance.rule", layer.balance.rule,
                f"moves the correction bias of the router of {layer.site.fqn}, which is frozen "
                "(adapters.train_router=false)", "Use balance.rule=none, or adapters.train_router=true",
            )  # fmt: skip


def _no_match(path: str, pattern: str, what: str, known: Sequence[str]) -> ConfigError:
    shown = f" ({', '.join(known[:3])}, ...)" if known else ""
    return ConfigError(path, pattern, f"matches none of the {len(known)} {what}{shown}", "Change the pattern, or null")


# -- the plan -------------------------------------------------------------------------------------------------------

GIB = 2**30
ShapeOf = Callable[[Plan], ModelShape]
_NUMBERS = {32: "fp32", 16: "bf16", 8: "fp8", 4: "fp4"}


def build_plan(sites: Sequence[PlannedSite], config: Config, facts: ModelFacts, shape: ShapeOf | None = None) -> Plan:
    """The plan for the sites that `config` selects; empty without sites.

    Args:
        sites: all matched sites, in model order.
        facts: sizes of the dense model, for the estimate.
        shape: a plan's shape for the time model, where the plan follows from seconds (checkpointing=budget).

    Raises:
        ConfigError: the config is invalid or does not fit a site.
    """
    plan, facts = draft_plan(sites, config, facts)
    return with_estimate(plan, config, facts, shape)


def with_estimate(plan: Plan, config: Config, facts: ModelFacts, shape: ShapeOf | None = None) -> Plan:
    """The plan with its estimate for the run that `config` describes, when weights are gathered and reduced, and with
    checkpointing=budget what is computed again; a plan that the config names has decided that.
    """
    run, memory_bytes = run_facts(config, plan.mesh, facts), config.hardware.memory_gib * GIB
    expected = expected_load(plan, config)

    ranks = ranks_of(plan, facts)

    def needed(each: RunFacts) -> int:
        return fullest(ranks, plan, replace(each, row_load=expected.load))[1].total

    first = ranks[0]
    of = sharded(first.layers, first.mesh, first.facts) if first.mesh.world_size > 1 else None
    tried = ways(of, run)
    costs: tuple[Recomputation, ...] = ()
    if run.checkpointing == BUDGET:
        run, costs = _within_budget(tried, plan, config, facts, shape, expected)
    else:
        run = choose(tried, needed, memory_bytes)
    made = estimate(plan, facts, run, ranks=ranks, memory_bytes=memory_bytes, expected=expected)
    return replace(
        plan,
        reduce=run.reduce,
        gather=run.gather,
        recomputed=run.recomputed,
        estimate=replace(made, recomputation=costs),
    )


def _within_budget(
    tried: Sequence[RunFacts], plan: Plan, config: Config, facts: ModelFacts, shape: ShapeOf | None, expected: Expected
) -> tuple[RunFacts, tuple[Recomputation, ...]]:  # fmt: skip
    """The fastest of the ways that fit, each with what it computes again, or the one that needs the least; and what is
    computed again, with its costs.
    """
    if shape is None:
        raise ConfigError(
            "trainer.checkpointing", BUDGET, "chooses for each layer of a model, and this is a graph", "Use auto"
        )
    given = None if config.plan is None else plan.recomputed
    plan = replace(plan, recomputed=())
    inputs, limit = inputs_of(shape(plan), plan, config), config.hardware.memory_gib * GIB

    def step(run: RunFacts) -> Inputs:
        layout = replace(inputs.layout, reduce=run.reduce, gather=run.gather)
        return replace(inputs, layout=layout, model=with_recomputed(inputs.model, run.recomputed, plan.pipeline))

    ranks = ranks_of(plan, facts)

    def budgets(run: RunFacts, prices: Prices) -> list[Budget]:
        own = (replace(of.run(run, plan.pipeline), row_load=expected.load) for of in ranks)
        return [
            budget_of(of.layers, of.mesh, of.facts, each, inputs.model, prices)
            for of, each in zip(ranks, own, strict=True)
        ]

    prices = rank_prices(step(tried[0]), len(ranks))  # of the other ways all are nearly as much dearer

    def fit(run: RunFacts) -> Within:
        places = list[Within]()
        for of, budget in zip(ranks, budgets(run, prices), strict=True):
            states = model_state_bytes(of.layers, of.mesh, of.facts, replace(run, layers_at_once=of.layers_at_once))
            loads = (expected.load, 1.0)
            buffers, even = (buffer_bytes(of.layers, of.mesh, replace(run, row_load=load)) for load in loads)
            places.append(within(budget, run, states, buffers, even, limit))
        return together_within(run, places, facts)

    if given is None:
        best = fastest(tried, fit, limit, lambda run: sum(step_of(step(run)).values())).run
    else:
        best = replace(tried[0], recomputed=given)
    bare = replace(best, recomputed=())
    return best, tuple(costs_of(budgets(bare, rank_prices(step(bare), len(ranks))), best.recomputed))


def draft_plan(sites: Sequence[PlannedSite], config: Config, facts: ModelFacts) -> tuple[Plan, ModelFacts]:
    """The plan without its estimate, and the facts with which it is estimated; arguments as for `build_plan`.

    Raises:
        ConfigError: the config is invalid or does not fit a site.
    """
    check_numbers(config)
    # Step 1: the config of experts and routers is not used if the model has both.
    mesh = mesh_spec(config.mesh) if only_existing(sites) else validate_transform(config)
    chosen = select(sites, config)  # Step 2
    check_given(chosen, config, facts.widened)
    check_selections(config, [site.fqn for site in chosen])
    masked = config.data.mask_padding
    has_padding = facts.has_padding_mask or config.data.kind is DataKind.sft  # rows of chats are filled up
    unmasked = facts.unmasked if masked is MaskPadding.auto else frozenset()
    mask_padding = has_padding if masked is MaskPadding.auto else masked is MaskPadding.always
    known: dict[Hashable, LayerPlan] = {}  # layers that differ in their name alone are planned once

    def planned(site: PlannedSite, position: int) -> LayerPlan:  # Step 3
        is_masked = mask_padding and site.fqn not in unmasked
        key = position if config.per_layer else (stack_of(site.fqn), is_masked, type(site), *_but_its_name(site))
        if key not in known:
            layer = _layer(site, layer_settings(config, site.fqn, position, len(chosen)), config, mesh, facts, chosen)
            known[key] = replace(layer, mask_padding=is_masked, cut_over=mesh.axes(Part.TOKENS))
        return known[key] if known[key].site is site else replace(known[key], site=site)

    layers = tuple(planned(site, position) for position, site in enumerate(chosen))
    lookups, facts = plan_lookups(mesh, facts, config)
    layers, adapters, facts = plan_adapters(placed(layers, config), mesh, config, facts)
    plan = Plan(  # Step 4
        mesh=mesh,
        layers=layers,
        pipeline=plan_pipeline(layers, mesh, facts, config),
        reductions=reductions(mesh, tables=bool(lookups)),
        adapters=adapters,
        tensor_parallel=split_modules([site.fqn for site in chosen], mesh, facts),
        context_parallel=exchanged_attention(layers, mesh, facts, config),
        lookups=lookups,
    )
    return plan, facts


def _but_its_name(site: PlannedSite) -> Iterator[Hashable]:
    return (value for name, value in vars(site).items() if name not in ("fqn", "index"))


def run_facts(config: Config, mesh: MeshSpec, facts: ModelFacts) -> RunFacts:
    """The training run that `config` describes, with `auto` where it leaves something to be chosen."""
    data, trainer = config.data, config.trainer
    stored = "" if facts.bytes_per_param == 4 else f" on weights of {facts.bytes_per_param} bytes"
    if config.stack.bits is not None:
        products = _NUMBERS.get(config.stack.bits, f"{config.stack.bits} bits")
        stored += f" with products in {products} (stack={config.stack.name})"
    return RunFacts(
        tokens_per_rank=mesh.share(data.micro_batch_size * data.seq_len, Part.SEQUENCE),
        micro_batch_size=data.micro_batch_size,
        precision=f"{trainer.precision.value}{stored}",
        hardware=config.hardware.name,
        compute_bytes=_compute_bytes(config, facts),
        accumulation=-(-data.global_batch_size // (data.micro_batch_size * mesh.num_batches)),
        checkpointing=trainer.checkpointing.value,
        reduce=trainer.reduce.value,
        gather=trainer.gather.value,
        is_mixed=trainer.precision is Precision.bf16_mixed,
        optimizer=config.optimizer,
    )


def _compute_bytes(config: Config, facts: ModelFacts) -> int:
    """`RunFacts.compute_bytes`."""
    return BF16_BYTES if config.trainer.precision is Precision.bf16_params else facts.bytes_per_param


def select(sites: Sequence[PlannedSite], config: Config) -> list[PlannedSite]:
    """The sites that `experts.match` and `experts.layers` select.

    Raises:
        ConfigError: there are sites, but the config selects none of them.
    """
    match, layers = selection(config) if only_existing(sites) else (config.experts.match, config.experts.layers)
    matched = [site for site in sites if fnmatchcase(site.fqn, match)]
    if sites and not matched:
        known = ", ".join(site.fqn or "the graph" for site in sites[:3])
        raise ConfigError(
            "experts.match",
            match,
            f"matches none of the {len(sites)} FFNs ({known}, ...)",
            "Change the pattern",
        )
    selected = matched[site_slice(layers)]
    if matched and not selected:
        raise ConfigError("experts.layers", layers, f"selects none of {len(matched)} FFNs", "Use ':' for all of them")
    return selected


def _layer(
    site: PlannedSite, settings: LayerSettings, config: Config, mesh: MeshSpec, facts: ModelFacts,
    sites: Sequence[PlannedSite],
) -> LayerPlan:  # fmt: skip
    if isinstance(site, ExpertsSite):
        own = own_balance(site, sites, config, facts.own_losses)
        dispatch = partial(
            plan_dispatch, config, mesh, site, site.d_ff, 0, number_bytes=_compute_bytes(config, facts)
        )  # fmt: skip
        return _by_backend(existing_layer(site, settings, mesh, config, dispatch, own), settings, config)
    return _by_backend(_made_layer(site, settings, config, mesh, facts), settings, config)


def _made_layer(site: FFNSite, settings: LayerSettings, config: Config, mesh: MeshSpec, facts: ModelFacts) -> LayerPlan:
    validate_settings(settings, mesh)
    experts, routing = settings.experts, settings.routing
    if experts.init is ExpertInit.widen:
        raise ConfigError(
            settings.path_of("experts.init"), "widen", f"copies the experts of a model, and {site.fqn} is a dense FFN",
            "Use experts.init=copy",
        )  # fmt: skip
    if site.d_ff % experts.granularity:
        raise ConfigError(
            settings.path_of("experts.granularity"), experts.granularity,
            f"must divide d_ff={site.d_ff} of {site.fqn}", f"Use a divisor of {site.d_ff}",
        )  # fmt: skip
    _check_future(settings, facts)
    d_expert = site.d_ff // experts.granularity
    slices = virtual_group(experts.init, experts.granularity, experts.num_shared)
    routing_plan = router_config(routing, experts.num_routed, mesh, slices)
    placement = ExpertPlacement(
        num_experts=experts.num_routed, ep=mesh.ep, nodes=mesh.nodes_per_ep_group, num_identity=experts.num_identity
    )
    d_shared = experts.num_shared * d_expert
    row_site, d_shared_rows = _rows(site, settings, d_shared)
    number_bytes = _compute_bytes(config, facts)
    dispatch = plan_dispatch(
        config, mesh, row_site, d_expert, d_shared_rows, routing_plan, placement, number_bytes
    )  # fmt: skip
    return LayerPlan(
        site=site,
        experts=ExpertsPlan(
            num_routed=experts.num_routed,
            granularity=experts.granularity,
            num_shared=experts.num_shared,
            d_expert=d_expert,
            d_shared=d_shared,
            init=ExpertInit(experts.init).value,
            shared_gate=experts.shared_gate and experts.num_shared > 0,
            shared_routed=experts.shared_routed,
            num_identity=experts.num_identity,
            latent_size=experts.latent_size,
            latent_norm=experts.latent_norm,
            drop_ratio=experts.drop_ratio if experts.init is ExpertInit.drop else 0.0,
            weight_scaling=experts.weight_scaling.value,
        ),
        routing=routing_plan,
        balance=balance_spec(settings.balance, routing_plan),
        placement=placement,
        dispatch=dispatch,
        fused=can_fuse(site, dispatch),
    )


def _rows(site: FFNSite, settings: LayerSettings, d_shared: int) -> tuple[FFNSite, int]:
    """The site with the width of a row as d_model, and a width of shared experts that would be as much work on rows.

    Raises:
        ConfigError: the latent width is wider than the model.
    """
    latent = settings.experts.latent_size
    if latent is None:
        return site, d_shared
    if latent > site.d_model:
        raise ConfigError(
            settings.path_of("experts.latent_size"), latent,
            f"must be at most d_model={site.d_model} of {site.fqn or 'the graph'}",
            f"Use {max(1, site.d_model // 2)}, or null",
        )  # fmt: skip
    return replace(site, d_model=latent), d_shared * site.d_model // latent


def _by_backend(layer: LayerPlan, settings: LayerSettings, config: Config) -> LayerPlan:
    """The layer, with its experts computed by `experts.backend`: not lent, and `overlap=auto` is none."""
    backend = settings.experts.backend
    if not backend:
        return layer
    if not layer.fused:
        raise ConfigError(
            settings.path_of("experts.backend"), backend, "computes SwiGLU experts without biases, from rows that were "
            f"sent once to a rank: not those of {layer.site.fqn or 'the graph'} with "
            f"dispatch.kind={layer.dispatch.kind}",
            "Use null, or another dispatch.kind than flat",
        )  # fmt: skip
    rule = f"experts.backend={backend} computes the experts of its own rank"
    dispatch = not_lent(layer.dispatch, config, rule, "experts.backend=null")
    if config.dispatch.overlap is OverlapKind.auto:
        dispatch = replace(dispatch, overlap="none", chunks=1)
    return replace(layer, experts=replace(layer.experts, backend=backend), dispatch=dispatch)


def _check_future(settings: LayerSettings, facts: ModelFacts) -> None:
    routing = settings.routing
    if routing.choice is Choice.expert and facts.causal and not routing.allow_future:
        raise ConfigError(
            settings.path_of("routing.choice"), "expert",
            "an expert takes its highest-scoring tokens, so the output of a token depends on later tokens, "
            "and this model is causal", "Use routing.choice=token, or routing.allow_future=true",
        )  # fmt: skip
