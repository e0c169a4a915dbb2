"""The forecast of a training step: its time by part, what imbalance costs, and what would make it faster.

1. Counts and seconds of the step (counts.py, seconds.py).                                          -> `step_of`
2. The same with the fullest rank's load, at the median and the 99th percentile of each workload.    -> `prices`
3. Each change of one setting, through the model again; those that help, best first.                 -> `changes`

The elasticity of a step to a part is the part's share of it: with 1% less of the part, the step has share% less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moecompile.errors import ConfigError
from moecompile.plan import Plan
from moecompile.planner.cost_model.constants import calibrated
from moecompile.planner.cost_model.counts import count
from moecompile.planner.cost_model.host import host_seconds
from moecompile.planner.cost_model.imbalance import Load, measured, synthetic
from moecompile.planner.cost_model.inputs import KINDS, Inputs, Software, inputs_of
from moecompile.planner.cost_model.seconds import step_seconds
from moecompile.planner.cost_model.shapes import ModelShape, training_flops
from moecompile.planner.params import routed
from moecompile.schema import Config

BEST = 3
OVERLAP_UNITS = 20  # of DeepSeek-V3's exchanges
_HELPS = 0.99  # of the time
COMMUNICATION = (
    "exchange within the node",
    "exchange across nodes",
    "tensor",
    "context",
    "stages",
    "weights",
    "reduction",
)


@dataclass(frozen=True, kw_only=True)
class Price:
    """Seconds of a step under an imbalanced load, at the median and the 99th percentile of layers."""

    name: str
    p50_load: float
    p50_seconds: float
    p99_load: float
    p99_seconds: float


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change and the seconds of the step with it."""

    change: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """seconds: of a step. parts: its addends, seconds. flops: model operations per token, forward and backward, without
    recomputation. mfu: of the machine's peak in the numbers of its products.
    """

    seconds: float
    parts: Mapping[str, float]
    tokens_per_second_per_rank: float
    flops_per_token: float
    tflops_per_rank: float
    mfu: float
    micro_batches: int
    prices: tuple[Price, ...] = ()
    changes: tuple[Change, ...] = ()


def forecast(inputs: Inputs, loads: Sequence[Load], alternatives: Mapping[str, Inputs]) -> Forecast:
    """The forecast.

    Args:
        loads: whose imbalance is priced. alternatives: change -> what is forecast with it.
    """
    layout = inputs.layout
    parts = step_of(inputs)
    seconds = sum(parts.values())
    speed = layout.global_batch * layout.seq / layout.gpus / seconds
    flops = training_flops(inputs.model, layout.seq)
    return Forecast(
        seconds=seconds,
        parts=parts,
        tokens_per_second_per_rank=speed,
        flops_per_token=flops,
        tflops_per_rank=flops * speed / 1e12,
        mfu=flops * speed / inputs.machine.peak[inputs.software.bits],
        micro_batches=layout.num_micro,
        prices=tuple(prices(inputs, loads)),
        changes=changes(seconds, alternatives),
    )


def step_of(inputs: Inputs, load: float = 1.0) -> dict[str, float]:
    """The addends of the step, seconds, with exchanges by link class."""
    counts = count(inputs.model, inputs.layout, inputs.machine, inputs.software)
    if inputs.machine.host is not None:
        parts = host_seconds(inputs.model, inputs.layout, counts, inputs.machine, inputs.software, load)
    else:
        parts = step_seconds(counts, inputs.machine, inputs.software, calibrated(), inputs.layout.gpus, load)
    exchange, wire = parts.pop("exchange"), counts.wire
    intra, inter = inputs.machine.links.seconds(wire.intra, 0), inputs.machine.links.seconds(0, wire.inter)
    within = intra / (intra + inter) if intra + inter else 1.0
    return {"exchange within the node": exchange * within, "exchange across nodes": exchange * (1 - within), **parts}


def prices(inputs: Inputs, loads: Sequence[Load]) -> Iterator[Price]:
    """Step 2."""
    for load in loads:
        p50, p99 = (sum(step_of(inputs, ratio).values()) for ratio in (load.p50, load.p99))
        yield Price(name=load.name, p50_load=load.p50, p50_seconds=p50, p99_load=load.p99, p99_seconds=p99)


def changes(seconds: float, alternatives: Mapping[str, Inputs]) -> tuple[Change, ...]:
    """Step 3: at most `BEST` changes that save 1% or more."""
    found = [Change(change=name, seconds=sum(step_of(inputs).values())) for name, inputs in alternatives.items()]
    return tuple(sorted((c for c in found if c.seconds < _HELPS * seconds), key=lambda c: c.seconds)[:BEST])


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Overrides that change a step: the key of its dispatch, and what switches recomputation off."""

    dispatcher: str = "dispatch.kind"
    no_recompute: str = "trainer.checkpointing=none"


def alternatives_of(inputs: Inputs, keys: Keys) -> dict[str, Inputs]:
    """Changes of one setting, as overrides."""
    found = {text: replace(inputs, software=software) for text, software in _software(inputs, keys)}
    for text, values in _layouts(inputs):
        try:
            found[text] = replace(inputs, layout=replace(inputs.layout, **values))
        except ConfigError:
            continue  # it does not divide
    return found


def _layouts(inputs: Inputs) -> Iterator[tuple[str, dict[str, int]]]:
    layout = inputs.layout
    yield f"data.micro_batch_size={2 * layout.micro_batch}", {"micro_batch": 2 * layout.micro_batch}
    for ep in {layout.ep // 2, layout.ep * 2} - {0}:
        if all(layer.ffn is None or layer.ffn.experts % ep == 0 for layer in inputs.model.layers):
            yield f"mesh.ep={ep}", {"ep": ep}


def _software(inputs: Inputs, keys: Keys) -> Iterator[tuple[str, Software]]:
    software = inputs.software
    if inputs.layout.ep > 1:
        for kind in KINDS:
            yield f"{keys.dispatcher}={kind}", replace(software, dispatcher=kind)
        if not software.overlap:
            text = f"stack.overlap=true stack.comm_units.value={OVERLAP_UNITS}"
            yield text, replace(software, overlap=True, comm_units=OVERLAP_UNITS)
    if software.recompute:
        yield keys.no_recompute, replace(software, recompute=())
    yield "stack.graph=[all]", replace(software, graph=("all",))
    if software.bits == 16 and inputs.machine.peak[8] > inputs.machine.peak[16]:
        yield "stack.bits=8", replace(software, bits=8)


def forecast_plan(shape: ModelShape, plan: Plan, config: Config) -> Forecast:
    """The forecast of a plan's training step.

    Raises:
        ConfigError: as `inputs_of`, or `workload.load` is not of this model.
    """
    inputs = inputs_of(shape, plan, config)
    given = config.stack
    keys = Keys(
        dispatcher="stack.dispatcher" if given.dispatcher else "dispatch.kind",
        no_recompute="trainer.checkpointing=none" if given.recompute is None else "stack.recompute=[]",
    )
    return forecast(inputs, loads_of(plan, config), alternatives_of(inputs, keys))


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
