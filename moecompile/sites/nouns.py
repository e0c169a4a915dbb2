"""What is known of a captured model: its sites, the regions that hold them, and what was refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from moecompile.capture import shell_of
from moecompile.passes.existing import ExistingRegion
from moecompile.passes.linears import attribute
from moecompile.passes.match import FFNMatch
from moecompile.plan import PlannedSite

Graphs = dict[str, fx.GraphModule]


@dataclass(frozen=True, kw_only=True)
class Site:
    """A line of the list of sites. status: `rewritten`, `left` (not selected) or `not_matched`, with the reason."""

    fqn: str
    kind: str
    where: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class DenseRegion:
    """A traced region. matches: site -> FFN in its graph. module: the region in the model."""

    graph: fx.GraphModule
    matches: dict[str, FFNMatch]
    module: nn.Module

    def captured(self) -> fx.GraphModule:
        """The region as it is, to be shown: without its weights, which would outlive the rewrite."""
        root: dict[str, Any] = {}
        for node in self.graph.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                held = attribute(self.graph, str(node.target))
                root[str(node.target)] = held.detach().to("meta") if isinstance(held, Tensor) else shell_of(held)
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph.graph, {}))
        return fx.GraphModule(root, graph, class_name=type(self.graph).__name__)


Region = DenseRegion | ExistingRegion


@dataclass(kw_only=True)
class Captured:
    """regions: region path -> region, of the kind that is meant. region_of: site -> path of its region. sites: their
    nouns in model order. others: sites of the other kind, which are left. refused: what looks like a site and is none,
    with the reason.
    """

    regions: dict[str, Region] = field(default_factory=dict)
    region_of: dict[str, str] = field(default_factory=dict)
    sites: list[PlannedSite] = field(default_factory=list)
    others: list[Site] = field(default_factory=list)
    refused: list[Site] = field(default_factory=list)
