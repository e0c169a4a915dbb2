"""The forecast of a training step: its time by part, what imbalance costs, and what would make it faster.

1. Counts and seconds of the step (counts.py, seconds.py).                                          -> `step_of`
2. The same with the fullest rank's load, at the median and the 99th percentile of each workload.    -> `prices`
3. Each change of one setting, through the model again; those that help, best first.                 -> `changes`

The elasticity of a step to a part is the part's share of it: with 1% less of the part, the step has share% less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from moecompile.errors import ConfigError
from moecompile.planner.foresight.constants import calibrated
from moecompile.planner.foresight.counts import count
from moecompile.planner.foresight.host import host_seconds
from moecompile.planner.foresight.imbalance import Load
from moecompile.planner.foresight.layout import KINDS, Layout, Machine, Software
from moecompile.planner.foresight.seconds import step_seconds
from moecompile.planner.foresight.shapes import ModelShape, training_flops

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
class Case:
    """What is forecast."""

    model: ModelShape
    layout: Layout
    machine: Machine
    software: Software


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


def forecast(case: Case, loads: Sequence[Load], alternatives: Mapping[str, Case]) -> Forecast:
    """The forecast.

    Args:
        loads: whose imbalance is priced. alternatives: change -> what is forecast with it.
    """
    layout = case.layout
    parts = step_of(case)
    seconds = sum(parts.values())
    speed = layout.global_batch * layout.seq / layout.gpus / seconds
    flops = training_flops(case.model, layout.seq)
    return Forecast(
        seconds=seconds,
        parts=parts,
        tokens_per_second_per_rank=speed,
        flops_per_token=flops,
        tflops_per_rank=flops * speed / 1e12,
        mfu=flops * speed / case.machine.peak[case.software.bits],
        micro_batches=layout.num_micro,
        prices=tuple(prices(case, loads)),
        changes=changes(seconds, alternatives),
    )


def step_of(case: Case, load: float = 1.0) -> dict[str, float]:
    """The addends of the step, seconds, with exchanges by link class."""
    counts = count(case.model, case.layout, case.machine, case.software)
    if case.machine.host is not None:
        parts = host_seconds(case.model, case.layout, counts, case.machine, case.software, load)
    else:
        parts = step_seconds(counts, case.machine, case.software, calibrated(), case.layout.gpus, load)
    exchange, wire = parts.pop("exchange"), counts.wire
    intra, inter = wire.intra / case.machine.intra, wire.inter / case.machine.inter
    within = intra / (intra + inter) if intra + inter else 1.0
    return {"exchange within the node": exchange * within, "exchange across nodes": exchange * (1 - within), **parts}


def prices(case: Case, loads: Sequence[Load]) -> Iterator[Price]:
    """Step 2."""
    for load in loads:
        p50, p99 = (sum(step_of(case, ratio).values()) for ratio in (load.p50, load.p99))
        yield Price(name=load.name, p50_load=load.p50, p50_seconds=p50, p99_load=load.p99, p99_seconds=p99)


def changes(seconds: float, alternatives: Mapping[str, Case]) -> tuple[Change, ...]:
    """Step 3: at most `BEST` changes that save 1% or more."""
    found = [Change(change=name, seconds=sum(step_of(case).values())) for name, case in alternatives.items()]
    return tuple(sorted((c for c in found if c.seconds < _HELPS * seconds), key=lambda c: c.seconds)[:BEST])


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Overrides that change a case: the key of its dispatch, and what switches recomputation off."""

    dispatcher: str = "dispatch.kind"
    no_recompute: str = "trainer.checkpointing=none"


def alternatives_of(case: Case, keys: Keys) -> dict[str, Case]:
    """Changes of one setting, as overrides."""
    found = {text: replace(case, software=software) for text, software in _software(case, keys)}
    for text, values in _layouts(case):
        try:
            found[text] = replace(case, layout=replace(case.layout, **values))
        except ConfigError:
            continue  # it does not divide
    return found


def _layouts(case: Case) -> Iterator[tuple[str, dict[str, int]]]:
    layout = case.layout
    yield f"data.micro_batch_size={2 * layout.micro_batch}", {"micro_batch": 2 * layout.micro_batch}
    for ep in {layout.ep // 2, layout.ep * 2} - {0}:
        if all(layer.ffn is None or layer.ffn.experts % ep == 0 for layer in case.model.layers):
            yield f"mesh.ep={ep}", {"ep": ep}


def _software(case: Case, keys: Keys) -> Iterator[tuple[str, Software]]:
    software = case.software
    if case.layout.ep > 1:
        for kind in KINDS:
            yield f"{keys.dispatcher}={kind}", replace(software, dispatcher=kind)
        if not software.overlap:
            text = f"stack.overlap=true stack.comm_units.value={OVERLAP_UNITS}"
            yield text, replace(software, overlap=True, comm_units=OVERLAP_UNITS)
    if software.recompute:
        yield keys.no_recompute, replace(software, recompute=())
    yield "stack.graph=[all]", replace(software, graph=("all",))
    if software.bits == 16 and case.machine.peak[8] > case.machine.peak[16]:
        yield "stack.bits=8", replace(software, bits=8)
