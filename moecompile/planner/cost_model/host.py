"""CPU time of a training step on ranks that compute on the CPU, from what task=bench measured of this machine.

Nothing runs beside anything else on a core, so the addends of a micro-batch add up, all in CPU seconds of one rank:

1. Products: operations over the rate that was measured with as many rows, of dense products and of experts' ones.
2. Attention and scans: their operations without tiles, backward 2.5 times forward, over the rate of attention.
3. Memory passes: bytes over a bandwidth. Counts assume numbers of 16 bits; `bits` says what they have.
4. Nodes: what Python calls one by one, forward and backward, each with its own overhead. A third of them is forward;
   with full checkpointing it runs twice, and if exchanges are kept each of its nodes also goes through a mode that is
   written in Python.                                                                                -> `_nodes`
5. Exchanges: of MoE layers, those of the plan in forward and those of rows again in backward; of FSDP, two gathers and
   a reduction for each layer and the root, and once more for its experts if they have replicas; those of split dense
   weights and positions. A message takes a time that depends on the number of ranks, and a time per byte.
                                                                                                     -> `_messages`
6. The optimizer, once a step, per parameter that a rank owns; and gradients, which are summed over micro-batches and
   clipped, as the share of the optimizer's bytes that this moves.
7. Ranks of a node that compute at once share caches, memory and hardware threads: all but exchanges takes as many times
   longer as was measured.

A node's ranks share its cores, and so do those of all nodes that one machine plays. With more ranks than cores, a step
takes as many times longer.                                                                          -> `host_seconds`
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import log2

from moecompile.errors import ConfigError
from moecompile.plan import EXCHANGES
from moecompile.plan import KINDS as DISPATCH_KINDS
from moecompile.planner.cost_model.counts import (
    ATTENTION_BACKWARD,
    OPTIMIZER_BYTES,
    SENT_AS,
    Counts,
    Wire,
    Work,
    layer_work,
    of_layer,
)
from moecompile.planner.cost_model.inputs import Host, Layout, Machine, Software
from moecompile.planner.cost_model.shapes import Attention, ModelShape

WAITING = "waiting for a core"
_COUNTED_BITS = 16
_FORWARD = 1 / 3  # of the nodes of forward and backward
_TOUCHED = 12 / OPTIMIZER_BYTES  # two fp32 numbers read and one written
_STEP_TIMES = {32: 1.0, 16: 3.0, 8: 18.0}
"""Bits of a moment -> CPU time of AdamW over that with 32. Measured: 2.0 to 3.3, and 15 to 24 (use/optimizers.md)."""
_CONTEXT = 4  # exchanges of an attention layer whose positions are split: before and after it, forward and backward


def host_seconds(
    model: ModelShape, layout: Layout, counts: Counts, machine: Machine, software: Software, load: float = 1.0
) -> dict[str, float]:
    """The addends of a step, seconds; all but WAITING are CPU time of a rank.

    Args:
        load: rows of the fullest rank over the mean.
    """
    host = machine.host
    assert host is not None
    wide = software.bits / _COUNTED_BITS
    rate = between(host.products, layout.tokens / layout.tp)
    parts = {
        "dense products": (counts.body.dense + counts.body.narrow) / rate + counts.head.narrow / rate / counts.stages,
        "expert products": sum(_experts(model, layout, counts.body, host, load)),
        "attention": _attention_flops(model, layout, software) / host.attention,
        "scans": counts.body.scan / host.attention,
        "memory passes": wide * (counts.body.passes + counts.head.passes / counts.stages) / host.passes,
        "host": host.node * _nodes(model, layout, software),
    }
    on_node = layout.gpus if host.one_machine else min(machine.domain, layout.gpus)
    computing = between(host.contention, on_node)
    parts = {name: seconds * computing for name, seconds in parts.items()} | {
        "exchange": _exchange(model, layout, counts, software, host, load),
        "tensor": _messages(host, layout.tp, counts.parallel.tensor, counts.parallel.tensor.messages, software),
        "context": _messages(host, layout.cp, counts.parallel.context, _CONTEXT * _mixers(model) / layout.pp, software),
        "weights": _sharding(model, layout, counts, host),
    }
    parts = {name: seconds * counts.num_micro for name, seconds in parts.items()}
    parts["bubble"] = sum(parts.values()) * counts.bubble / counts.num_micro
    owned = computing * host.optimizer * counts.step.owned
    stepped = owned * _STEP_TIMES[software.moment_bits]
    parts |= {"gradients": counts.num_micro * _TOUCHED * owned, "optimizer": stepped}
    parts[WAITING] = sum(parts.values()) * max(0.0, on_node / host.cores - 1)
    return parts


def between(points: Sequence[tuple[float, float]], at: float) -> float:
    """The value at `at` of what was measured at these points: linear in log2 between them, constant beyond."""
    right = bisect_left([x for x, _ in points], at)
    if right == 0 or right == len(points):
        return points[min(right, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[right - 1 : right + 1]
    return y0 + (y1 - y0) * log2(at / x0) / log2(x1 / x0)


def message_seconds(host: Host, ranks: int, num_bytes: float) -> float:
    """CPU seconds of an exchange in which a rank sends these bytes; beyond what was measured, in proportion to peers.

    Raises:
        ConfigError: no exchange was measured.
    """
    if ranks == 1:
        return 0.0
    if not host.messages:
        raise ConfigError(
            "hardware.host.messages", [], f"has no exchange, and {ranks} ranks exchange rows",
            "Measure with task=bench mesh=cpu_1x4",
        )  # fmt: skip
    measured = [row[0] for row in host.messages]
    if ranks <= measured[0] or ranks >= measured[-1]:
        nearest, fixed, each = host.messages[0 if ranks <= measured[0] else -1]
        return fixed * (ranks - 1) / (nearest - 1) + each * num_bytes
    fixed, each = (between([(row[0], row[column]) for row in host.messages], ranks) for column in (1, 2))
    return fixed + each * num_bytes


def _experts(model: ModelShape, layout: Layout, body: Work, host: Host, load: float) -> Iterator[float]:
    """Seconds of each kind of layer's experts, at the rate of as many rows as each of them gets."""
    ffns = [(layer.ffn, layer.count) for layer in model.layers if layer.ffn is not None and layer.ffn.experts]
    shares = [count * ffn.top_k * ffn.expert_weights(model.hidden) for ffn, count in ffns]
    for (ffn, _), share in zip(ffns, shares, strict=True):
        rows = load * layout.tokens / layout.tp * ffn.top_k * layout.ep / ffn.experts
        yield load * body.grouped * share / sum(shares) / between(host.grouped, rows)


def _nodes(model: ModelShape, layout: Layout, software: Software) -> float:
    nodes = 0.0
    for layer in model.layers:
        own = of_layer(layer, software)
        mixer = layer_work(replace(layer, ffn=None), model.hidden, layout, own).launches
        ffn = layer_work(replace(layer, mixer=None), model.hidden, layout, own).launches
        whole, kept = own.repeats("full", "all_but_exchanges"), own.repeats("all_but_exchanges")
        of_ffn = ("moe", "experts") if layer.ffn is not None and layer.ffn.experts else ("mlp",)
        again = mixer * (whole or own.repeats("attention")) + ffn * (whole or own.repeats(*of_ffn))
        modes = 2.0 * (kept * mixer + (kept or own.repeats("experts")) * ffn)
        nodes += layer.count / layout.pp * (mixer + ffn + (again + modes) * _FORWARD)
    return nodes


def _attention_flops(model: ModelShape, layout: Layout, software: Software) -> float:
    flops = 0.0
    for layer in model.layers:
        if isinstance(layer.mixer, Attention):
            again = float(of_layer(layer, software).repeats("full", "all_but_exchanges", "attention"))
            flops += layer.count * layer.mixer.core_flops(layout.seq) * (1 + ATTENTION_BACKWARD + again)
    return flops / layout.pp * layout.tokens / layout.ranks_of("attention")


def _exchange(model: ModelShape, layout: Layout, counts: Counts, software: Software, host: Host, load: float) -> float:
    kind = SENT_AS.get(software.dispatcher, software.dispatcher)
    if layout.ep == 1:
        return 0.0
    layers = sum(layer.count for layer in model.layers if layer.ffn is not None and layer.ffn.experts) / layout.pp
    sent = [EXCHANGES[op].sends for op, _ in DISPATCH_KINDS[kind].steps]
    rows = software.chunks * sum(each != "counts" for each in sent)
    forward = rows + sent.count("counts")
    number = layers * (forward * (1 + counts.sent_again) + rows)
    return _messages(host, layout.ep, counts.wire.times(load), number, software)


def _messages(host: Host, ranks: int, wire: Wire, number: float, software: Software) -> float:
    """Seconds of so many exchanges that send all of `wire`."""
    sent = (wire.intra + wire.inter) * software.bits / _COUNTED_BITS
    return number * message_seconds(host, ranks, sent / number) if number else 0.0


def _mixers(model: ModelShape) -> int:
    return sum(layer.count for layer in model.layers if isinstance(layer.mixer, Attention))


def _sharding(model: ModelShape, layout: Layout, counts: Counts, host: Host) -> float:
    """FSDP's gathers and reductions of a micro-batch."""
    ranks = layout.dp * layout.cp // layout.replicas
    if ranks == 1 or layout.zero != 3:
        return 0.0
    layers = sum(layer.count for layer in model.layers)
    experts = sum(layer.count for layer in model.layers if layer.ffn is not None and layer.ffn.experts)
    number = 3 * (layers + 1 + (experts if layout.edp > 1 else 0)) / layout.pp
    sent = counts.parallel.gathered.intra + counts.parallel.gathered.inter
    return number * message_seconds(host, ranks, sent / number)
