"""The sites of a captured model, the regions that hold them, and what was refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from moecompile.capture import shell_of
from moecompile.match.boundaries import Boundaries
from moecompile.match.experts import ExpertsMatch
from moecompile.match.ffn import FFNMatch
from moecompile.match.linears import attribute
from moecompile.plan import FFNSite, LayerPlan, PlannedSite

Match = FFNMatch | ExpertsMatch


@dataclass(frozen=True, kw_only=True)
class Site:
    """An entry of the list of sites. status: `rewritten`, `left` (not selected) or `not_matched`, with the reason."""

    fqn: str
    kind: str
    where: str
    status: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A module of the model and the graph that replaces it: what passes read and return.

    Attributes:
        path: of the module in the model ("" for the model itself).
        graph: as captured, or as the last pass returned it.
        module: the original module.
        matches: site -> its match in the captured graph, in graph order.
        runs: how often the module ran in the recorded forward.
    """

    path: str
    graph: fx.GraphModule
    module: nn.Module
    matches: Mapping[str, Match]
    runs: int = 1

    def with_graph(self, graph: fx.GraphModule) -> Region:
        """The same region, changed by a pass."""
        return replace(self, graph=graph)

    def ordered(self, layers: Iterable[LayerPlan]) -> list[LayerPlan]:
        """The layers of this region in graph order."""
        by_site = {layer.site.fqn: layer for layer in layers}
        return [by_site[fqn] for fqn in self.matches if fqn in by_site]

    def shown(self) -> fx.GraphModule:
        """A copy of the graph for display, without weights, which it would keep alive after rewrite and sharding."""
        root: dict[str, Any] = {}
        for node in self.graph.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                value = attribute(self.graph, str(node.target))
                root[str(node.target)] = value.detach().to("meta") if isinstance(value, Tensor) else shell_of(value)
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph.graph, {}))
        return fx.GraphModule(root, graph, class_name=type(self.graph).__name__)


@dataclass(frozen=True, kw_only=True)
class FoundLookup:
    """A table and the module that reads it. weight: its name in the model. ids: how many the example reads, in so many
    `reads`. is_used_whole: whether a product uses it too, under any name. refused: why its rows cannot be spread.
    """

    weight: str
    module: str
    rows: int
    width: int
    computed: bool
    ids: int
    reads: int = 1
    is_used_whole: bool = False
    refused: str = ""


@dataclass(kw_only=True)
class Captured:
    """regions: path -> region, of the selected kind. region_of: site -> path of its region. sites: in model order.
    others: sites of the other kind, which stay. refused: what looks like a site but cannot be rewritten, and why.
    boundaries: where the model may be cut, if that was asked for. tables: embedding tables that are large enough for
    their rows to be spread. readers: path of each module that reads some of these -> its region. idle: linears that do
    not run, in modules that do.
    """

    regions: dict[str, Region] = field(default_factory=dict)
    region_of: dict[str, str] = field(default_factory=dict)
    sites: list[PlannedSite] = field(default_factory=list)
    others: list[Site] = field(default_factory=list)
    refused: list[Site] = field(default_factory=list)
    boundaries: Boundaries | None = None
    tables: list[FoundLookup] = field(default_factory=list)
    readers: dict[str, Region] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()

    @property
    def summary(self) -> str:
        """`58 experts`, `3 dense FFNs`."""
        counts = Counter("dense FFNs" if isinstance(site, FFNSite) else "experts" for site in self.sites)
        return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "0 dense FFNs"

    def planned(self, layers: Iterable[LayerPlan]) -> dict[str, list[LayerPlan]]:
        """Path of each region with layers -> its layers in graph order."""
        by_region: dict[str, list[LayerPlan]] = {}
        for layer in layers:
            by_region.setdefault(self.region_of[layer.site.fqn], []).append(layer)
        return {path: self.regions[path].ordered(its_layers) for path, its_layers in by_region.items()}
