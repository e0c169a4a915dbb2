"""Bytes on links: dispatch and combine, tensor and context parallelism, stages, and what a step reduces and gathers.

A link domain is what the fast links connect (NVLink: 8 GPUs of a node, or 72 of a rack). t = T / tp tokens per GPU.

1. Dispatch and combine, forward and backward: the rows of a token that leave a GPU, by link class, as in
   planner/traffic.py for each kind. `alltoall` is flat; `deepep` and `hybridep` send a token once to each other domain
   and, within a domain, once to each rank, as `hierarchical`. With etp, rows are gathered over a group and outputs
   scattered.                                                                                      -> `dispatch_bytes`
2. Tensor parallelism with sequence parallelism: per part of a layer T D numbers are gathered before and scattered
   after, forward and backward; a GPU sends (tp - 1) / tp of them.
3. Context parallelism: keys and values go around, cp - 1 times those of T tokens, forward and twice backward; beyond a
   domain if tp * cp is larger.
4. Stages: t D numbers forward and backward, vpp times.                                            -> `parallel_bytes`
5. A step: fp32 gradients are reduced and bf16 weights gathered, over replicas (dp * cp for dense weights, edp for
   experts). With ZeRO 3, weights are gathered twice and gradients reduced in each micro-batch, over the ranks of one
   of `replicas`; between these, fp32 gradients of what a rank owns are reduced. Stacks of experts of which these ranks
   divide no dim are padded, as FSDP does (plan/shards.py).                                          -> `step_bytes`
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from moecompile.plan import largest_shard
from moecompile.planner.foresight.layout import Layout, Machine, Software
from moecompile.planner.foresight.shapes import Attention, Experts, ModelShape, layer_params
from moecompile.planner.traffic import even_copies

BF16, FP32 = 2, 4
KINDS = {"alltoall": "flat", "deepep": "hierarchical", "hybridep": "hierarchical"}
OPTIMIZER_BYTES = 28  # gradient, weight and two moments read, the last three and a bf16 weight written


@dataclass(frozen=True, kw_only=True)
class Wire:
    """Bytes that leave a GPU, by link class, and the number of messages."""

    intra: float = 0.0
    inter: float = 0.0
    messages: float = 0.0

    def __add__(self, other: Wire) -> Wire:
        return Wire(
            intra=self.intra + other.intra, inter=self.inter + other.inter, messages=self.messages + other.messages
        )

    def times(self, factor: float) -> Wire:
        """All of it `factor` times."""
        return Wire(intra=self.intra * factor, inter=self.inter * factor, messages=self.messages * factor)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Bytes per micro-batch of tensor and context parallelism, between stages, and of weights that ZeRO 3 gathers."""

    tensor: Wire
    context: Wire
    stage: Wire
    gathered: Wire


@dataclass(frozen=True, kw_only=True)
class Step:
    """Bytes per step: gradients and weights on links; what the optimizer reads and writes; parameters it owns."""

    reduced: Wire
    moments: float
    owned: float


def domains(size: int, stride: int, domain: int) -> tuple[int, int]:
    """(link domains, members in each) of a group of `size` GPUs that are `stride` apart."""
    within = max(1, min(size, domain // stride))
    while size % within:
        within -= 1
    return size // within, within


def dispatch_bytes(ffn: Experts, hidden: int, layout: Layout, machine: Machine, software: Software) -> Wire:
    """Bytes of one MoE layer's exchanges in a micro-batch, forward and backward (step 1)."""
    own, row = layout.tokens / layout.tp, ffn.row(hidden)
    again = float(software.repeats("full", "moe"))
    etp = 4 * (layout.etp - 1) * own * ffn.top_k * row * BF16
    if layout.ep == 1:
        return Wire(intra=etp, messages=4.0 if etp else 0.0)
    nodes, within = domains(layout.ep, layout.etp, machine.domain)
    kind = KINDS.get(software.dispatcher, software.dispatcher)
    copies = even_copies(kind, ffn.experts, (ffn.top_k, ffn.groups, ffn.top_groups), nodes, within)
    per_copy = own * row * (2 + again) * (software.row_bits / 8 + BF16)
    return Wire(intra=copies.intra_node * per_copy + etp, inter=copies.inter_node * per_copy, messages=4 + 2 * again)


def parallel_bytes(model: ModelShape, layout: Layout, machine: Machine, software: Software) -> Parallel:
    """Bytes per micro-batch and average stage (steps 2 to 5)."""
    full = 1.5 if software.repeats("full") else 1.0
    tensor, context = Wire(), 0.0
    for layer in model.layers:
        share = layer.count / layout.pp
        parts = (layer.mixer is not None) + (layer.ffn is not None and layer.ffn.d_shared > 0)
        if layout.tp > 1:
            once = (layout.tp - 1) / layout.tp * layout.tokens * model.hidden * BF16
            tensor = tensor + Wire(intra=4 * once, messages=4).times(share * parts * full)
        if isinstance(layer.mixer, Attention):
            keys = layer.mixer.kv_heads * (layer.mixer.d_qk + layer.mixer.d_v) / layout.tp
            context += share * (layout.cp - 1) * layout.tokens * keys * BF16 * 3
    near = layout.tp * layout.cp <= machine.domain
    stage = 2 * layout.vpp * layout.tokens / layout.tp * model.hidden * BF16 if layout.pp > 1 else 0.0
    return Parallel(
        tensor=tensor,
        context=Wire(intra=context if near else 0.0, inter=0.0 if near else context),
        stage=Wire(inter=stage),
        gathered=_over_replicas(model, layout, machine, 2 * BF16 + FP32) if layout.zero == 3 else Wire(),
    )


def step_bytes(model: ModelShape, layout: Layout, machine: Machine) -> Step:
    """Bytes per step (step 5)."""
    dense, experts = stage_params(model, layout)
    owned = dense / (layout.dp * layout.cp) + experts * padding(model, layout) / layout.edp
    return Step(
        reduced=Wire() if layout.zero == 3 else _over_replicas(model, layout, machine, FP32 + BF16),
        moments=owned * OPTIMIZER_BYTES,
        owned=owned,
    )


def stage_params(model: ModelShape, layout: Layout) -> tuple[float, float]:
    """Dense parameters and those of experts that a GPU of an average stage computes with."""
    routed = sum(
        layer.count * layer.ffn.experts * layer.ffn.expert_weights(model.hidden) for layer in model.layers if layer.ffn
    )
    everything = sum(layer.count * layer_params(layer, model.hidden)[0] for layer in model.layers)
    dense = everything - routed + (1 if model.tied else 2) * model.head_weights
    return dense / (layout.tp * layout.pp), routed / (layout.ep * layout.etp * layout.pp)


def padding(model: ModelShape, layout: Layout) -> float:
    """What the fullest GPU has of experts that ZeRO 3 shards, over its even share."""
    ffns = [(layer.ffn, layer.count) for layer in model.layers if layer.ffn is not None and layer.ffn.experts]
    ranks = max(1, layout.edp // layout.replicas)
    if layout.zero < 3 or layout.etp > 1 or not ffns or any(ffn.experts % layout.ep for ffn, _ in ffns):
        return 1.0
    held, even = 0.0, 0.0
    for ffn, count in ffns:
        experts, row = ffn.experts // layout.ep, ffn.row(model.hidden)
        for shape in ((experts, ffn.num_in * ffn.d_expert, row), (experts, row, ffn.d_expert)):
            held += count * largest_shard(shape, ranks)
            even += count * prod(shape) / ranks
    return held / even


def _over_replicas(model: ModelShape, layout: Layout, machine: Machine, bytes_per_param: float) -> Wire:
    """Bytes that a GPU sends when these bytes of each parameter are reduced or gathered over its replicas."""
    dense, experts = stage_params(model, layout)
    experts *= padding(model, layout)
    wire, apart, copies = Wire(), layout.ep * layout.etp, layout.replicas
    for params, size, stride in ((dense, layout.dp * layout.cp, layout.tp), (experts, layout.edp, apart)):
        shards = max(1, size // copies)
        wire = wire + _over_group(params * bytes_per_param, shards, stride, machine)
        if copies > 1:
            wire = wire + _over_group(2 * FP32 * params / shards, copies, stride * shards, machine)
    return wire


def _over_group(once: float, size: int, stride: int, machine: Machine) -> Wire:
    """Bytes that a GPU sends of `once` bytes that a group of `size` GPUs, `stride` apart, reduces or gathers."""
    nodes, within = domains(size, min(stride, machine.domain), machine.domain)
    return Wire(intra=once * (within - 1) / within, inter=once / within * (nodes - 1) / nodes)
