"""moecompile: a declarative MoE model compiler for PyTorch.

    moecompile.transform(graph_module, overrides_or_plan)          # a new graph, the input untouched
    moecompile.compile_model(model, overrides, example=...)        # in place, like fully_shard
    moecompile.make_plan(model_or_graph, overrides, example=...)   # the plan alone
    moecompile.make_optimizer(model, overrides)                    # AdamW or Muon, for sharded weights too
    moecompile.plan_of(model)                                      # the plan that a model was compiled by
    moecompile.certify(build, parallelize, batch, mesh)            # N ranks against one process, for any module
    moecompile.register_pattern(pattern), register_pass(step, after="rewrite")   # what the compiler does not know
    moecompile.register_score(name, score), register_reader(suffix, read)        # nor routers, nor data
    moecompile.load_exported(path)                                 # a trained model, on one device

Names are resolved on first use (PEP 562), so that `import moecompile` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from moecompile.version import __version__ as __version__

if TYPE_CHECKING:
    from moecompile.errors import ArgumentError, CaptureError, ConfigError, MoecompileError, PlanError, UserError
    from moecompile.export import load_exported
    from moecompile.match.ffn import FFNMatch, register_pattern
    from moecompile.match.linears import GraphView
    from moecompile.match.regions import Region
    from moecompile.models.widen import widen_experts
    from moecompile.nn import auxiliary_loss, update_balance
    from moecompile.nn.context import own_positions
    from moecompile.nn.replay import record_routes, replay_routes
    from moecompile.nn.scores import register_score
    from moecompile.ops.backend import (
        AsyncDispatchBackend,
        DispatchBackend,
        Dispatched,
        ExpertsBackend,
        count_sent_bytes,
    )
    from moecompile.passes.base import GraphPass, register_pass
    from moecompile.passes.shard import device_mesh_of, shard
    from moecompile.passes.types import register_type
    from moecompile.pipeline import compile_model, make_plan, plan_of, transform
    from moecompile.plan import Plan
    from moecompile.runtime.records import register_reader
    from moecompile.runtime.strategy import ExpertParallelStrategy
    from moecompile.runtime.weight_groups import make_optimizer
    from moecompile.verify.certificate import Certificate, Parallel, certify

_HOMES = {
    "ArgumentError": "errors",
    "CaptureError": "errors",
    "ConfigError": "errors",
    "AsyncDispatchBackend": "ops.backend",
    "DispatchBackend": "ops.backend",
    "Dispatched": "ops.backend",
    "ExpertParallelStrategy": "runtime.strategy",
    "ExpertsBackend": "ops.backend",
    "FFNMatch": "match.ffn",
    "GraphPass": "passes.base",
    "GraphView": "match.linears",
    "MoecompileError": "errors",
    "Plan": "plan",
    "PlanError": "errors",
    "Region": "match.regions",
    "UserError": "errors",
    "Certificate": "verify.certificate",
    "Parallel": "verify.certificate",
    "auxiliary_loss": "nn",
    "certify": "verify.certificate",
    "compile_model": "pipeline",
    "count_sent_bytes": "ops.backend",
    "device_mesh_of": "passes.shard",
    "load_exported": "export",
    "make_optimizer": "runtime.weight_groups",
    "make_plan": "pipeline",
    "own_positions": "nn.context",
    "plan_of": "pipeline",
    "record_routes": "nn.replay",
    "register_pass": "passes.base",
    "register_pattern": "match.ffn",
    "register_reader": "runtime.records",
    "register_score": "nn.scores",
    "register_type": "passes.types",
    "replay_routes": "nn.replay",
    "shard": "passes.shard",
    "transform": "pipeline",
    "update_balance": "nn",
    "widen_experts": "models.widen",
}

__all__ = [
    "ArgumentError",
    "AsyncDispatchBackend",
    "CaptureError",
    "Certificate",
    "ConfigError",
    "DispatchBackend",
    "Dispatched",
    "ExpertParallelStrategy",
    "ExpertsBackend",
    "FFNMatch",
    "GraphPass",
    "GraphView",
    "MoecompileError",
    "Parallel",
    "Plan",
    "PlanError",
    "Region",
    "UserError",
    "auxiliary_loss",
    "certify",
    "compile_model",
    "count_sent_bytes",
    "device_mesh_of",
    "load_exported",
    "make_optimizer",
    "make_plan",
    "own_positions",
    "plan_of",
    "record_routes",
    "register_pass",
    "register_pattern",
    "register_reader",
    "register_score",
    "register_type",
    "replay_routes",
    "shard",
    "transform",
    "update_balance",
    "widen_experts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moecompile' has no attribute '{name}'")
    _register_strategy()
    return getattr(importlib.import_module(f"moecompile.{_HOMES[name]}"), name)


def _register_strategy() -> None:
    """Makes `Trainer(strategy="expert_parallel")` known where Lightning is in use."""
    if "lightning.pytorch" in sys.modules:
        importlib.import_module("moecompile.runtime.strategy")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_register_strategy()
