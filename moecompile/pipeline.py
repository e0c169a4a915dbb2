"""The passes as one readable list, and the programmatic API built on it.

capture -> match -> build_plan -> rewrite -> lower -> fuse -> shard
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh

from moecompile.apply import (
    fused_graph,
    fused_region,
    lowered_graph,
    lowered_region,
    ordered,
    planned_site,
    replace_regions,
    rewritten_graph,
    rewritten_region,
)
from moecompile.arguments import check_example, check_graph, check_model, check_overrides, check_plan
from moecompile.capture import Example, is_meta
from moecompile.compose import compose_config
from moecompile.errors import ArgumentError, CaptureError, ConfigError, PlanError
from moecompile.passes.base import PassRecord, count_ops
from moecompile.passes.build_plan import build_plan
from moecompile.passes.plan_existing import notes
from moecompile.passes.registry import registered_passes
from moecompile.passes.same_weights import check_same_weights
from moecompile.passes.shard import device_mesh_of, layers_of, shard
from moecompile.passes.trained import frozen_notes
from moecompile.plan import ExpertsSite, FFNSite, LayerPlan, Plan, PlannedSite
from moecompile.planner import ModelFacts
from moecompile.receipt import Comparison, Receipt
from moecompile.schema import Config, SiteKind
from moecompile.sites import (
    Captured,
    Graphs,
    Region,
    Site,
    capture_regions,
    graph_sites,
    list_sites,
    record_model,
)
from moecompile.torch_private import set_attribute

_PLAN = "_moecompile_plan"


@dataclass(kw_only=True)
class Compiled:
    """What a compilation did. graphs: stage -> region -> GraphModule. step0: whether outputs on the example stay.

    regions: of a model on the meta device, what was captured, from which its values can be filled in later.
    notes: what a person should know of the plan (what was read from the model).
    """

    model: nn.Module
    plan: Plan
    sites: list[Site] = field(default_factory=list)
    records: list[PassRecord] = field(default_factory=list)
    graphs: dict[str, Graphs] = field(default_factory=dict)
    regions: dict[str, Region] = field(default_factory=dict)
    step0: Receipt = field(default_factory=Receipt)
    notes: list[str] = field(default_factory=list)

    @property
    def step0_max_abs_diff(self) -> float | None:
        """Largest difference of the outputs before and after, where equality is promised."""
        return self.step0.max_abs_diff

    @property
    def step0_reason(self) -> str | None:
        """Why it is not promised or not measured."""
        return self.step0.reason


def compile_model(
    model: nn.Module,
    overrides: Sequence[str] | Config = (),
    *,
    example: Example,
    plan: Plan | None = None,
    device_mesh: DeviceMesh | None = None,
    until: str = "lower",
) -> nn.Module:
    """Turns the dense FFNs of `model` into experts, or parallelises the experts that it has, in place.

    Args:
        model: any module; its FFNs are found by dataflow and its experts by their call, all else stays as it is.
        overrides: Hydra override strings (`["experts.num_routed=8", "routing.top_k=2"]`), or a whole config.
        example: what one forward takes: keyword tensors, a tuple, or a tensor.
        plan: use this plan instead of making one.
        device_mesh: for `until="shard"`; made from the plan if it is not given.
        until: `rewrite` (one device), `lower` (with exchanges on logical axes, the default) or `shard`.

    Returns:
        `model`; if the model itself is one site, its GraphModule instead.

    Raises:
        ConfigError, PlanError: something is impossible. CaptureError: the model does not run on the example.
    """
    return compile_with_report(model, overrides, example=example, plan=plan, device_mesh=device_mesh, until=until).model


def make_plan(
    model_or_graph: nn.Module, overrides: Sequence[str] | Config = (), *, example: Example | None = None
) -> Plan:
    """The plan alone; nothing is changed.

    Args:
        model_or_graph: a GraphModule, or any module together with an `example`.
        overrides, example: as for `compile_model`.
    """
    check_model(model_or_graph, "model_or_graph")
    config = _config(overrides)
    sites: Sequence[PlannedSite]
    if isinstance(model_or_graph, fx.GraphModule) and example is None:
        sites = list(graph_sites(model_or_graph))
    else:
        if example is None:
            raise CaptureError("make_plan needs example=... for a module that is not a GraphModule")
        check_example(example)
        captured = capture_regions(record_model(model_or_graph, example), config.experts.sites, _named(config))
        sites = captured.sites
    return build_plan(sites, config, _facts(model_or_graph))


def transform(graph_module: fx.GraphModule, overrides_or_plan: Sequence[str] | Config | Plan = ()) -> fx.GraphModule:
    """Rewrites and lowers the dense FFNs of a graph. The input is untouched: the result has copies of its weights.

    Args:
        graph_module: for example `torch.fx.symbolic_trace(model)`.
        overrides_or_plan: Hydra override strings, a config, or a plan.

    Raises:
        PlanError: a planned site is not in the graph.
    """
    check_graph(graph_module)
    if not isinstance(overrides_or_plan, Plan):
        check_overrides(overrides_or_plan, "overrides_or_plan")
    source = copy.deepcopy(graph_module)
    matches = graph_sites(source)
    if isinstance(overrides_or_plan, Plan):
        plan, seed = overrides_or_plan, 0
    else:
        config = _config(overrides_or_plan)
        plan, seed = build_plan(list(matches), config, _facts(source)), config.seed
    sites, by_fqn = {site.fqn: site for site in matches}, {site.fqn: match for site, match in matches.items()}
    pairs = [(by_fqn[planned_site(sites, layer).fqn], layer) for layer in plan.layers]
    order = {node: i for i, node in enumerate(source.graph.nodes)}
    pairs.sort(key=lambda pair: order[pair[0].down.node])  # a plan may list its layers in any order
    result: fx.GraphModule = source
    if pairs:
        layers = [layer for _, layer in pairs]
        result = fused_graph(lowered_graph(rewritten_graph(source, pairs, seed), layers), layers)
    set_attribute(result, _PLAN, plan)
    return result


def plan_of(model: nn.Module) -> Plan:
    """The plan that `model`, or a module inside it, was compiled by.

    Raises:
        PlanError: nothing in the model was compiled.
    """
    plan: Plan = getattr(compiled_module(model), _PLAN)
    return plan


def compiled_module(model: nn.Module) -> nn.Module:
    """The module inside `model` (or itself) that was compiled.

    Raises:
        PlanError: there is none, or more than one.
    """
    check_model(model)
    found = [module for module in model.modules() if isinstance(getattr(module, _PLAN, None), Plan)]
    if len(found) != 1:
        raise PlanError(
            "model", type(model).__name__, f"holds {len(found)} compiled models, one is needed",
            "Call moecompile.compile_model on the one to be trained",
        )  # fmt: skip
    return found[0]


def compile_with_report(
    model: nn.Module,
    overrides: Sequence[str] | Config = (),
    *,
    example: Example,
    plan: Plan | None = None,
    device_mesh: DeviceMesh | None = None,
    until: str = "lower",
) -> Compiled:
    """`compile_model`, with all that was done: sites, pass records, graphs before and after, step-0 difference."""
    check_model(model)
    check_example(example)
    if plan is not None:
        check_plan(plan)
    if until not in ("rewrite", "lower", "shard"):
        raise ConfigError("until", until, "must be rewrite, lower or shard", "Use one of these")
    if any(hasattr(module, _PLAN) for module in model.modules()):
        raise PlanError("model", type(model).__name__, "is compiled already", "Compile a freshly built model")
    if until == "shard" and device_mesh is None and not dist.is_initialized():
        raise ConfigError(
            "until", until, "sharding needs a process group", "Call torch.distributed.init_process_group, or use lower"
        )
    config, clock = _config(overrides), _Clock()
    recording = record_model(model, example)
    kind = config.experts.sites if plan is None else _kind(plan, config)
    captured = capture_regions(recording, kind, _named(config, plan))
    graphs = {fqn: region.captured() for fqn, region in captured.regions.items()}
    records = [clock.record("capture", {}, graphs, f"{len(recording.graph.nodes)} functions recorded")]
    records.append(clock.record("match", graphs, graphs, _found(captured)))
    if plan is None:
        plan = build_plan(captured.sites, config, _facts(model))
    elif not isinstance(overrides, Config):
        _check_agree(plan, overrides, captured, _facts(model))
    layers = {layer.site.fqn: layer for layer in plan.layers}
    sites = {site.fqn: site for site in captured.sites}
    regions, planned = _by_region(captured, sites, plan)
    before = {path: graphs[path] for path in regions}
    records.append(clock.record("build_plan", before, before, f"{len(layers)} layers planned, hash {plan.hash}"))
    compiled = Compiled(model=model, plan=plan, sites=list_sites(captured, layers), records=records)
    compiled.notes = [*notes(plan, config), *frozen_notes(model, plan)]
    compiled.regions = regions if is_meta(model) else {}  # else they would keep the dense weights
    compiled.graphs["captured"] = before

    comparison = Comparison(model, example, planned)
    rewritten = {path: rewritten_region(region, planned[path], config.seed) for path, region in regions.items()}
    compiled.model, compiled.step0 = comparison.replace(model, rewritten)
    model = compiled.model
    compiled.graphs["rewritten"] = rewritten
    records.append(clock.record("rewrite", before, rewritten, _with_registered("one device", "rewrite")))

    if until in ("lower", "shard"):
        lowered = {path: lowered_region(regions[path], rewritten[path], planned[path]) for path in regions}
        compiled.graphs["lowered"] = lowered
        records.append(
            clock.record("lower", rewritten, lowered, _with_registered("exchanges on logical axes", "lower"))
        )
        fused = {path: fused_region(regions[path], graph, planned[path]) for path, graph in lowered.items()}
        compiled.model = model = replace_regions(model, fused)
        compiled.graphs["fused"] = fused
        records.append(clock.record("fuse", lowered, fused, "one op for gather, experts and sum"))
    set_attribute(model, _PLAN, plan)
    if until == "shard":
        check_same_weights(model)
        shard(model, plan, device_mesh or device_mesh_of(plan.mesh, _device_type(model)))
        records.append(clock.record("shard", fused, fused, "axes bound, experts split"))
    return compiled


def capture_planned(model: nn.Module, plan: Plan, config: Config, example: Example) -> Captured:
    """The regions of `model`, not compiled yet, that the layers of `plan` are made from."""
    return capture_regions(record_model(model, example), _kind(plan, config), _named(config, plan))


def _check_agree(plan: Plan, overrides: Sequence[str], captured: Captured, facts: ModelFacts) -> None:
    """A given plan decides; overrides beside it may say the same again. The seed is not in a plan."""
    voided = [item for item in overrides if not item.startswith("seed=")]
    if voided and build_plan(captured.sites, _config(overrides), facts).hash != plan.hash:
        raise ArgumentError(
            "overrides", " ".join(voided), f"would make another plan than the given one ({plan.hash}), which decides",
            "Leave them out, or make the plan with them: moecompile.make_plan(model, overrides, example=...)",
        )  # fmt: skip


def _by_region(
    captured: Captured, sites: Mapping[str, PlannedSite], plan: Plan
) -> tuple[dict[str, Region], dict[str, list[LayerPlan]]]:
    """The regions of a plan's layers, and the layers of each in the order of its graph."""
    planned: dict[str, list[LayerPlan]] = {}
    for layer in plan.layers:
        planned.setdefault(captured.region_of[planned_site(sites, layer).fqn], []).append(layer)
    regions = {path: captured.regions[path] for path in planned}
    return regions, {path: ordered(regions[path], layers) for path, layers in planned.items()}


def _with_registered(detail: str, after: str) -> str:
    """`one device, then count_tokens`"""
    return ", then ".join([detail, *(graph_pass.name for graph_pass in registered_passes(after))])


def _found(captured: Captured) -> str:
    """`58 experts`, `3 dense FFNs`."""
    counts = Counter("dense FFNs" if isinstance(site, FFNSite) else "experts" for site in captured.sites)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "0 dense FFNs"


def _named(config: Config, plan: Plan | None = None) -> Callable[[str], bool]:
    """Whether an FFN in an MoE block is asked for: by the plan, or by a pattern that does not just take everything."""
    if plan is not None:
        planned = {layer.site.fqn for layer in plan.layers}
        return planned.__contains__
    pattern = config.experts.match
    return lambda fqn: pattern != "*" and fnmatchcase(fqn, pattern)


def _kind(plan: Plan, config: Config) -> SiteKind:
    """Which kind of site a given plan needs."""
    existing = {isinstance(layer.site, ExpertsSite) for layer in plan.layers}
    if len(existing) != 1:
        return SiteKind.both if existing else config.experts.sites
    return SiteKind.existing if existing.pop() else SiteKind.dense


def _facts(model: nn.Module) -> ModelFacts:
    """Sizes of the dense model; what a bare module does not say about itself is left at 0."""
    layers = list(layers_of(model))
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    outside = sum(parameter.numel() for parameter in model.parameters() if parameter not in inside)
    return ModelFacts(
        params_total=sum(parameter.numel() for parameter in model.parameters()),
        params_embedding=outside if layers else 0,
        num_layers=len(layers),
        vocab_size=int(getattr(getattr(model, "config", None), "vocab_size", 0) or 0),
        bytes_per_param=next((parameter.element_size() for parameter in model.parameters()), 4),
        causal=True if hasattr(model, "generate") else None,  # as language models of transformers do
    )


def _config(overrides: Sequence[str] | Config) -> Config:
    check_overrides(overrides)
    return overrides if isinstance(overrides, Config) else compose_config(list(overrides))


def _device_type(model: nn.Module) -> str:
    return next(model.parameters()).device.type


class _Clock:
    """Makes pass records with the time since the last one."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def record(self, name: str, before: Graphs, after: Graphs, detail: str) -> PassRecord:
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        counts = [sum((count_ops(g) for g in graphs.values()), start=Counter()) for graphs in (before, after)]
        return PassRecord(
            name=name,
            nodes_before=sum(len(g.graph.nodes) for g in before.values()),
            nodes_after=sum(len(g.graph.nodes) for g in after.values()),
            added=dict(counts[1] - counts[0]),
            detail=detail,
            seconds=seconds,
        )
