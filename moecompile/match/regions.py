"""What is known of a captured model: its sites, the regions that hold them, and what was refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from moecompile.capture import shell_of
from moecompile.match.experts import ExpertsMatch
from moecompile.match.linears import attribute
from moecompile.match.patterns import FFNMatch
from moecompile.plan import LayerPlan, PlannedSite

Match = FFNMatch | ExpertsMatch


@dataclass(frozen=True, kw_only=True)
class Site:
    """A line of the list of sites. status: `rewritten`, `left` (not selected) or `not_matched`, with the reason."""

    fqn: str
    kind: str
    where: str
    status: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A module of the model and the graph that is to take its place: what passes read and return.

    path: of the module in the model ("" for the model itself). graph: as captured, or as the last pass left it. module:
    what stands in the model before the first pass. matches: site -> what was found in the captured graph, in its order.
    """

    path: str
    graph: fx.GraphModule
    module: nn.Module
    matches: Mapping[str, Match]

    def with_graph(self, graph: fx.GraphModule) -> Region:
        """The same region, changed by a pass."""
        return replace(self, graph=graph)

    def ordered(self, layers: Iterable[LayerPlan]) -> list[LayerPlan]:
        """Layers of this region in the order of its graph."""
        by_site = {layer.site.fqn: layer for layer in layers}
        return [by_site[fqn] for fqn in self.matches if fqn in by_site]

    def shown(self) -> fx.GraphModule:
        """The graph for people: without weights, which would outlive the rewrite and sharding."""
        root: dict[str, Any] = {}
        for node in self.graph.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                held = attribute(self.graph, str(node.target))
                root[str(node.target)] = held.detach().to("meta") if isinstance(held, Tensor) else shell_of(held)
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph.graph, {}))
        return fx.GraphModule(root, graph, class_name=type(self.graph).__name__)


@dataclass(kw_only=True)
class Captured:
    """regions: path -> region, of the kind that is meant. region_of: site -> path of its region. sites: their nouns in
    model order. others: sites of the other kind, which are left. refused: what looks like a site and is none, with the
    reason.
    """

    regions: dict[str, Region] = field(default_factory=dict)
    region_of: dict[str, str] = field(default_factory=dict)
    sites: list[PlannedSite] = field(default_factory=list)
    others: list[Site] = field(default_factory=list)
    refused: list[Site] = field(default_factory=list)

    def planned(self, layers: Iterable[LayerPlan]) -> dict[str, list[LayerPlan]]:
        """Path of each region that has layers -> these, in the order of its graph."""
        by_region: dict[str, list[LayerPlan]] = {}
        for layer in layers:
            by_region.setdefault(self.region_of[layer.site.fqn], []).append(layer)
        return {path: self.regions[path].ordered(found) for path, found in by_region.items()}
