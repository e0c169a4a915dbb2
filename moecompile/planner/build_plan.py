"""build_plan: sites and config -> Plan. What is impossible raises an error that says what to change.

Algorithm:
  1. Validate the config and derive the mesh.
  2. Select the sites that match the config.
  3. Plan experts, routing, placement and dispatch of each, and the adapters.
  4. Derive the reductions, what tensor and context parallelism split (tensor_parallel.py, context_parallel.py) and
     the estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec, Part
from moecompile.plan import (
    ExpertPlacement,
    ExpertsPlan,
    ExpertsSite,
    FFNSite,
    LayerPlan,
    Plan,
    PlannedSite,
    can_fuse,
    reductions,
)
from moecompile.planner import ModelFacts, RunFacts, estimate
from moecompile.planner.adapters import plan_adapters
from moecompile.planner.context_parallel import exchanged_attention
from moecompile.planner.dispatch import plan_dispatch
from moecompile.planner.existing import check_given, existing_layer, only_existing, selection
from moecompile.planner.placement import placed
from moecompile.planner.tensor_parallel import split_modules
from moecompile.schema import (
    Choice,
    Config,
    DataKind,
    ExpertInit,
    LayerSettings,
    MaskPadding,
    Precision,
    balance_spec,
    check_numbers,
    check_selections,
    layer_settings,
    mesh_spec,
    router_config,
    site_slice,
    validate_settings,
    validate_transform,
)

GIB = 2**30


def build_plan(sites: Sequence[PlannedSite], config: Config, facts: ModelFacts) -> Plan:
    """The plan for the sites that `config` selects; empty without sites.

    Args:
        sites: all matched sites, in model order.
        facts: sizes of the dense model, for the estimate.

    Raises:
        ConfigError: the config is invalid or does not fit a site.
    """
    plan, facts = draft_plan(sites, config, facts)
    return with_estimate(plan, config, facts)


def with_estimate(plan: Plan, config: Config, facts: ModelFacts) -> Plan:
    """The plan with its estimate for the run that `config` describes."""
    run, memory_bytes = run_facts(config, plan.mesh, facts), config.hardware.memory_gib * GIB
    made = estimate(plan.layers, plan.mesh, facts, run, memory_bytes=memory_bytes, exchanged=plan.context_parallel)
    return replace(plan, estimate=made)


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
    mask_padding = has_padding if masked is MaskPadding.auto else masked is MaskPadding.always
    layers = tuple(  # Step 3
        replace(
            _layer(site, layer_settings(config, site.fqn, i, len(chosen)), config, mesh, facts),
            mask_padding=mask_padding,
            cut_over=mesh.axes(Part.TOKENS),
        )
        for i, site in enumerate(chosen)
    )
    layers, adapters, facts = plan_adapters(placed(layers, config), mesh, config, facts)
    plan = Plan(  # Step 4
        mesh=mesh,
        layers=layers,
        reductions=reductions(mesh),
        adapters=adapters,
        tensor_parallel=split_modules([site.fqn for site in chosen], mesh, facts),
        context_parallel=exchanged_attention(layers, mesh, facts, config),
    )
    return plan, facts


def run_facts(config: Config, mesh: MeshSpec, facts: ModelFacts) -> RunFacts:
    """The training run that `config` describes."""
    data, trainer = config.data, config.trainer
    stored = "" if facts.bytes_per_param == 4 else f" on weights of {facts.bytes_per_param} bytes"
    return RunFacts(
        tokens_per_rank=mesh.share(data.micro_batch_size * data.seq_len, Part.SEQUENCE),
        micro_batch_size=data.micro_batch_size,
        precision=f"{trainer.precision.value}{stored}",
        hardware=config.hardware.name,
        compute_bytes=2 if trainer.precision is Precision.bf16_params else facts.bytes_per_param,
        accumulation=max(1, data.global_batch_size // (data.micro_batch_size * mesh.num_batches)),
        checkpointing=trainer.checkpointing.value,
        is_mixed=trainer.precision is Precision.bf16_mixed,
        optimizer=config.optimizer,
    )


def select(sites: Sequence[PlannedSite], config: Config) -> list[PlannedSite]:
    """The sites that `experts.match` and `experts.layers` select.

    Raises:
        ConfigError: there are sites, but the config selects none of them.
    """
    match, layers = selection(config) if only_existing(sites) else (config.experts.match, config.experts.layers)
    matched = [site for site in sites if fnmatchcase(site.fqn, match)]
    if sites and not matched:
        known = ", ".join(site.fqn for site in sites[:3])
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


def _layer(site: PlannedSite, settings: LayerSettings, config: Config, mesh: MeshSpec, facts: ModelFacts) -> LayerPlan:
    return _by_backend(_own_layer(site, settings, config, mesh, facts), settings)


def _own_layer(
    site: PlannedSite, settings: LayerSettings, config: Config, mesh: MeshSpec, facts: ModelFacts
) -> LayerPlan:
    if isinstance(site, ExpertsSite):
        return existing_layer(site, settings, mesh, config, partial(plan_dispatch, config, mesh, site, site.d_ff, 0))
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
    routing_plan = router_config(routing, experts.num_routed, mesh)
    placement = ExpertPlacement(
        num_experts=experts.num_routed, ep=mesh.ep, nodes=mesh.nodes_per_ep_group, num_identity=experts.num_identity
    )
    d_shared = experts.num_shared * d_expert
    row_site, d_shared_rows = _rows(site, settings, d_shared)
    dispatch = plan_dispatch(config, mesh, row_site, d_expert, d_shared_rows, routing_plan, placement)
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


def _by_backend(layer: LayerPlan, settings: LayerSettings) -> LayerPlan:
    """The layer, with its experts computed by `experts.backend`."""
    backend = settings.experts.backend
    if not backend:
        return layer
    if not layer.fused:
        raise ConfigError(
            settings.path_of("experts.backend"), backend, "computes SwiGLU experts without biases, from rows that were "
            f"sent once to a rank: not those of {layer.site.fqn} with dispatch.kind={layer.dispatch.kind}",
            "Use null, or another dispatch.kind than flat",
        )  # fmt: skip
    return replace(layer, experts=replace(layer.experts, backend=backend))


def _check_future(settings: LayerSettings, facts: ModelFacts) -> None:
    routing = settings.routing
    if routing.choice is Choice.expert and facts.causal and not routing.allow_future:
        raise ConfigError(
            settings.path_of("routing.choice"), "expert",
            "an expert takes its highest-scoring tokens, so the output of a token depends on later tokens, "
            "and this model is causal", "Use routing.choice=token, or routing.allow_future=true",
        )  # fmt: skip
