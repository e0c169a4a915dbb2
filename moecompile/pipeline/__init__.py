"""The compilation pipeline, and the Python API built on it.

capture -> match -> build_plan -> the passes of moecompile.passes.run, in that order
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh

from moecompile import hub_kernels
from moecompile.arguments import check_device_mesh, check_example, check_graph, check_model, check_overrides, check_plan
from moecompile.capture import Example, is_meta, replace_regions
from moecompile.compose import compose_config
from moecompile.errors import ArgumentError, CaptureError, ConfigError, PlanError
from moecompile.match.regions import Captured, Region, Site
from moecompile.match.sites import graph_sites, list_sites
from moecompile.named_code import load_plugins
from moecompile.nn.scaled_input import standard_calls
from moecompile.passes.base import run_on_model
from moecompile.passes.cut import check_stages
from moecompile.passes.lookups import check_readers
from moecompile.passes.receipt import Comparison, Receipt
from moecompile.passes.run import (
    Graphs,
    Log,
    PassRecord,
    current_regions,
    on_every_rank,
    on_one_device,
    on_the_mesh,
    on_the_model,
    replacements,
    run_passes,
)
from moecompile.passes.same_weights import check_same_weights
from moecompile.passes.shard import check_sizes, device_mesh_of
from moecompile.passes.trained import frozen_notes, trained_notes
from moecompile.pipeline.captured import capture_planned, planning_facts, repeated_notes
from moecompile.pipeline.facts import facts_of
from moecompile.pipeline.shape import shape_of_model
from moecompile.plan import Plan, PlannedSite, check_sites
from moecompile.planner import ModelFacts
from moecompile.planner.build_plan import build_plan
from moecompile.planner.cost_model.shapes import ModelShape
from moecompile.planner.existing import notes
from moecompile.planner.given import left_notes
from moecompile.planner.lookups import table_notes
from moecompile.planner.search.chosen import choose_layout
from moecompile.planner.search.remedies import with_remedies
from moecompile.schema import Config
from moecompile.torch_private import set_attribute

_PLAN = "_moecompile_plan"


@dataclass(kw_only=True)
class Compilation:
    """The result of a compilation.

    graphs: stage -> region -> its graph, for display. step0: whether outputs on the example stay equal. regions: the
    captured regions of a model on the meta device, to fill in its values later. notes: for the user, about the plan
    (what was read from the model).
    """

    model: nn.Module
    plan: Plan
    sites: list[Site] = field(default_factory=list)
    records: list[PassRecord] = field(default_factory=list)
    graphs: dict[str, Graphs] = field(default_factory=dict)
    regions: dict[str, Region] = field(default_factory=dict)
    step0: Receipt = field(default_factory=Receipt)
    notes: list[str] = field(default_factory=list)


def compile_model(
    model: nn.Module,
    overrides: Sequence[str] | Config = (),
    *,
    example: Example,
    plan: Plan | None = None,
    device_mesh: DeviceMesh | None = None,
    until: str = "lower",
) -> nn.Module:
    """Turns the dense FFNs of `model` into experts, or parallelises its existing experts, in place.

    Args:
        model: any module; its FFNs are found by dataflow and its experts by their call; everything else is unchanged.
        overrides: Hydra override strings (`["experts.num_routed=8", "routing.top_k=2"]`), or a whole config.
        example: inputs of one forward: keyword tensors, a tuple, or a tensor.
        plan: use this plan instead of making one.
        device_mesh: for `until="shard"`; by default created from the plan.
        until: `rewrite` (one device), `lower` (exchanges on logical axes, and fused experts if the plan says so; the
            default) or `shard`.

    Returns:
        `model`; if the model itself is a region, its GraphModule instead.

    Raises:
        ConfigError: config and model do not fit.
        PlanError: plan and model do not fit.
        CaptureError: the model does not run on the example.
    """
    return compile_with_report(model, overrides, example=example, plan=plan, device_mesh=device_mesh, until=until).model


def make_plan(
    model_or_graph: nn.Module, overrides: Sequence[str] | Config = (), *, example: Example | None = None
) -> Plan:
    """Makes the plan only; nothing is changed.

    Args:
        model_or_graph: a GraphModule, or any module together with an `example`.
        overrides: as for `compile_model`.
        example: as for `compile_model`.
    """
    check_model(model_or_graph, "model_or_graph")
    _check_new(model_or_graph, "model_or_graph")
    config = _config(overrides)
    if isinstance(model_or_graph, fx.GraphModule) and example is None:
        return new_plan(model_or_graph, list(graph_sites(model_or_graph)), config, facts_of(model_or_graph))
    if example is None:
        raise CaptureError("make_plan needs example=... for a module that is not a GraphModule")
    check_example(example)
    sites, facts = planning_facts(model_or_graph, config, example)
    return new_plan(model_or_graph, sites, config, facts)


def transform(graph_module: fx.GraphModule, overrides_or_plan: Sequence[str] | Config | Plan = ()) -> fx.GraphModule:
    """Rewrites and lowers the dense FFNs of a graph. The input is not changed: the result has copies of its weights.

    Args:
        graph_module: for example `torch.fx.symbolic_trace(model)`.
        overrides_or_plan: Hydra override strings, a config, or a plan.

    Raises:
        PlanError: a planned site is not in the graph.
    """
    check_graph(graph_module)
    _check_new(graph_module, "graph_module")
    if not isinstance(overrides_or_plan, Plan):
        check_overrides(overrides_or_plan, "overrides_or_plan")
    source = copy.deepcopy(graph_module)
    matches = graph_sites(source)
    if isinstance(overrides_or_plan, Plan):
        plan, seed = overrides_or_plan, 0
        if plan.lookups:
            raise PlanError(
                "lookups", plan.lookups[0].weight, "rows of tables are spread in a model, not in a graph alone",
                "Plan with embeddings.shard=none, or use compile_model",
            )  # fmt: skip
    else:
        config = _config(overrides_or_plan)
        plan, seed = new_plan(source, list(matches), config, facts_of(source)), config.seed
    check_sites(plan.layers, matches)
    region = Region(path="", graph=source, module=source, matches={s.fqn: match for s, match in matches.items()})
    result = source
    if plan.layers:
        steps = (*on_one_device(seed), *on_the_mesh())
        result = run_passes(steps, {"": region}, {"": region.ordered(plan.layers)})[""].graph
    set_attribute(result, _PLAN, plan)
    return result


def plan_of(model: nn.Module) -> Plan:
    """The plan with which `model`, or a module inside it, was compiled.

    Raises:
        PlanError: no module in the model was compiled.
    """
    plan: Plan = getattr(compiled_module(model), _PLAN)
    return plan


def compiled_module(model: nn.Module) -> nn.Module:
    """The module inside `model` (or itself) that was compiled.

    Raises:
        PlanError: there is none, or more than one.
    """
    check_model(model)
    # Its own attribute: wrappers (of torch.compile, of PEFT) answer with those of what they hold.
    compiled = [module for module in model.modules() if isinstance(vars(module).get(_PLAN), Plan)]
    if len(compiled) != 1:
        raise PlanError(
            "model", type(model).__name__, f"holds {len(compiled)} compiled models, one is needed",
            "Call moecompile.compile_model on the one to be trained, and on no other",
        )  # fmt: skip
    return compiled[0]


def compile_with_report(
    model: nn.Module,
    overrides: Sequence[str] | Config = (),
    *,
    example: Example,
    plan: Plan | None = None,
    device_mesh: DeviceMesh | None = None,
    until: str = "lower",
) -> Compilation:
    """`compile_model` with a full report: sites, pass records, graphs before and after, step-0 difference."""
    _check(model, example, plan, device_mesh, until)
    hub_kernels.take_off(model)
    with standard_calls(model, example):
        return _compiled(model, overrides, example, plan, device_mesh, until)


def _compiled(
    model: nn.Module, overrides: Sequence[str] | Config, example: Example, plan: Plan | None,
    device_mesh: DeviceMesh | None, until: str,
) -> Compilation:  # fmt: skip
    config, log = _config(overrides), Log()
    captured = capture_planned(model, plan, config, example, log)
    facts = facts_of(model, example, captured, config.mesh)
    given, plan = plan, _planned(model, captured, overrides if plan else config, plan, facts)
    if plan.pipeline is not None and not is_meta(model):
        check_stages(model, plan.pipeline, example)
    if until == "shard" and plan.pipeline is not None:
        raise ConfigError("until", until, "a pipeline is run by ExpertParallelStrategy", "Use lower")
    if until == "shard":
        _check_ranks(plan, device_mesh)
    layers = captured.planned(plan.layers)
    regions = {path: captured.regions[path] for path in layers}
    log.add("build_plan", regions, regions, f"{len(plan.layers)} layers planned, hash {plan.hash}")
    log.keep("captured", regions)
    done = Compilation(model=model, plan=plan, records=log.records, graphs=log.graphs)
    why = "not selected by experts.match and experts.layers" if given is None else "not in the given plan"
    done.sites = list_sites(captured, {layer.site.fqn for layer in plan.layers}, why)
    done.notes = [] if given is None else left_notes(given, captured.sites)
    done.notes += [*notes(plan, config, facts.widened, facts.own_losses), *frozen_notes(model, plan)]
    done.notes += [*table_notes(facts, config), *repeated_notes(captured, plan)]
    done.regions = regions if is_meta(model) else {}  # otherwise they would keep the dense weights alive

    rewritten = run_passes(on_one_device(config.seed), regions, layers, log)
    comparison = Comparison(example, regions, layers)
    done.model, done.step0 = comparison.replace(model, replacements(model, regions, rewritten))
    done.notes += comparison.notes
    if until != "rewrite":
        rewritten = current_regions(done.model, rewritten)  # a region may lie inside another
        final = run_passes(on_the_mesh(), rewritten, layers, log)
        done.model = replace_regions(done.model, replacements(done.model, rewritten, final))
    readers = captured.readers if until != "rewrite" else {}
    run_on_model(on_the_model(config.seed, readers), done.model, plan)
    if plan.lookups and readers:
        _log_lookups(log, readers, done.model, plan)
    done.notes += trained_notes(done.model, plan)
    set_attribute(done.model, _PLAN, plan)
    if until == "shard":
        check_same_weights(done.model)
        device_type = next(done.model.parameters()).device.type
        run_on_model(on_every_rank(device_mesh or device_mesh_of(plan.mesh, device_type)), done.model, plan)
        log.add("shard", final, final, "axes bound, experts split")
    return done


def _check_ranks(plan: Plan, device_mesh: DeviceMesh | None) -> None:
    """Checks that the model can be sharded here, before it is changed."""
    if device_mesh is not None:
        check_sizes(device_mesh, plan.mesh)
    elif (started := dist.get_world_size()) != plan.mesh.world_size:
        raise PlanError(
            "mesh", f"{plan.mesh.num_nodes} x {plan.mesh.ranks_per_node}",
            f"the plan is for {plan.mesh.world_size} ranks, the process group has {started}",
            "Change mesh.num_nodes and mesh.ranks_per_node, or start as many ranks",
        )  # fmt: skip


def _log_lookups(log: Log, readers: Mapping[str, Region], model: nn.Module, plan: Plan) -> None:
    """Adds the graphs of lookups to those that are shown."""
    before = {each.module: readers[each.module] for each in plan.lookups}
    after, others = current_regions(model, before), next(reversed(log.graphs.values()))
    log.keep("spread", after)
    log.graphs["spread"] = {**others, **log.graphs["spread"]}
    log.add("spread_rows", before, after, "rows of embedding tables are read where they are")


def _check(model: nn.Module, example: Example, plan: Plan | None, device_mesh: DeviceMesh | None, until: str) -> None:
    check_model(model)
    check_example(example)
    if plan is not None:
        check_plan(plan)
    if until not in ("rewrite", "lower", "shard"):
        raise ConfigError("until", until, "must be rewrite, lower or shard", "Use one of these")
    _check_new(model, "model")
    if device_mesh is not None:
        check_device_mesh(device_mesh)
    if device_mesh is not None and until != "shard":
        raise ConfigError("device_mesh", device_mesh, f"is for until=shard, not {until}", "Leave it out, or use shard")
    if until == "shard" and device_mesh is None and not dist.is_initialized():
        raise ConfigError(
            "until", until, "sharding needs a process group", "Call torch.distributed.init_process_group, or use lower"
        )


def _check_new(model: nn.Module, name: str) -> None:
    """Refuses a model that is compiled already."""
    if any(hasattr(module, _PLAN) for module in model.modules()):
        raise PlanError(name, type(model).__name__, "is compiled already", "Give a freshly built model")


def _planned(
    model: nn.Module, captured: Captured, overrides: Sequence[str] | Config, plan: Plan | None, facts: ModelFacts
) -> Plan:
    """A new plan for the captured sites, or the given one, which must fit them.

    Overrides next to a given plan must agree with it, except for the seed, which is not part of a plan.
    """
    if plan is None:
        return new_plan(model, captured.sites, _config(overrides), facts)
    if not isinstance(overrides, Config):
        ignored = [item for item in overrides if not item.startswith("seed=")]
        if ignored and new_plan(model, captured.sites, _config(overrides), facts).hash != plan.hash:
            raise ArgumentError(
                "overrides", " ".join(ignored), f"would make another plan than the given one ({plan.hash}), which "
                "decides", "Leave them out, or make the plan with them: moecompile.make_plan(model, overrides, "
                "example=...)",
            )  # fmt: skip
    check_sites(plan.layers, captured.sites)
    check_readers(plan, captured.readers)  # before anything is changed
    return plan


def new_plan(model: nn.Module, sites: Sequence[PlannedSite], config: Config, facts: ModelFacts) -> Plan:
    """The plan for the sites of a model, with its layout if that is to be searched, and remedies if it does not fit."""

    def shape(plan: Plan) -> ModelShape:
        return shape_of_model(model, plan)

    choice = choose_layout(sites, facts, config, shape)
    config = config if choice is None else choice.config
    plan = build_plan(sites, config, facts, shape)
    return with_remedies(plan, sites, facts, config, shape, lambda changed: build_plan(sites, changed, facts, shape))


def _config(overrides: Sequence[str] | Config) -> Config:
    check_overrides(overrides)
    config = overrides if isinstance(overrides, Config) else _composed(list(overrides))
    load_plugins(config.plugins)
    return config


def _composed(overrides: list[str]) -> Config:
    config = compose_config(overrides)
    for key in ("plan", "compare"):  # tasks of the command line read them
        if (path := getattr(config, key)) is not None:
            fix = "Leave it out; moecompile.plan.load(path) reads one, for compile_model and transform"
            raise ConfigError(key, path, "is for the command line", fix)
    return config
