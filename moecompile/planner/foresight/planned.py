"""The case that a plan and its config describe, and the loads whose imbalance is priced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from moecompile.errors import ConfigError
from moecompile.plan import Plan
from moecompile.planner.foresight.forecast import Case, Forecast, Keys, alternatives_of, forecast
from moecompile.planner.foresight.imbalance import Load, measured, synthetic
from moecompile.planner.foresight.layout import Layout
from moecompile.planner.foresight.machine import machine_of, software_of
from moecompile.planner.foresight.shapes import ModelShape
from moecompile.planner.params import routed
from moecompile.schema import Config, Precision, is_described

_PATHS = {
    "gpus": "mesh", "ep": "mesh.ep", "seq": "data.seq_len", "global_batch": "data.global_batch_size",
    "micro_batch": "data.micro_batch_size", **{name: f"workload.{name}" for name in ("tp", "pp", "vpp", "cp", "etp")},
}  # fmt: skip
_BITS = {Precision.fp32: 32}
REPEATED: Mapping[str, tuple[str, ...]] = {"none": (), "full": ("full",), "keep_exchanges": ("all_but_exchanges",)}


def case_of(shape: ModelShape, plan: Plan, config: Config) -> Case:
    """What is forecast for a plan.

    Raises:
        ConfigError: the described layout does not divide, or a figure of the hardware or the stack is missing.
    """
    workload, data, mesh = config.workload, config.data, plan.mesh
    batch = data.global_batch_size
    if not is_described(workload):  # as in the plan's memory, each rank has at least one whole micro-batch
        step = data.micro_batch_size * mesh.num_batches
        batch = -(-batch // step) * step
    try:
        layout = Layout(
            gpus=mesh.world_size, seq=data.seq_len, global_batch=batch, micro_batch=data.micro_batch_size,
            ep=mesh.ep, tp=mesh.tp if mesh.tp > 1 else workload.tp, pp=workload.pp, vpp=workload.vpp,
            cp=mesh.cp if mesh.cp > 1 else workload.cp, etp=workload.etp, zero=workload.zero,
            replicas=mesh.dp_replicate if workload.zero == 3 and not is_described(workload) else 1,
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(_PATHS[error.path.removeprefix("layout.")], error.value, error.rule, error.fix) from error
    dispatches = [(layer.dispatch.kind, layer.dispatch.overlap, layer.dispatch.chunks) for layer in plan.layers]
    kind, overlap, chunks = max(dict.fromkeys(dispatches), key=dispatches.count, default=("local", "none", 1))
    own = config.stack.dispatcher is None and not config.stack.overlap
    software = software_of(
        config.stack, bits=_BITS.get(config.trainer.precision, 16), dispatcher="flat" if kind == "local" else kind,
        recompute=REPEATED[config.trainer.checkpointing.value],
    )  # fmt: skip
    # The plan's nodes are its link domains: ranks of one node are connected by the fast links.
    machine = replace(machine_of(config.hardware), domain=mesh.ranks_per_node)
    if machine.host is not None:
        software = replace(software, fused=True)  # as the experts' kernel for CPUs is
    return Case(
        model=shape,
        layout=layout,
        machine=machine,
        software=replace(software, in_flight=overlap, chunks=chunks) if own else software,
    )


def forecast_plan(shape: ModelShape, plan: Plan, config: Config) -> Forecast:
    """The forecast of a plan's training step.

    Raises:
        ConfigError: as `case_of`, or `workload.load` is not of this model.
    """
    case = case_of(shape, plan, config)
    given = config.stack
    keys = Keys(
        dispatcher="stack.dispatcher" if given.dispatcher else "dispatch.kind",
        no_recompute="trainer.checkpointing=none" if given.recompute is None else "stack.recompute=[]",
    )
    return forecast(case, loads_of(plan, config), alternatives_of(case, keys))


def loads_of(plan: Plan, config: Config) -> list[Load]:
    """Balanced, zipf and hot, and the load of a given run.

    Raises:
        ConfigError: `workload.load` is not of this model.
    """
    if not plan.layers:
        return []
    layer, skew = plan.layers[0], config.routing.skew
    top_k, _, _ = routed(layer)
    loads = [
        synthetic(kind, layer.experts.num_routed, plan.mesh.ep, top_k, skew) for kind in ("balanced", "zipf", "hot")
    ]
    if config.workload.load is not None:
        experts = [each.experts.num_routed for each in plan.layers]
        identity = [each.experts.num_identity for each in plan.layers]
        orders = [each.placement.order for each in plan.layers]
        loads.append(measured(Path(config.workload.load), experts, plan.mesh.ep, identity, orders))
    return loads
