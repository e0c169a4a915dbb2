"""The list of passes and its runner: requires, run, ensures, record.

The four functions of the list define the order, of passes over graphs and then of passes over the whole model. A new
built-in pass is one more line in one of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh

from moecompile.capture import attributes_of, stand_in
from moecompile.errors import PassError
from moecompile.match.experts import ExpertsMatch
from moecompile.match.regions import Region
from moecompile.nn.existing import keep_biases_wide
from moecompile.nn.own_router import watch_routers
from moecompile.nn.watch import watch_padding
from moecompile.passes.adapters import AttachAdapters
from moecompile.passes.base import GraphPass, ModelPass, count_ops, registered
from moecompile.passes.delay_gradients import DelayWeightGradients
from moecompile.passes.fuse import Fuse
from moecompile.passes.lend import Lend
from moecompile.passes.lookups import SpreadRows
from moecompile.passes.lower import Lower
from moecompile.passes.overlap import Overlap
from moecompile.passes.place import Place
from moecompile.passes.recompute import Recompute
from moecompile.passes.rewrite import Rewrite
from moecompile.passes.shard import ShardModel
from moecompile.passes.split_tokens import SplitTokens
from moecompile.passes.types import check_types
from moecompile.plan import LayerPlan, Plan
from moecompile.torch_private import compile_whole, set_attribute

Regions = Mapping[str, Region]
Layers = Mapping[str, Sequence[LayerPlan]]
Graphs = dict[str, fx.GraphModule]


# -- the list ---------------------------------------------------------------------------------------------------------


def on_one_device(seed: int) -> tuple[GraphPass, ...]:
    """The passes up to a single-device graph, which is then compared with the original model (receipt.py)."""
    return (Rewrite(seed=seed), *registered("rewrite"))


def on_the_mesh() -> tuple[GraphPass, ...]:
    """The passes from the single-device graph to the graph that every rank runs."""
    return (
        SplitTokens(), Place(), Lower(), Lend(), *registered("lower"), Overlap(), DelayWeightGradients(), Fuse()
    )  # fmt: skip


def on_the_model(seed: int, readers: Regions) -> tuple[ModelPass, ...]:
    """The passes that complete a compiled model, with whole weights.

    Args:
        readers: path of each module that reads embedding tables by rows -> its region; empty: they stay as they are.
    """
    return (SpreadRows(readers=readers), AttachAdapters(seed=seed), Watch())


def on_every_rank(
    device_mesh: DeviceMesh, param_dtype: torch.dtype | None = None, *, checkpointing: str = "none",
    compile_regions: bool = False,
) -> tuple[ModelPass, ...]:  # fmt: skip
    """The passes to the model that a rank trains.

    Args:
        device_mesh, param_dtype: as for `moecompile.passes.shard.shard`.
        checkpointing: none, full, keep_exchanges or budget. compile_regions: whether torch.compile compiles our graphs.
    """
    return (
        ShardModel(device_mesh=device_mesh, param_dtype=param_dtype),
        *((CompileRegions(),) if compile_regions else ()),
        Recompute(checkpointing=checkpointing),
    )


@dataclass(frozen=True, kw_only=True)
class Watch(ModelPass):
    """Hooks that hand padding masks and token ids to MoE layers, and the logits of the model's own routers over; biases
    of these routers that follow the load are kept in fp32.
    """

    name: str = "watch"

    def run(self, model: nn.Module, plan: Plan) -> None:
        """Changes the model in place."""
        watch_padding(model)
        watch_routers(model)
        keep_biases_wide(model)


@dataclass(frozen=True, kw_only=True)
class CompileRegions(ModelPass):
    """torch.compile on every graph of ours, each as one whole graph; lookups in tables have nothing to fuse."""

    name: str = "compile"

    def run(self, model: nn.Module, plan: Plan) -> None:
        """Changes the model in place."""
        for region in [module for module in model.modules() if isinstance(module, fx.GraphModule)]:
            if "read_rows" not in count_ops(region):
                compile_whole(region)


# -- the runner -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PassRecord:
    """What one pass did, for the console: "after lower: 12 -> 19 nodes, +3 all_to_all".

    nodes_before, nodes_after: graph nodes over all regions. added: op name -> number of nodes added. detail: a one-line
    description. seconds: wall time.
    """

    name: str
    nodes_before: int
    nodes_after: int
    added: dict[str, int] = field(default_factory=dict)
    detail: str = ""
    seconds: float = 0.0


class Log:
    """records: what each pass did and how long it took. graphs: stage -> region path -> graph, for display."""

    def __init__(self) -> None:
        self.records: list[PassRecord] = []
        self.graphs: dict[str, Graphs] = {}
        self._last = time.perf_counter()

    def add(self, name: str, before: Regions, after: Regions, detail: str) -> None:
        """Adds a record with the time since the previous one."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        ops_before, ops_after = (
            sum((count_ops(region.graph) for region in regions.values()), start=Counter[str]())
            for regions in (before, after)
        )
        self.records.append(
            PassRecord(
                name=name,
                nodes_before=sum(len(region.graph.graph.nodes) for region in before.values()),
                nodes_after=sum(len(region.graph.graph.nodes) for region in after.values()),
                added=dict(ops_after - ops_before),
                detail=detail,
                seconds=seconds,
            )
        )

    def keep(self, stage: str, regions: Regions) -> None:
        """Keeps a copy of the graphs at this stage, for display."""
        self.graphs[stage] = {path: region.shown() for path, region in regions.items()}


def run_passes(
    steps: Sequence[GraphPass], regions: Regions, layers: Layers, log: Log | None = None
) -> dict[str, Region]:
    """Runs passes over regions in turn and checks the contract of each before and after it runs.

    Args:
        layers: region path -> its layers, in graph order. log: gets a record of each pass; one with a stage of its own
            that changed no region, because nothing is planned for it, has neither record nor stage.

    From `lower` on, the types of each graph are checked too (moecompile.passes.types).

    Raises:
        PassError: the input or the output of a pass violates its contract, or its output has values that do not fit.
    """
    current, stage, is_lowered = dict(regions), "", False
    for step in steps:
        before, current = current, {path: _checked_run(step, region, layers[path]) for path, region in current.items()}
        is_lowered = is_lowered or isinstance(step, Lower)
        for path, region in current.items() if is_lowered else ():
            if region is not before[path]:
                check_types(step.name, region, layers[path])
        is_idle = hasattr(step, "stage") and all(current[path] is region for path, region in before.items())
        if log is not None and not is_idle:
            stage = getattr(step, "stage", stage)
            log.keep(stage, current)
            log.add(step.name, before, current, getattr(step, "detail", ""))
    return current


def _checked_run(step: GraphPass, region: Region, layers: Sequence[LayerPlan]) -> Region:
    step.requires(region, layers)
    after = step.run(region, layers)
    if not isinstance(after, Region):
        rule = f"run returned a {type(after).__name__}, not a Region: return region.with_graph(graph_module)"
        raise PassError(step.name, region.path, rule)
    after.graph.graph.lint()
    step.ensures(region, after, layers)
    return after


def current_regions(model: nn.Module, regions: Regions) -> dict[str, Region]:
    """The regions with the graphs that are in `model` now."""
    return {path: region.with_graph(_graph_at(model, path)) for path, region in regions.items()}


def _graph_at(model: nn.Module, path: str) -> fx.GraphModule:
    module = model.get_submodule(path)
    assert isinstance(module, fx.GraphModule)
    return module


def replacements(model: nn.Module, before: Regions, after: Regions) -> Graphs:
    """The replacement of each region's module: an instance of the same class, with its attributes and other submodules.

    For existing experts, which are replaced as a whole, it keeps only plain attributes: other code may read sizes.

    Args:
        before: the regions as they are in `model`. after: the regions that replace them.
    """
    return {path: _replacement(model.get_submodule(path), before[path], region.graph) for path, region in after.items()}


def _replacement(module: nn.Module, before: Region, graph_module: fx.GraphModule) -> fx.GraphModule:
    if not any(isinstance(match, ExpertsMatch) for match in before.matches.values()):
        return stand_in(graph_module, module, attributes_of(before.graph))
    for name, value in vars(before.module).items():
        if not name.startswith("_") and name != "training" and not hasattr(graph_module, name):
            set_attribute(graph_module, name, value)
    return graph_module
