"""What one layer makes a GPU do in a micro-batch: operations, bytes, kernels. There is no fitted constant here.

T tokens of a micro-batch of a replica (micro_batch * seq / cp); a GPU has t = T / tp of them outside attention.

1. Products with weights are split over tp. Forward, the gradient of inputs and the gradient of weights have as many
   operations each. Every product reads both operands in the numbers of the recipe (bits) and writes bf16; the fp32
   gradient of a weight is read and written.                                                       -> `add_product`
2. Attention executes whole tiles: a window of w costs w + 2 * 128 keys, and a head of fewer than 128 numbers as much as
   one of 128, because the exponentials of its scores take the time. Its backward has 2.5 times the operations, because
   scores are computed again.                                                                      -> `add_mixer`
3. Experts: t K rows on every GPU if the load is even; the weights of each local expert are read in each pass.
                                                                                                   -> `add_experts`
4. Passes over memory outside products, forward and backward, in tensors of a token's width (tables below). Products in
   8 or 4 bits need their inputs and output gradients quantized: bf16 is read and two layouts are written; 4 bits read
   three times (largest value, rotation, rounding).                                                -> `quantized`
5. Kernels, and those of them that the host launches one by one, because no CUDA graph replays them.

Legend: t tokens, D model dim, F hidden numbers of an expert, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

from moecompile.planner.foresight.layout import Layout, Software
from moecompile.planner.foresight.shapes import Attention, Experts, Layer, Scan

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
# Numbers of F per row: one fused kernel each way (SwiGLU); relu, square, an fp32 weight and a cast; for clamped gates
# with biases two bias additions, two clamps, scale, sigmoid, addition and three products, each op with its backward.
ACTIVATION_PASSES = {"swiglu": 12, "relu2": 26, "clamped": 70}
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
_FROM_C = 0.2  # a launch from a library's loop over experts, in launches from Python
_OVERLAP_LAUNCHES = 1.5  # forwards and backwards that alternate are cut into parts, each with events and streams


@dataclass(kw_only=True)
class Work:
    """What a GPU does. dense: operations of products in the recipe's numbers; narrow: of those that stay in bf16 (head,
    router); shared: those of `dense` that belong to shared experts; grouped: of experts; core, scan: of attention and
    scans. operands, stacks: bytes that dense and grouped products move; passes: bytes outside products. groups:
    products of single experts. kernels: on the GPU; launches: those that the host makes.
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
    work = Work()
    if layer.mixer is not None:
        add_mixer(work, layer.mixer, hidden, layout, software)
    if layer.ffn is not None:
        _add_always(work, layer, hidden, layout, software)
        if layer.ffn.experts:
            add_experts(work, layer.ffn, hidden, layout, software)
    return work


def head_work(hidden: int, vocab: int, layout: Layout, heads: int) -> Work:
    """The output head and the loss, of `heads` predictions."""
    work = Work()
    add_product(work, heads * hidden * vocab, layout.tokens, layout, narrow=True)
    work.passes = heads * LOGIT_BYTES * vocab * layout.tokens / layout.tp
    return work


def add_product(
    work: Work, weights: float, tokens: float, layout: Layout, *, bits: int = 16, again: float = 0, narrow: bool = False
) -> None:
    """A product of `tokens` rows with `weights` numbers (step 1); again: forwards that are repeated."""
    weights = weights / layout.tp
    flops = 2 * weights * tokens * (PASSES + again)
    work.dense += 0 if narrow else flops
    work.narrow += flops if narrow else 0
    work.operands += weights * (2 * bits / 8 + 2 * FP32)


def moved(d_in: float, d_out: float, bits: int, again: float) -> float:
    """Bytes per row that a product's three passes read and write."""
    small = bits / 8
    return (1 + again) * (d_in * small + d_out * BF16) + (d_out * small + d_in * BF16) + (d_in + d_out) * small


def quantized(d_in: float, d_out: float, bits: int) -> float:
    """Bytes per row that quantize a product's input and output gradient (step 4)."""
    reads = 3 if bits < 8 else 1
    return (reads * BF16 + 2 * bits / 8) * (d_in + d_out) if bits < 16 else 0.0


def add_mixer(work: Work, mixer: Attention | Scan, hidden: int, layout: Layout, software: Software) -> None:
    """Attention or a scan, with its norm."""
    bits, own = software.bits, layout.tokens / layout.tp
    again = 1.0 if software.repeats("full", "all_but_exchanges", "attention") else 0.0
    normed = max(again, float(software.repeats("layernorm")))
    work.passes += NORM_PASSES * hidden * BF16 * (1 + normed / PASSES) * own
    work.passes += quantized(hidden, mixer.width, bits) * own
    work.operands += own * moved(2 * hidden * layout.tp, mixer.width, bits, again)
    if isinstance(mixer, Attention):
        ups = mixer.up_weights(hidden) / mixer.weights(hidden) if software.repeats("mla_up_proj") else 0.0
        add_product(work, mixer.weights(hidden), layout.tokens, layout, bits=bits, again=max(again, ups))
        work.core += executed_flops(mixer, layout.seq) * (1 + ATTENTION_BACKWARD + again) * own
        work.passes += mixer.width * MIXER_PASSES * BF16 * own
        kernels, name = KERNELS["attn"] + (KERNELS["mla"] if mixer.kv_rank else 0), "attn"
    else:
        add_product(work, mixer.weights(hidden), layout.tokens, layout, bits=bits, again=again)
        work.scan += mixer.core_flops(layout.seq) * (PASSES + again) * own
        work.passes += mixer.width * SCAN_PASSES * BF16 * own
        kernels, name = KERNELS["mamba"], "mamba"
    _add_kernels(work, software, name, kernels + QUANTIZE_KERNELS * (bits < 16))


def executed_flops(mixer: Attention, seq: int) -> float:
    """Forward operations per token that a kernel of attention executes (step 2)."""
    keys = min(mixer.mean_keys(seq) + (2 * TILE if mixer.window else 0), (seq + 1) / 2)
    return 2 * mixer.heads * (max(mixer.d_qk, TILE) + max(mixer.d_v, TILE)) * keys


def _add_always(work: Work, layer: Layer, hidden: int, layout: Layout, software: Software) -> None:
    """What every token uses: norm, dense or shared experts, router."""
    ffn, own, bits = layer.ffn, layout.tokens / layout.tp, software.bits
    assert ffn is not None
    again = float(software.repeats("full", "all_but_exchanges", "moe" if ffn.experts else "mlp"))
    joint = 2 * hidden * hidden if layer.mtp else 0
    add_product(work, ffn.shared_weights(hidden) + joint, layout.tokens, layout, bits=bits, again=again)
    wide = (ffn.num_in + 1) * ffn.d_shared
    if ffn.experts:
        work.shared += 2 * (ffn.num_in + 1) * hidden * ffn.d_shared / layout.tp * layout.tokens * (PASSES + again)
    work.operands += own * moved(2 * hidden * layout.tp, wide, bits, again) * (wide > 0)
    work.passes += (ACTIVATION_PASSES[ffn.activation] * ffn.d_shared * BF16 + quantized(hidden, wide, bits)) * own
    normed = max(again, float(software.repeats("layernorm")))
    work.passes += NORM_PASSES * hidden * BF16 * (1 + normed / PASSES) * own
    if ffn.experts:
        add_product(work, ffn.router_weights(hidden), layout.tokens, layout, narrow=True, again=again)
        work.passes += ROUTER_PASSES * ffn.experts * FP32 * own
    else:
        _add_kernels(work, software, "dense", KERNELS["dense"] + QUANTIZE_KERNELS * (bits < 16))


def add_experts(work: Work, ffn: Experts, hidden: int, layout: Layout, software: Software) -> None:
    """Routed experts, their permutation and their router's kernels (step 3), with an even load."""
    rows, local, bits = layout.tokens / layout.tp * ffn.top_k, ffn.experts / layout.ep, software.bits
    again = float(software.repeats("full", "all_but_exchanges", "moe"))
    weights, row = ffn.expert_weights(hidden), ffn.row(hidden)
    work.grouped += 2 * rows * weights * (PASSES + again)
    work.stacks += local * weights / layout.etp * ((2 + again) * bits / 8 + 2 * FP32)
    gathered, width = rows * layout.etp, ffn.d_expert / layout.etp
    work.stacks += gathered * (moved(row, ffn.num_in * width, bits, again) + moved(width, row, bits, again))
    # The second half of the passes is over rows that were gathered over etp.
    passes = ROW_PASSES.get(software.dispatcher, FLAT_ROW_PASSES) * row * BF16 * (1 + layout.etp) / 2
    if not software.fused:
        again_act = max(again, float(software.repeats("moe_act")))
        passes += ACTIVATION_PASSES[ffn.activation] * ffn.d_expert * BF16 * (1 + again_act / PASSES)
        passes += quantized(2 * row, (ffn.num_in + 1) * ffn.d_expert, bits)
    work.passes += passes * rows * (1 + again / PASSES)
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
