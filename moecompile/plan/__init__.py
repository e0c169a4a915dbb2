"""The data classes of a plan: sites, layers, placement, Plan. Frozen, without torch; constructors validate."""

from moecompile.plan.adapters import AdaptersPlan, ExpertAdapters
from moecompile.plan.checks import plan_errors
from moecompile.plan.context_parallel import ExchangedAttention
from moecompile.plan.dispatch import (
    BACKEND,
    EXCHANGE_OPS,
    EXCHANGES,
    HALVES,
    IN_FLIGHT,
    KINDS,
    LENDING,
    LENDING_OPS,
    SLICE_OPS,
    START_OPS,
    WAIT_OPS,
    WIRE_FORMATS,
    DispatchPlan,
    can_fuse,
    check_lends,
)
from moecompile.plan.existing import layer_of, layer_on_one_device, own_routing
from moecompile.plan.experts import ExpertPlacement, ExpertsPlan
from moecompile.plan.fit import check_sites
from moecompile.plan.io import from_yaml, load, read, save, to_yaml
from moecompile.plan.layers import BalancePlan, LayerPlan, RoutingPlan
from moecompile.plan.one_process import on_one_process, on_one_rank
from moecompile.plan.plan import (
    Assumptions,
    Estimate,
    ExpertShards,
    Lending,
    MemoryEstimate,
    Plan,
    Reduction,
    Remedy,
    Traffic,
)
from moecompile.plan.reductions import reductions
from moecompile.plan.shards import EVEN, cut_dim, largest_shard
from moecompile.plan.sites import ExpertsSite, FFNSite, PlannedSite
from moecompile.plan.tensor_parallel import HEADS_STYLE, STYLES, SplitModules

__all__ = [
    "BACKEND",
    "EVEN",
    "EXCHANGES",
    "EXCHANGE_OPS",
    "HALVES",
    "HEADS_STYLE",
    "IN_FLIGHT",
    "KINDS",
    "LENDING",
    "LENDING_OPS",
    "SLICE_OPS",
    "START_OPS",
    "STYLES",
    "WAIT_OPS",
    "WIRE_FORMATS",
    "AdaptersPlan",
    "Assumptions",
    "BalancePlan",
    "DispatchPlan",
    "Estimate",
    "ExchangedAttention",
    "ExpertAdapters",
    "ExpertPlacement",
    "ExpertShards",
    "ExpertsPlan",
    "ExpertsSite",
    "FFNSite",
    "LayerPlan",
    "Lending",
    "MemoryEstimate",
    "Plan",
    "PlannedSite",
    "Reduction",
    "Remedy",
    "RoutingPlan",
    "SplitModules",
    "Traffic",
    "can_fuse",
    "check_lends",
    "check_sites",
    "cut_dim",
    "from_yaml",
    "largest_shard",
    "layer_of",
    "layer_on_one_device",
    "load",
    "on_one_process",
    "on_one_rank",
    "own_routing",
    "plan_errors",
    "read",
    "reductions",
    "save",
    "to_yaml",
]
