"""Seconds of a training step: the counts divided by rates, in a sum of rooflines.

1. A rate is a data-sheet peak times the share that kernels reach (constants.py), times the share of its clock that the
   GPU sustains: (watts per peak operation, relative to an H100) ** power.                           -> `_rates`
2. A product takes operations / rate + bytes / bandwidth. Of dense products half of the bytes is hidden.
3. Exchanges take bytes / bandwidth + messages * latency; where they overlap with compute, the share `exposed` of it
   stays visible, and for the rest the units that they occupy are lost to compute. Exchanges of a plan that are in
   flight are scheduled as below, and what the schedule adds to compute is visible.                  -> `_in_flight`
4. The host's launches take their time beside the GPU's; the longer one counts. Where both are near, each waits for the
   other now and then: (gpu^4 + host^4)^(1/4).                                                       -> `_host`
5. A stage takes whole layers, and the last one the head: as planned; of described layouts equal numbers if they divide,
   else the best split. The slowest stage sets the pace. With DualPipe a rank has a stage from each end. -> `_uneven`
6. step = (micro-batches + bubble) * slowest stage + what of the reduction is visible + optimizer, and `straggler` of it
   for each doubling of GPUs beyond 8.                                                               -> `step_seconds`

Exchanges beside the experts of one layer. W: seconds that its rows are on the wire in forward, half for dispatch and
half for combine; C, S: seconds that routed and shared experts compute; n: chunks. The wire and the device each do one
thing at a time. A plan decides with these layer by layer, before the whole step is known: bytes over links, and C and S
by `row_seconds`.
a. without overlap      = W + C + S                                                             -> `forward_seconds`
b. with overlap         = the end of the schedule of passes/overlap.py with these times, in which each chunk has 1/n of
                          W, and 1/n of C times the price of chunks: experts multiply fewer rows at a time, and weight
                          gradients are computed apart from those of the rows.
c. backward mirrors it  : gradients of rows take C, those of weights C too, and the shared experts 2 S. With overlap,
                          weight gradients run where shared experts do, while the rows' gradients return (passes/
                          collect.py).                                                            -> `backward_seconds`
d. auto                 = the fastest of none, shared, 2 and 4 chunks in both directions, where a chunk leaves at least
                          `LEAST_ROWS` rows per expert. `shared` is worth something without shared experts too: in
                          backward.                                                               -> `choose_overlap`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import log2

from moecompile.plan import PlannedSite
from moecompile.planner.cost_model.counts import PASSES, Counts, Wire, Work
from moecompile.planner.cost_model.inputs import Machine, Software
from moecompile.schema import HardwareConfig

US = 1e-6
H100_WATTS_PER_TFLOPS = 700 / 989.4
HIDDEN_OPERANDS = 2.0  # measured products hide half of their bytes (b200_kernels.json)
SMALL = 8  # GPUs
BOTH = 4
CHUNKS = (2, 4)
# benchmarks/chunks.py: what each of several chunks costs, of the time of routed experts in both directions, and from
# how many rows per expert and chunk on it is so little.
LEAST_ROWS, PRICE = 256, 0.03
_GAIN = 0.98  # less than 2% faster is not worth more messages

Constants = Mapping[str, float]


def step_seconds(
    counts: Counts, machine: Machine, software: Software, constants: Constants, gpus: int, load: float = 1.0
) -> dict[str, float]:
    """The addends of a step, seconds; `load`: rows of the fullest rank over the mean.

    The keys are: dense products, expert products, attention, scans, memory passes, gaps, exchange, tensor, context,
    stages, weights, host, uneven stages, bubble, reduction, optimizer, stragglers.
    """
    body = _work_seconds(counts.body, machine, software, constants, load)
    shared = counts.body.shared / _rate(machine, software, constants) / constants["dense"]
    times = LayerSeconds(wire=0.0, routed=body["expert products"], shared=shared)
    body |= _wire_seconds(counts, machine, software, constants, load, times)
    head = _work_seconds(counts.head, machine, software, constants, 1.0)
    micro = {name: seconds + head.get(name, 0.0) / counts.stages for name, seconds in body.items()}
    host = _host(counts.body, constants, sum(body.values()))
    micro["host"] = host
    whole = sum(micro.values())
    uneven = _uneven(counts, sum(body.values()) + host, sum(head.values()), software.schedule) * whole
    parts = {name: seconds * counts.num_micro for name, seconds in micro.items()}
    parts["uneven stages"] = uneven * counts.num_micro
    parts["bubble"] = (whole + uneven) * counts.bubble
    parts["reduction"] = _seconds(counts.step.reduced, machine) * constants["reduction"]
    parts["optimizer"] = counts.step.moments / machine.passes
    parts["stragglers"] = sum(parts.values()) * constants["straggler"] * max(0.0, log2(gpus / SMALL))
    return parts


def sustained(machine: Machine, constants: Constants) -> float:
    """Share of its data-sheet clock that a GPU sustains, relative to an H100 (step 1)."""
    share = machine.watts / (machine.peak[16] / 1e12) / H100_WATTS_PER_TFLOPS
    return float(min(1.0, share) ** constants["power"])


def _rate(machine: Machine, software: Software, constants: Constants) -> float:
    """Operations/s of products in the recipe's numbers, before the share that kernels reach."""
    share = sustained(machine, constants)
    return float(machine.peak[software.bits] * share * constants["narrowing"] ** max(0.0, log2(16 / software.bits)))


def _work_seconds(
    work: Work, machine: Machine, software: Software, constants: Constants, load: float
) -> dict[str, float]:
    """Kernels of a micro-batch (steps 1 and 2)."""
    wide = machine.peak[16] * sustained(machine, constants)
    rate = _rate(machine, software, constants)
    dense = work.dense / rate + work.narrow / (wide if software.bits < 16 else rate)
    return {
        "dense products": dense / constants["dense"] + work.operands / machine.memory / HIDDEN_OPERANDS,
        "expert products": load * work.grouped / (rate * constants["grouped"])
        + work.stacks / machine.memory
        + work.groups * constants["group"] * US,
        "attention": work.core / (wide * constants["core"]),
        "scans": work.scan / (wide * constants["scan"]),
        "memory passes": work.passes * constants["passes"] / machine.passes,
        "gaps": work.kernels * constants["gap"] * US,
    }


def row_seconds(hardware: HardwareConfig, site: PlannedSite, width: int) -> float:
    """Forward of one row through an FFN of this width, at the speed that the user says experts reach."""
    return 2 * (site.num_in_projections + 1) * site.d_model * width / (hardware.tflops * 1e12)


def _seconds(wire: Wire, machine: Machine) -> float:
    return machine.links.seconds(wire.intra, wire.inter, wire.messages)


def _wire_seconds(
    counts: Counts, machine: Machine, software: Software, constants: Constants, load: float, times: LayerSeconds
) -> dict[str, float]:
    """Visible communication of a micro-batch (step 3).

    Args:
        times: of the experts, in all passes.
    """
    exchange = load * machine.links.seconds(counts.wire.intra, counts.wire.inter) / software.wire_share
    exchange += machine.links.seconds(0, 0, counts.wire.messages * software.chunks)
    lost = software.comm_units / machine.units * (1 - constants["exposed"])
    beside = exchange * (constants["exposed"] + lost)  # the compute of another micro-batch
    if software.in_flight != "none":
        exchange = _in_flight(replace(times, wire=exchange), counts, software)
    elif software.overlap:
        exchange = beside
    exchange += software.paired * (min(beside, exchange) - exchange)
    parallel = counts.parallel
    return {
        "exchange": exchange,
        "tensor": _seconds(parallel.tensor, machine) * constants.get("tensor", 1.0),
        "context": _seconds(parallel.context, machine) * constants["reduction"],
        "stages": _seconds(parallel.stage, machine) * constants["reduction"],
        "weights": _seconds(parallel.gathered, machine) * constants["reduction"],
    }


def _in_flight(times: LayerSeconds, counts: Counts, software: Software) -> float:
    """What exchanges in flight add to compute (step 3), of all MoE layers of a stage in a micro-batch.

    Args:
        times: in all passes: forward, backward (twice the operations), and forward again with recomputation.
    """
    again, computed = counts.sent_again, PASSES + counts.computed_again
    once = LayerSeconds(wire=times.wire / (2 + again), routed=times.routed / computed, shared=times.shared / computed)
    kind, chunks = software.in_flight, software.chunks
    forward = forward_seconds(once, kind, chunks) - once.routed - once.shared
    backward = backward_seconds(once, kind, chunks) - 2 * (once.routed + once.shared)
    return (1 + again) * forward + backward


def _host(work: Work, constants: Constants, gpu: float) -> float:
    """Seconds that the host adds to the GPU's (step 4)."""
    host = work.launches * constants["launch"] * US
    return float((gpu**BOTH + host**BOTH) ** (1 / BOTH) - gpu)


def _uneven(counts: Counts, body: float, head: float, schedule: str) -> float:
    """The slowest stage over the mean, less one (step 5)."""
    stages = counts.stages // 2 if schedule == "dualpipe" else counts.stages
    if stages <= 1:
        return 0.0
    total, layer = body * counts.stages + head, body * counts.stages / counts.layers
    if counts.split is not None:
        numbers, with_head = counts.split
        slowest = max(number * layer + head * (place == with_head) for place, number in enumerate(numbers))
        return max(0.0, slowest / (total / stages) - 1)
    each, rest = divmod(counts.layers, stages)
    last_layers = range(each + 1) if rest else (each,)
    slowest = min(max(-(-(counts.layers - n) // (stages - 1)) * layer, n * layer + head) for n in last_layers)
    return max(0.0, slowest / (total / stages) - 1)


@dataclass(frozen=True, kw_only=True)
class LayerSeconds:
    """Times of the forward of one MoE layer and micro-batch on one rank: wire, routed experts, shared experts."""

    wire: float
    routed: float
    shared: float


def choose_overlap(times: LayerSeconds, rows_per_expert: float) -> tuple[str, int]:
    """(overlap, chunks) with the shortest predicted time (step d)."""
    kinds = [("none", 1), *_candidates(rows_per_expert)]
    seconds = {kind: _both_ways(times, *kind) for kind in kinds}
    best = min(kinds, key=seconds.__getitem__)
    return best if seconds[best] < _GAIN * seconds["none", 1] else ("none", 1)


def choose_chunks(times: LayerSeconds, rows_per_expert: float) -> int:
    """The number of chunks with the shortest predicted time; 2 where more would leave too few rows."""
    allowed = [chunks for overlap, chunks in _candidates(rows_per_expert) if overlap == "chunks"]
    return min(allowed or CHUNKS[:1], key=lambda chunks: _both_ways(times, "chunks", chunks))


def _candidates(rows_per_expert: float) -> Iterator[tuple[str, int]]:
    yield "shared", 1
    yield from (("chunks", chunks) for chunks in CHUNKS if rows_per_expert / chunks >= LEAST_ROWS)


def _both_ways(times: LayerSeconds, overlap: str, chunks: int) -> float:
    return forward_seconds(times, overlap, chunks) + backward_seconds(times, overlap, chunks)


def backward_seconds(times: LayerSeconds, overlap: str, chunks: int, price: float = PRICE) -> float:
    """Predicted seconds of backward (step c), of a layer with these times in forward."""
    weights = times.routed if overlap == "none" else times.routed * (1 + price * chunks)
    mirrored = LayerSeconds(wire=times.wire, routed=times.routed, shared=2 * times.shared + weights)
    return forward_seconds(mirrored, overlap, chunks, price)


def forward_seconds(times: LayerSeconds, overlap: str, chunks: int, price: float = PRICE) -> float:
    """Predicted seconds of forward (steps a and b)."""
    if overlap == "none":
        return times.wire + times.routed + times.shared
    hop = times.wire / 2 / chunks
    routed = times.routed / chunks * (1 + price * chunks)
    wire = device = 0.0
    sent, back = [0.0] * chunks, [0.0] * chunks
    for slot in range(chunks + 2):
        for chunk in reversed(range(chunks)):
            stage = slot - chunk
            if stage == 0:
                wire = sent[chunk] = max(wire, device) + hop
            elif stage == 1:
                device = max(device, sent[chunk]) + routed
                wire = back[chunk] = max(wire, device) + hop
            elif stage == 2:
                device = max(device, back[chunk])
        if slot == 0:
            device += times.shared
    return device
