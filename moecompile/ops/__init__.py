"""Registered ops (`torch.ops.moecompile.*`): importing this package registers them.

Every function node that the compiler inserts is one of these, except the two calls of a dispatch back end (backend.py).
Each takes split sizes as tensors and has a fake kernel and an autograd formula, so rewritten graphs print, re-trace,
run under fake tensors and compile without graph breaks.
"""

from moecompile.ops import (  # isort: split
    choice,
    collect,
    exchange,
    expert_ffn,
    gather,
    grouped,
    in_flight,
    layout,
    lending,
    lookups,
    positions,
    required_bias,
    rows,
    slices,
    sorting,
    tokens,
    workload,
)

from moecompile.ops import autocast  # after the ops that it has rules for
from moecompile.ops.traffic import context_traffic, lookup_traffic, traffic

__all__ = [
    "autocast",
    "choice",
    "collect",
    "context_traffic",
    "exchange",
    "expert_ffn",
    "gather",
    "grouped",
    "in_flight",
    "layout",
    "lending",
    "lookup_traffic",
    "lookups",
    "positions",
    "required_bias",
    "rows",
    "slices",
    "sorting",
    "tokens",
    "traffic",
    "workload",
]
