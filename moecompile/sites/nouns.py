"""What is known of a captured model: its sites, the regions that hold them, and what was refused."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from moecompile.passes.existing import ExistingRegion
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
    """A traced region with one FFN. match: the FFN in its graph."""

    graph: fx.GraphModule
    match: FFNMatch

    def captured(self) -> fx.GraphModule:
        """The region as it is."""
        return self.graph


Region = DenseRegion | ExistingRegion


@dataclass(kw_only=True)
class Captured:
    """regions: region path -> region, of the kind that is meant. sites: their nouns in model order. others: sites of
    the other kind, which are left. refused: what looks like a site and is none, with the reason.
    """

    regions: dict[str, Region] = field(default_factory=dict)
    sites: list[PlannedSite] = field(default_factory=list)
    others: list[Site] = field(default_factory=list)
    refused: list[Site] = field(default_factory=list)
