"""The list of passes, and what runs it: requires, run, ensures, record.

What the list says is the order; nothing else does. A new pass of ours is a line in it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx, nn

from moecompile.capture import attributes_of, stand_in
from moecompile.errors import PassError
from moecompile.match.experts import ExpertsMatch
from moecompile.match.regions import Region
from moecompile.passes.base import GraphPass, count_ops, registered
from moecompile.passes.fuse import Fuse
from moecompile.passes.lower import Lower
from moecompile.passes.overlap import Overlap
from moecompile.passes.rewrite import Rewrite
from moecompile.plan import LayerPlan
from moecompile.torch_private import set_attribute

Regions = Mapping[str, Region]
Layers = Mapping[str, Sequence[LayerPlan]]
Graphs = dict[str, fx.GraphModule]


def on_one_device(seed: int) -> tuple[GraphPass, ...]:
    """The passes up to a graph that one device runs, and that can be compared with the model as it was."""
    return (Rewrite(seed=seed), *registered("rewrite"))


def on_the_mesh() -> tuple[GraphPass, ...]:
    """The passes from there to the graph that every rank runs."""
    return (Lower(), *registered("lower"), Overlap(), Fuse())


@dataclass(frozen=True, kw_only=True)
class PassRecord:
    """What one pass did, for the console: "after lower: 12 -> 19 nodes, +3 all_to_all".

    nodes_before, nodes_after: graph nodes over all regions. added: op name -> how many nodes were added. detail: one
    line in words. seconds: wall time.
    """

    name: str
    nodes_before: int
    nodes_after: int
    added: dict[str, int] = field(default_factory=dict)
    detail: str = ""
    seconds: float = 0.0


class Log:
    """records: what each pass did, and how long it took. graphs: stage -> path of a region -> graph, to be shown."""

    def __init__(self) -> None:
        self.records: list[PassRecord] = []
        self.graphs: dict[str, Graphs] = {}
        self._last = time.perf_counter()

    def add(self, name: str, before: Regions, after: Regions, detail: str) -> None:
        """A record, with the time since the last one."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        was, now_there = (
            sum((count_ops(region.graph) for region in regions.values()), start=Counter[str]())
            for regions in (before, after)
        )
        self.records.append(
            PassRecord(
                name=name,
                nodes_before=sum(len(region.graph.graph.nodes) for region in before.values()),
                nodes_after=sum(len(region.graph.graph.nodes) for region in after.values()),
                added=dict(now_there - was),
                detail=detail,
                seconds=seconds,
            )
        )

    def keep(self, stage: str, regions: Regions) -> None:
        """What the graphs are at this stage."""
        self.graphs[stage] = {path: region.shown() for path, region in regions.items()}


def run_passes(
    steps: Sequence[GraphPass], regions: Regions, layers: Layers, log: Log | None = None
) -> dict[str, Region]:
    """Runs passes over regions in turn, each between its contracts.

    Args:
        layers: path of a region -> its layers, in the order of its graph.
        log: gets a record of each pass that changed a region.

    Raises:
        PassError: a pass found, or left, what its contract forbids.
    """
    done, stage = dict(regions), ""
    for step in steps:
        before, done = done, {path: _between_contracts(step, region, layers[path]) for path, region in done.items()}
        stage = getattr(step, "stage", stage)
        if log is not None and any(done[path] is not region for path, region in before.items()):
            log.keep(stage, done)
            log.add(step.name, before, done, getattr(step, "detail", ""))
    return done


def _between_contracts(step: GraphPass, region: Region, layers: Sequence[LayerPlan]) -> Region:
    step.requires(region, layers)
    after = step.run(region, layers)
    if not isinstance(after, Region):
        rule = f"run returned a {type(after).__name__}, a Region is meant: region.with_graph(graph_module)"
        raise PassError(step.name, region.path, rule)
    after.graph.graph.lint()
    step.ensures(region, after, layers)
    return after


def in_model(model: nn.Module, regions: Regions) -> dict[str, Region]:
    """The regions with the graphs that stand in `model`."""
    return {path: region.with_graph(_graph_at(model, path)) for path, region in regions.items()}


def _graph_at(model: nn.Module, path: str) -> fx.GraphModule:
    module = model.get_submodule(path)
    assert isinstance(module, fx.GraphModule)
    return module


def standing(model: nn.Module, before: Regions, after: Regions) -> Graphs:
    """What takes the place of each region's module: an instance of its class, with its attributes and its other parts.

    Of experts, which are taken in as a whole, it keeps plain attributes alone: code around may read their sizes.

    Args:
        before: the regions as they stand in `model`. after: as they are to stand there.
    """
    return {path: _standing(model.get_submodule(path), before[path], region.graph) for path, region in after.items()}


def _standing(module: nn.Module, before: Region, graph_module: fx.GraphModule) -> fx.GraphModule:
    if not any(isinstance(match, ExpertsMatch) for match in before.matches.values()):
        return stand_in(graph_module, module, attributes_of(before.graph))
    for name, value in vars(before.module).items():
        if not name.startswith("_") and name != "training" and not hasattr(graph_module, name):
            set_attribute(graph_module, name, value)
    return graph_module
