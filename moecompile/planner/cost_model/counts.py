"""What a step makes a GPU do: operations, bytes of memory and of links, kernels. There is no fitted constant here.

T tokens of a micro-batch of a replica (micro_batch * seq / cp); a GPU has t = T / tp of them outside attention. Where a
plan says what tp splits, a GPU computes all else for all T: norms, routers, scores of words, and each part of a layer
that the model's tp_plan leaves out.                                                              -> `Layout.ranks_of`

Work of a layer and micro-batch
1. Products with weights are split over tp. Forward, the gradient of inputs and the gradient of weights have as many
   operations each. Every product reads both operands in the numbers of the recipe (bits) and writes bf16 (fp32 without
   autocast on fp32 weights); the fp32 gradient of a weight is read and written. Autocast makes a narrow copy of a
   weight, and a wide one of its gradient.                                                         -> `add_product`
2. Attention executes whole tiles: a window of w costs w + 2 * 128 keys, and a head of fewer than 128 numbers as much as
   one of 128, because the exponentials of its scores take the time. Its backward has 2.5 times the operations, because
   scores are computed again.                                                                      -> `add_mixer`
3. Experts: t K rows on every GPU if the load is even; the weights of each local expert are read in each pass.
                                                                                                   -> `add_experts`
4. Passes over memory outside products, forward and backward, in tensors of a token's width (tables below). Products in
   8 or 4 bits need their inputs and output gradients quantized: bf16 is read and two layouts are written; 4 bits read
   three times (largest value, rotation, rounding).                                                -> `quantized`
5. Kernels, and those of them that the host launches one by one, because no CUDA graph replays them.

Bytes on links. A link domain is what the fast links connect (NVLink: 8 GPUs of a node, or 72 of a rack).
6. Dispatch and combine, forward and backward: the rows of a token that leave a GPU, by link class, as in
   planner/traffic.py for each kind. `alltoall` is flat; `deepep` and `hybridep` send a token once to each other domain
   and, within a domain, once to each rank, as `hierarchical`. With etp, rows are gathered over a group and outputs
   scattered.                                                                                      -> `dispatch_bytes`
7. Tensor parallelism with sequence parallelism: per part of a layer T D numbers are gathered before and scattered
   after, forward and backward; a GPU sends (tp - 1) / tp of them. Of a plan: as many are summed, forward and backward,
   of each part that is split; T D are gathered after experts and in their backward; the embedding's are summed, and
   scores of words gathered.                                                                       -> `_tensor_bytes`
8. Context parallelism: keys and values go around, cp - 1 times those of T tokens, forward and twice backward; beyond a
   domain if tp * cp is larger.
9. Stages: t D numbers forward and backward, vpp times; of a plan, within a domain where the next stage is there.
                                                                                                -> `parallel_bytes`
10. A step: gradients (fp32, or of `grad_bits`) are reduced and bf16 weights gathered, over replicas (dp * cp for dense
   weights, edp for experts). With ZeRO 3, over the ranks of one of `replicas`: weights are gathered twice in each
   micro-batch, or once in a step, and gradients reduced in each, or once; between the replicas, those of what a
   rank owns are reduced once. Stacks of experts of which these ranks divide no dim are padded, as FSDP does
   (plan/experts.py).
                                                                                                  -> `step_bytes`

All of a GPU
11. Layers are spread over the pp stages; what an average stage does in a micro-batch, and the whole output head, which
   is on the last stage alone.                                                                          -> `count`
12. Bubble: micro-batches for which a stage is idle: (pp - 1) / vpp of 1F1B; of DualPipe (pp / 2 - 1) (F&B + B - 3 W)
   with forward F, backward B = 2 F, weight gradients W = F, and 3 F a micro-batch (DeepSeek-V3 report, table 2); of a
   pipeline that is planned, as its schedule says, with a backward of 2 F, and F more of layers that are computed again.
                                                                                                       -> `_bubble`

Legend: t tokens, D model dim, F hidden numbers of an expert, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from moecompile.plan import largest_shard
from moecompile.planner.cost_model.inputs import Layout, Machine, Software
from moecompile.planner.cost_model.shapes import Attention, Experts, Layer, ModelShape, Scan, layer_params
from moecompile.planner.traffic import even_copies
from moecompile.stages import SCHEDULES

BF16, FP32 = 2, 4
PASSES = 3  # forward, gradient of inputs, gradient of weights
TILE = 128
ATTENTION_BACKWARD = 2.5
NORM_PASSES = 10  # of D, per norm with its residual addition: reads and writes of x and of its gradient
MIXER_PASSES = 8  # of q, k, v and o: the kernel's own, rotary and layouts
SCAN_PASSES = 24  # of what a scan reads and writes: convolution, states of chunks, gate, norm
LOGIT_BYTES = 56  # per token and word: bf16 logits, an fp32 softmax op by op, its gradient
ROUTER_PASSES = 16  # of E fp32 scores: score, bias, top-k, masks, statistics
# Rows of experts: a fused exchange permutes as it sends; a plain all-to-all permutes for ranks and again for experts.
ROW_PASSES, FLAT_ROW_PASSES = {"hybridep": 6, "deepep": 8}, 12
CAST_BYTES = 12  # of a weight: fp32 read and bf16 written, and the same of its gradient
# Numbers of F per row: one fused kernel each way (SwiGLU); relu, square, an fp32 weight and a cast; for clamped gates
# with biases two bias additions, two clamps, scale, sigmoid, addition and three products, each op with its backward.
# Of other gates the function, the product and the joined gradients of both halves; without a gate two functions.
ACTIVATION_PASSES = {"swiglu": 12, "relu2": 26, "clamped": 70, "gated": 18, "up_down": 10}
KERNELS = {
    "attn": 45,
    "mla": 30,
    "mamba": 45,
    "router": 35,
    "preprocess": 15,
    "dispatch": 50,
    "experts": 60,
    "dense": 20,
}
QUANTIZE_KERNELS, EXPERT_KERNELS = 12, 6
SENT_AS = {"alltoall": "flat", "deepep": "hierarchical", "hybridep": "hierarchical"}
OPTIMIZER_BYTES = 28  # gradient, weight and two moments read, the last three and a bf16 weight written
_OF_MOMENTS = 16  # of them, with moments of 32 bits
_FROM_C = 0.2  # a launch from a library's loop over experts, in launches from Python
_OVERLAP_LAUNCHES = 1.5  # forwards and backwards that alternate are cut into parts, each with events and streams


@dataclass(kw_only=True)
class Work:
    """What a GPU does. dense: operations of products in the recipe's numbers; narrow: of those that have 16 bits at
    least (head, router); shared: those of `dense` that belong to shared experts; grouped: of experts;
    core, scan: of attention and scans. operands, stacks: bytes that dense and grouped products move; passes: bytes
    outside products. groups: products of single experts. kernels: on the GPU; launches: those that the host makes.
    """

    dense: float = 0
    narrow: float = 0
    shared: float = 0
    grouped: float = 0
    core: float = 0
    scan: float = 0
    operands: float = 0
    stacks: float = 0
    passes: float = 0
    groups: float = 0
    kernels: float = 0
    launches: float = 0

    def add(self, other: Work, times: float) -> None:
        """Adds `times` of `other`."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + times * value)


def layer_work(layer: Layer, hidden: int, layout: Layout, software: Software) -> Work:
    """One layer's work in a micro-batch."""
    work, software = Work(), of_layer(layer, software)
    if layer.mixer is not None:
        add_mixer(work, layer.mixer, hidden, layout, software)
    if layer.ffn is not None:
        _add_always(work, layer, hidden, layout, software)
        if layer.ffn.experts:
            add_experts(work, layer.ffn, hidden, layout, software)
    return work


def of_layer(layer: Layer, software: Software) -> Software:
    """The software with what it computes again of this layer."""
    return software if layer.recompute is None else replace(software, recompute=layer.recompute)


def head_work(hidden: int, vocab: int, layout: Layout, software: Software, heads: int) -> Work:
    """The output head and the loss, of `heads` predictions."""
    work = Work()
    _add_dense(work, heads * hidden * vocab, "head", layout, software, narrow=True)
    work.passes += heads * LOGIT_BYTES * vocab * layout.tokens / layout.ranks_of("loss")
    return work


def add_product(
    work: Work, weights: float, tokens: float, software: Software, *, again: float = 0, narrow: bool = False
) -> None:
    """A product of `tokens` rows with `weights` numbers (step 1); again: forwards that are repeated; narrow: as of
    `Work`.
    """
    bits = max(16, software.bits) if narrow else software.bits
    flops = 2 * weights * tokens * (PASSES + again)
    work.dense += 0 if narrow else flops
    work.narrow += flops if narrow else 0
    work.operands += weights * (2 * bits / 8 + 2 * FP32)
    work.passes += weights * CAST_BYTES * software.casts


def _add_dense(
    work: Work, weights: float, part: str, layout: Layout, software: Software, *, again: float = 0, narrow: bool = False
) -> None:
    """A product of all tokens of a replica with weights of a part, on one GPU."""
    add_product(work, weights / layout.ranks_of(part), layout.tokens, software, again=again, narrow=narrow)


def moved(d_in: float, d_out: float, software: Software, again: float) -> float:
    """Bytes per row that a product's three passes read and write."""
    small, made = software.bits / 8, software.number_bytes
    return (1 + again) * (d_in * small + d_out * made) + (d_out * small + d_in * made) + (d_in + d_out) * small


def quantized(d_in: float, d_out: float, bits: int) -> float:
    """Bytes per row that quantize a product's input and output gradient (step 4)."""
    reads = 3 if bits < 8 else 1
    return (reads * BF16 + 2 * bits / 8) * (d_in + d_out) if bits < 16 else 0.0


def add_mixer(work: Work, mixer: Attention | Scan, hidden: int, layout: Layout, software: Software) -> None:
    """Attention or a scan, with its norm."""
    bits, made, part = software.bits, software.number_bytes, part_of(mixer)
    ranks = layout.ranks_of(part)
    own = layout.tokens / ranks
    again = 1.0 if software.repeats("full", "all_but_exchanges", "attention") else 0.0
    _add_norm(work, hidden, max(again, float(software.repeats("layernorm"))), layout, software)
    work.passes += quantized(hidden, mixer.width, bits) * own
    work.operands += own * moved(2 * hidden * ranks, mixer.width, software, again)
    if isinstance(mixer, Attention):
        ups = mixer.up_weights(hidden) / mixer.weights(hidden) if software.repeats("mla_up_proj") else 0.0
        _add_dense(work, mixer.weights(hidden), part, layout, software, again=max(again, ups))
        work.core += executed_flops(mixer, layout.seq) * (1 + ATTENTION_BACKWARD + again) * own
        work.passes += mixer.width * MIXER_PASSES * made * own
        kernels, name = KERNELS["attn"] + (KERNELS["mla"] if mixer.kv_rank else 0), "attn"
    else:
        _add_dense(work, mixer.weights(hidden), part, layout, software, again=again)
        work.scan += mixer.core_flops(layout.seq) * (PASSES + again) * own
        work.passes += mixer.width * SCAN_PASSES * made * own
        kernels, name = KERNELS["mamba"], "mamba"
    _add_kernels(work, software, name, kernels + QUANTIZE_KERNELS * (bits < 16))


def part_of(mixer: Attention | Scan) -> str:
    """Its word in `Layout.over_tp`."""
    return "attention" if isinstance(mixer, Attention) else "scan"


def _add_norm(work: Work, hidden: int, again: float, layout: Layout, software: Software) -> None:
    """A norm with its residual addition."""
    own = layout.tokens / layout.ranks_of("norms")
    work.passes += NORM_PASSES * hidden * software.wide_bytes * (1 + again / PASSES) * own


def executed_flops(mixer: Attention, seq: int) -> float:
    """Forward operations per token that a kernel of attention executes (step 2)."""
    keys = min(mixer.mean_keys(seq) + (2 * TILE if mixer.window else 0), (seq + 1) / 2)
    return 2 * mixer.heads * (max(mixer.d_qk, TILE) + max(mixer.d_v, TILE)) * keys


def _add_always(work: Work, layer: Layer, hidden: int, layout: Layout, software: Software) -> None:
    """What every token uses: norm, dense or shared experts, router."""
    ffn, bits = layer.ffn, software.bits
    assert ffn is not None
    part = "experts" if ffn.shared_in_experts else "ffn"
    ranks = layout.ranks_of(part)
    own = layout.tokens / ranks
    again = float(software.repeats("full", "all_but_exchanges", *(("moe", "experts") if ffn.experts else ("mlp",))))
    joint = 2 * hidden * hidden if layer.mtp else 0
    _add_dense(work, ffn.shared_weights(hidden) + joint, part, layout, software, again=again)
    wide = (ffn.num_in + 1) * ffn.d_shared
    if ffn.experts:
        work.shared += 2 * (ffn.num_in + 1) * hidden * ffn.d_shared * own * (PASSES + again)
    work.operands += own * moved(2 * hidden * ranks, wide, software, again) * (wide > 0)
    activation = ACTIVATION_PASSES[ffn.activation] * ffn.d_shared * software.number_bytes
    work.passes += (activation + quantized(hidden, wide, bits)) * own
    _add_norm(work, hidden, max(again, float(software.repeats("layernorm"))), layout, software)
    if ffn.experts:
        _add_dense(work, ffn.router_weights(hidden), "router", layout, software, narrow=True, again=again)
        work.passes += ROUTER_PASSES * ffn.experts * FP32 * layout.tokens / layout.ranks_of("router")
    else:
        _add_kernels(work, software, "dense", KERNELS["dense"] + QUANTIZE_KERNELS * (bits < 16))


def add_experts(work: Work, ffn: Experts, hidden: int, layout: Layout, software: Software) -> None:
    """Routed experts, their permutation and their router's kernels (step 3), with an even load."""
    rows, local, bits = layout.tokens / layout.tp * ffn.top_k, ffn.experts / layout.ep, software.bits
    again = float(software.repeats("full", "all_but_exchanges", "moe", "experts"))
    weights, row = ffn.expert_weights(hidden), ffn.row(hidden)
    work.grouped += 2 * rows * weights * (PASSES + again)
    work.stacks += local * weights / layout.etp * ((2 + again) * bits / 8 + 2 * FP32)
    gathered, width, made = rows * layout.etp, ffn.d_expert / layout.etp, software.number_bytes
    work.stacks += gathered * (moved(row, ffn.num_in * width, software, again) + moved(width, row, software, again))
    work.passes += local * weights / layout.etp * CAST_BYTES * software.casts
    # The second half of the passes is over rows that were gathered over etp.
    passes = ROW_PASSES.get(software.dispatcher, FLAT_ROW_PASSES) * row * made * (1 + layout.etp) / 2
    if not software.fused:
        again_act = max(again, float(software.repeats("moe_act")))
        passes += ACTIVATION_PASSES[ffn.activation] * ffn.d_expert * made * (1 + again_act / PASSES)
        passes += quantized(2 * row, (ffn.num_in + 1) * ffn.d_expert, bits)
    work.passes += (passes + software.packing * row) * rows * (1 + again / PASSES)
    work.groups += local * EXPERT_KERNELS
    each = (1 if software.fused else local) * EXPERT_KERNELS * (2 if bits < 16 else 1)
    work.kernels += each
    for name in ("router", "preprocess", "dispatch", "experts"):
        twice = 2 if name == "dispatch" and software.dispatcher not in ROW_PASSES else 1
        extra = _FROM_C * each if name == "experts" else 0.0
        _add_kernels(work, software, name, twice * KERNELS[name], extra)


def _add_kernels(work: Work, software: Software, part: str, kernels: float, extra: float = 0.0) -> None:
    """Kernels of one part of a layer, which the host launches unless a graph has them (step 5)."""
    work.kernels += kernels
    if part not in software.graph and "all" not in software.graph:
        work.launches += (kernels + extra) * (_OVERLAP_LAUNCHES if software.overlap else 1)


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
    """Bytes per micro-batch of tensor and context parallelism, between stages, and of weights that ZeRO 3 gathers and
    gradients that it reduces.
    """

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
    """Bytes of one MoE layer's exchanges in a micro-batch, forward and backward (step 6)."""
    own, row = layout.tokens / layout.tp, ffn.row(hidden)
    again = float(software.repeats("full", "moe"))
    etp = 4 * (layout.etp - 1) * own * ffn.top_k * row * BF16
    if layout.ep == 1:
        return Wire(intra=etp, messages=4.0 if etp else 0.0)
    nodes, within = domains(layout.ep, layout.etp, machine.domain)
    kind = SENT_AS.get(software.dispatcher, software.dispatcher)
    copies = even_copies(kind, ffn.experts, (ffn.top_k, ffn.groups, ffn.top_groups, ffn.even_groups), nodes, within)
    per_copy = own * row * (2 + again) * (software.row_bits / 8 + BF16)
    return Wire(intra=copies.intra_node * per_copy + etp, inter=copies.inter_node * per_copy, messages=4 + 2 * again)


def parallel_bytes(model: ModelShape, layout: Layout, machine: Machine, software: Software) -> Parallel:
    """Bytes per micro-batch and average stage (steps 7 to 10)."""
    context = 0.0
    for layer in model.layers:
        if isinstance(layer.mixer, Attention):
            keys = layer.mixer.kv_heads * (layer.mixer.d_qk + layer.mixer.d_v) / layout.tp
            context += layer.count / layout.pp * (layout.cp - 1) * layout.tokens * keys * software.number_bytes * 3
    near = layout.tp * layout.cp <= machine.domain
    sent = layout.tokens / layout.ranks_of("stages")
    stage = 2 * layout.vpp * sent * model.hidden * software.wide_bytes if layout.pp > 1 else 0.0
    within = _next_stage_within(layout, machine)
    return Parallel(
        tensor=_tensor_bytes(model, layout, machine, software) if layout.tp > 1 else Wire(),
        context=Wire(intra=context if near else 0.0, inter=0.0 if near else context),
        stage=Wire(intra=stage * within, inter=stage * (1 - within)),
        gathered=_over_replicas(_groups(model, layout), machine, _zero_bytes(layout, software)[0])
        if layout.zero == 3
        else Wire(),
    )


def _tensor_bytes(model: ModelShape, layout: Layout, machine: Machine, software: Software) -> Wire:
    """Step 7."""
    once = (layout.tp - 1) / layout.tp * layout.tokens * software.number_bytes
    wire = Wire()
    for layer in model.layers:
        full = 1.5 if of_layer(layer, software).repeats("full") else 1.0
        ffn, share = layer.ffn, layer.count / layout.pp
        is_wide = ffn is not None and ffn.d_shared > 0 and not (layout.over_tp is not None and ffn.shared_in_experts)
        parts = int(layer.mixer is not None and layout.ranks_of(part_of(layer.mixer)) > 1)
        parts += is_wide and layout.ranks_of("ffn") > 1
        wire = wire + Wire(intra=4 * once * model.hidden, messages=4).times(share * parts * full)
        if layout.over_tp is not None and ffn is not None and ffn.experts:
            wire = wire + Wire(intra=2 * once * model.hidden, messages=2).times(share)
    for part, numbers in (("embedding", 2 * model.hidden), ("head", model.vocab + 2 * model.hidden)):
        if layout.over_tp is not None and part in layout.over_tp:
            wire = wire + Wire(intra=once * numbers, messages=1).times(1 / layout.pp)
    far = layout.over_tp is not None and layout.tp > machine.domain
    return replace(wire, intra=0.0, inter=wire.intra) if far else wire


def _next_stage_within(layout: Layout, machine: Machine) -> float:
    """Share of the ranks with a next stage for which it is in their own domain; described layouts have none."""
    apart = layout.gpus // layout.pp
    if layout.split is None or layout.pp == 1 or apart >= machine.domain:
        return 0.0
    ranks = range(layout.gpus - apart)
    return sum(rank // machine.domain == (rank + apart) // machine.domain for rank in ranks) / len(ranks)


def step_bytes(model: ModelShape, layout: Layout, machine: Machine, software: Software) -> Step:
    """Bytes per step (step 10)."""
    groups = (dense, *_), (experts, *_) = _groups(model, layout)
    reduced = _over_replicas(groups, machine, _zero_bytes(layout, software)[1])
    owned = dense / (layout.dp * layout.cp) + experts / layout.edp
    return Step(
        reduced=reduced + _between_replicas(groups, layout, machine, software) if layout.zero == 3 else reduced,
        moments=owned * (OPTIMIZER_BYTES - _OF_MOMENTS * (1 - software.moment_bits / 32)),
        owned=owned,
    )


def _zero_bytes(layout: Layout, software: Software) -> tuple[int, int]:
    """Bytes of a weight that its group gathers and reduces in each micro-batch, and once in a step."""
    number, gradient = software.wide_bytes, software.grad_bits // 8
    if layout.zero < 3:
        return 0, gradient + BF16
    per_micro = (2 * number if layout.gather == "layer" else 0) + (gradient if layout.reduce == "each" else 0)
    return per_micro, (number if layout.gather == "step" else 0) + (gradient if layout.reduce == "last" else 0)


def stage_params(model: ModelShape, layout: Layout) -> tuple[float, float]:
    """Dense parameters and those of experts that a GPU of an average stage computes with."""
    dense, routed = model.stored
    own = dense / layout.tp if layout.over_tp is None else _dense_params(model, layout)
    return own / layout.pp, routed / (layout.ep * layout.etp * layout.pp)


def _dense_params(model: ModelShape, layout: Layout) -> float:
    """Those of all layers, embedding and head, of which a GPU has its part where tp splits them."""
    hidden, total = model.hidden, 0.0
    for layer in model.layers:
        everything, _ = layer_params(layer, hidden)
        ffn, mixer = layer.ffn, layer.mixer
        of_mixer = 0 if mixer is None else mixer.weights(hidden)
        routed = 0 if ffn is None else ffn.experts * ffn.expert_weights(hidden)
        shared = 0 if ffn is None or ffn.shared_in_experts else ffn.shared_weights(hidden)
        own = everything - routed - of_mixer - shared + shared / layout.ranks_of("ffn")
        total += layer.count * (own + (0 if mixer is None else of_mixer / layout.ranks_of(part_of(mixer))))
    tables = {"head"} if model.tied else {"embedding", "head"}
    return total + sum(model.head_weights / layout.ranks_of(table) for table in tables)


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


_Group = tuple[float, int, int]
"""Parameters, GPUs that share one copy of them, and how far these are apart."""


def _over_replicas(groups: Sequence[_Group], machine: Machine, bytes_per_param: float) -> Wire:
    """Bytes that a GPU sends when these bytes of each parameter are reduced or gathered over its replicas."""
    wire = Wire()
    for params, shards, stride in groups:
        wire = wire + _over_group(params * bytes_per_param, shards, stride, machine)
    return wire


def _between_replicas(groups: Sequence[_Group], layout: Layout, machine: Machine, software: Software) -> Wire:
    """Bytes that a GPU sends when gradients of what it owns are summed over the copies of sharded weights."""
    wire, each = Wire(), 2 * software.grad_bits // 8
    for params, shards, stride in groups:
        wire = wire + _over_group(each * params / shards, layout.replicas, stride * shards, machine)
    return wire


def _groups(model: ModelShape, layout: Layout) -> tuple[_Group, _Group]:
    """Of dense weights and of experts."""
    dense, experts = stage_params(model, layout)
    experts *= padding(model, layout)
    return (
        (dense, max(1, layout.dp * layout.cp // layout.replicas), layout.tp),
        (experts, max(1, layout.edp // layout.replicas), layout.ep * layout.etp),
    )


def _over_group(once: float, size: int, stride: int, machine: Machine) -> Wire:
    """Bytes that a GPU sends of `once` bytes that a group of `size` GPUs, `stride` apart, reduces or gathers."""
    nodes, within = domains(size, min(stride, machine.domain), machine.domain)
    return Wire(intra=once * (within - 1) / within, inter=once / within * (nodes - 1) / nodes)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """body: layers of an average stage. head: the output head. wire: exchanges of an average stage. parallel: bytes of
    tensor, context and pipeline parallelism and of gathered weights. step: bytes once per step. num_micro:
    micro-batches of a step. bubble: idle ones. stages, layers: over which the body was averaged. split: as of `Layout`.
    sent_again, computed_again: of the layers with experts, the share whose exchanges and whose experts backward does
    again.
    """

    body: Work
    head: Work
    wire: Wire
    parallel: Parallel
    step: Step
    num_micro: int
    bubble: float
    stages: int
    layers: int
    split: tuple[tuple[int, ...], int] | None
    sent_again: float
    computed_again: float


def count(model: ModelShape, layout: Layout, machine: Machine, software: Software) -> Counts:
    """The counts of one GPU."""
    body, wire = Work(), Wire()
    experts, sent, computed = 0, 0, 0
    for layer in model.layers:
        share = layer.count / layout.pp
        body.add(layer_work(layer, model.hidden, layout, software), share)
        if layer.ffn is not None and layer.ffn.experts:
            again = of_layer(layer, software)
            wire = wire + dispatch_bytes(layer.ffn, model.hidden, layout, machine, again).times(share)
            experts += layer.count
            sent += layer.count * again.repeats("full", "moe")
            computed += layer.count * again.repeats("full", "all_but_exchanges", "moe", "experts")
    heads = 1 + sum(layer.count for layer in model.layers if layer.mtp)
    return Counts(
        body=body,
        head=head_work(model.hidden, model.vocab, layout, software, heads),
        wire=wire,
        parallel=parallel_bytes(model, layout, machine, software),
        step=step_bytes(model, layout, machine, software),
        num_micro=layout.num_micro,
        bubble=_bubble(model, layout, software),
        stages=layout.pp,
        layers=sum(layer.count for layer in model.layers),
        split=layout.split,
        sent_again=sent / max(1, experts),
        computed_again=computed / max(1, experts),
    )


def _bubble(model: ModelShape, layout: Layout, software: Software) -> float:
    if layout.pp == 1:
        return 0.0
    if planned := SCHEDULES.get(software.schedule):
        again = [
            layer.count for layer in model.layers if of_layer(layer, software).repeats("full", "all_but_exchanges")
        ]
        backward = 2 + sum(again) / sum(layer.count for layer in model.layers)
        return planned.waits(layout.pp, layout.vpp, layout.num_micro, backward)
    if software.schedule == "dualpipe":
        return (layout.pp / 2 - 1) * (3 + 2 - 3) / 3
    return (layout.pp - 1) / layout.vpp
