"""Puts planned layers into a model: the site of each is checked, its region rewritten, lowered and replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx, nn

from moecompile.capture import stand_in
from moecompile.errors import PlanError
from moecompile.passes.existing import (
    ExistingRegion,
    RewriteExisting,
    forget_weights,
    plain_attributes,
)
from moecompile.passes.fuse import Fuse
from moecompile.passes.lower import Lower
from moecompile.passes.match import FFNMatch
from moecompile.passes.registry import run_registered
from moecompile.passes.rewrite import Rewrite
from moecompile.plan import ExpertsSite, LayerPlan, PlannedSite
from moecompile.sites import DenseRegion, Region
from moecompile.torch_private import move_hooks, set_attribute


def planned_site(sites: Mapping[str, PlannedSite], layer: LayerPlan) -> PlannedSite:
    """The site that a layer was planned for; a planned site that cannot be applied is an error, never a warning."""
    site, found = layer.site, sites.get(layer.site.fqn)
    if found is None:
        what = "experts" if isinstance(site, ExpertsSite) else "FFN"
        raise PlanError(
            "plan.layers", site.fqn, f"the model has no {what} there", f"Plan again; it has {list(sites)[:3]}"
        )
    if _form(site) != _form(found):
        raise PlanError(
            f"plan.layers[{site.fqn or 'the graph'}]",
            _form(site),
            f"the model has {_form(found)} there",
            "Plan again for this model",
        )
    if site.swiglu and not found.swiglu:
        raise PlanError(
            f"plan.layers[{site.fqn or 'the graph'}].site.swiglu", True,
            f"the model computes {found.activation} there", "Plan again for this model",
        )  # fmt: skip
    return found


def _form(site: PlannedSite) -> str:
    """What a plan relies on: `gated 64x128`, `up_down 64x256 with bias_up, bias_down`, `8 experts 64x128 top-2`."""
    biases = [name for name in ("bias_up", "bias_down") if getattr(site, name)]
    kind, routing = site.kind, ""
    if isinstance(site, ExpertsSite):
        kind, routing = f"{site.num_experts} {site.form} {site.kind}", f" top-{site.top_k}"
        if site.groups > 1:
            routing += f" in {site.top_groups} of {site.groups} groups"
    return f"{kind} {site.d_model}x{site.d_ff}{routing}" + (f" with {', '.join(biases)}" if biases else "")


def rewritten_region(region: Region, layers: Sequence[LayerPlan], seed: int) -> fx.GraphModule:
    """The rewrite of dense FFNs or of existing experts, between its contracts.

    Args:
        layers: of the region, in the order of `ordered`.
    """
    if isinstance(region, DenseRegion):
        out = rewritten_graph(region.graph, [(region.matches[layer.site.fqn], layer) for layer in layers], seed)
        return stand_in(out, region.module, attributes_of(region.graph))
    step, (layer,) = RewriteExisting(), layers
    out = step.run(region, layer)
    step.ensures(out, layer.site.fqn)
    return _with_attributes(region, run_registered("rewrite", out, layers))


def lowered_region(region: Region, rewritten: fx.GraphModule, layers: Sequence[LayerPlan]) -> fx.GraphModule:
    """The lowered region; what stays of a rewritten one is to be shown and holds no weights of existing experts."""
    out = lowered_graph(rewritten, layers)
    if isinstance(region, DenseRegion):
        return stand_in(out, rewritten, attributes_of(rewritten))
    forget_weights(rewritten)
    return _with_attributes(region, out)


def ordered(region: Region, layers: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The layers of one region in the order of its graph."""
    if not isinstance(region, DenseRegion):
        return list(layers)
    position = {node: i for i, node in enumerate(region.graph.graph.nodes)}
    return sorted(layers, key=lambda layer: position[region.matches[layer.site.fqn].down.node])


def attributes_of(graph_module: fx.GraphModule) -> set[str]:
    """Paths of the modules and tensors that a graph uses."""
    return {str(node.target) for node in graph_module.graph.nodes if node.op in ("call_module", "get_attr")}


def _with_attributes(region: ExistingRegion, graph_module: fx.GraphModule) -> fx.GraphModule:
    """The plain attributes of the model's experts, which code around them may read, on what stands in their place."""
    for name, value in plain_attributes(region.module).items():
        if not hasattr(graph_module, name):
            set_attribute(graph_module, name, value)
    return graph_module


def rewritten_graph(
    graph_module: fx.GraphModule, sites: Sequence[tuple[FFNMatch, LayerPlan]], seed: int
) -> fx.GraphModule:
    """The rewrite pass between its contracts, and what users run after it."""
    step, layers = Rewrite(seed=seed), [layer for _, layer in sites]
    for match, layer in sites:
        _can_be_sliced(match, layer)
    step.requires(graph_module, layers)
    out = step.run(graph_module, sites)
    step.ensures(out, layers)
    return run_registered("rewrite", out, layers)


def _can_be_sliced(match: FFNMatch, layer: LayerPlan) -> None:
    if match.whole and layer.experts.granularity > 1:
        raise PlanError(
            "experts.granularity", layer.experts.granularity,
            f"must be 1 for {layer.site.fqn or 'the graph'}: what is between its linears ({match.activation}) needs all"
            " hidden units at once, and slices have only some",
            "Use experts.granularity=1 and experts.init=copy",
        )  # fmt: skip


def lowered_graph(graph_module: fx.GraphModule, layers: Sequence[LayerPlan]) -> fx.GraphModule:
    """The lower pass between its contracts, and what users run after it."""
    step = Lower()
    step.requires(graph_module, layers)
    out = step.run(graph_module, layers)
    step.ensures(out, layers)
    return run_registered("lower", out, layers)


def fused_region(region: Region, lowered: fx.GraphModule, layers: Sequence[LayerPlan]) -> fx.GraphModule:
    """The lowered region with its experts fused where the plan says so."""
    out = fused_graph(lowered, layers)
    if isinstance(region, DenseRegion):
        return stand_in(out, lowered, attributes_of(lowered))
    forget_weights(lowered)
    return _with_attributes(region, out)


def fused_graph(graph_module: fx.GraphModule, layers: Sequence[LayerPlan]) -> fx.GraphModule:
    """The fuse pass between its contracts."""
    step = Fuse()
    step.requires(graph_module, layers)
    out = step.run(graph_module, layers)
    step.ensures(graph_module, out, layers)
    return out


def replace_regions(model: nn.Module, regions: Mapping[str, nn.Module]) -> nn.Module:
    """Puts each region's new module in its place; the model itself is replaced where it is the region."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    for fqn, module in regions.items():
        region = model.get_submodule(fqn)
        move_hooks(region, module)
        for path in paths[id(region)]:
            if path == "":
                model = module
            else:
                model.set_submodule(path, module)
    return model
