"""Memory of one GPU under a described layout, bytes, by kind. There is no fitted constant here.

The plan's own estimate (planner/memory.py) is that of what this package runs. This one is of layouts as other systems
run them: mixed precision with fp32 gradients and fp32 master weights, and what each part of a layer keeps for backward.

1. States. A weight takes 2 bytes (4 in fp32), its gradient 4 or 2, its optimizer 4 for the master weight (none in fp32,
   where the weight is it) and two moments of 4, 2 or 1. ZeRO 1 shards the optimizer over replicas, ZeRO 3 all three,
   and then two layers are whole at a time. DualPipe keeps two stages per GPU.                        -> `_states`
2. A token of one layer keeps, in numbers of 16 bits, or of 8 where a product in 8 bits reads them:
       mixer     inputs of norm and projections 2 D; latents; queries, keys, values, outputs (1 / tp); a scan's width
       dense     inputs of norm and projections 2 D; hidden numbers before and after the activation (n + 1) F / tp
       experts   2 D; K rows as they arrive, and their hidden numbers before and after the activation, K (n + 1) F;
                 router scores in fp32
   What is recomputed is not kept (an activation's input is then kept in the numbers of the product). `full` keeps the
   layer's input alone, `all_but_exchanges` also the rows.
                                                                                                   -> `_kept`
3. Micro-batches in flight on the first stage: pp of 1F1B, pp + (pp - 1) / vpp interleaved, pp + 1 of DualPipe; on the
   last stage one, with its logits (bf16) and their fp32 softmax and gradient. The larger one counts; with recomputation
   one layer is whole.                                                                           -> `_activations`
4. Rows that one layer sends and receives.                                                         -> `_rows`

The process itself (CUDA context, workspaces, fragmentation) is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from moecompile.planner.cost_model.counts import BF16, FP32, padding, stage_params
from moecompile.planner.cost_model.inputs import Layout, Software
from moecompile.planner.cost_model.shapes import Attention, Experts, Layer, ModelShape, layer_params

LOGIT_BYTES = BF16 + 2 * FP32


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU, of the fullest stage."""

    weights: float
    grads: float
    optimizer: float
    activations: float
    rows: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.grads + self.optimizer + self.activations + self.rows


def memory_of(model: ModelShape, layout: Layout, software: Software) -> Memory:
    """Memory of the fullest GPU."""
    weights, grads, optimizer = _states(model, layout, software)
    return Memory(
        weights=weights, grads=grads, optimizer=optimizer, activations=_activations(model, layout, software),
        rows=max((_rows(layer.ffn, model.hidden, layout) for layer in model.layers if layer.ffn), default=0.0),
    )  # fmt: skip


def _states(model: ModelShape, layout: Layout, software: Software) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer (step 1)."""
    dense, experts = stage_params(model, layout)
    twice = 2 if software.schedule == "dualpipe" and layout.pp > 1 else 1
    number = FP32 if software.bits > 16 else BF16
    grad, moments = software.grad_bits / 8, 2 * software.moment_bits / 8 + (0 if number == FP32 else FP32)
    shards_dense, shards_experts = (max(1, n // layout.replicas) for n in (layout.dp * layout.cp, layout.edp))
    held = (dense + experts) * twice
    owned = (dense / shards_dense + experts * padding(model, layout) / shards_experts) * twice
    if layout.zero < 3:
        return held * number, held * grad, (owned if layout.zero else held) * moments
    whole = 2 * max(_layer_params(layer, model.hidden, layout) for layer in model.layers) * (owned < held)
    return (owned + whole) * number, (owned + whole) * grad, owned * moments


def _layer_params(layer: Layer, hidden: int, layout: Layout) -> float:
    """Parameters of one layer on a GPU, before ZeRO."""
    everything, _ = layer_params(layer, hidden)
    routed = layer.ffn.experts * layer.ffn.expert_weights(hidden) if layer.ffn else 0
    return (everything - routed) / layout.tp + routed / (layout.ep * layout.etp)


def _activations(model: ModelShape, layout: Layout, software: Software) -> float:
    """Step 3."""
    own = layout.tokens / layout.tp
    kept = sum(layer.count * _kept(layer, model.hidden, software) for layer in model.layers) * own / layout.pp
    layers = sum(layer.count for layer in model.layers)
    kept *= ceil(layers / layout.pp) * layout.pp / layers  # the fullest stage has whole layers
    again = 0.0
    if software.repeats("full", "all_but_exchanges"):
        whole = Software(bits=software.bits, dispatcher=software.dispatcher)
        again = max(_kept(layer, model.hidden, whole) for layer in model.layers) * own
    logits = LOGIT_BYTES * model.vocab * own
    return max(kept * in_flight(layout, software), kept + logits) + again


def in_flight(layout: Layout, software: Software) -> float:
    """Micro-batches whose activations the first stage keeps (step 3)."""
    if layout.pp == 1:
        return 1.0
    if software.schedule == "dualpipe":
        return min(layout.num_micro, layout.pp + 1)
    return min(layout.num_micro, layout.pp + (layout.pp - 1) / layout.vpp * (layout.vpp > 1))


def _kept(layer: Layer, hidden: int, software: Software) -> float:
    """Bytes that a layer keeps of each token of a GPU (step 2)."""
    if software.repeats("full"):
        return hidden * BF16
    if software.repeats("all_but_exchanges"):
        sent = layer.ffn.top_k * layer.ffn.row(hidden) if layer.ffn else 0
        return (hidden + 2 * sent) * BF16
    return _kept_of_mixer(layer, hidden, software) + _kept_of_ffn(layer.ffn, hidden, software)


def _kept_of_mixer(layer: Layer, hidden: int, software: Software) -> float:
    mixer = layer.mixer
    if mixer is None:
        return 0.0
    normed = 0 if software.repeats("layernorm") else hidden
    if software.repeats("attention"):
        return hidden * BF16
    wide = mixer.width
    latents = 0
    if isinstance(mixer, Attention):
        latents = mixer.q_rank + mixer.kv_rank + mixer.d_rope
        if software.repeats("mla_up_proj"):
            wide = mixer.heads * mixer.d_v
    return (hidden + latents + wide) * _number(software) + normed * _read(software)


def _kept_of_ffn(ffn: Experts | None, hidden: int, software: Software) -> float:
    if ffn is None:
        return 0.0
    normed = 0 if software.repeats("layernorm") else hidden
    number, read, moe = _number(software), _read(software), software.repeats("moe")
    if software.repeats("mlp") and not ffn.experts:
        return hidden * number
    always = 0.0 if moe else ffn.d_shared * (ffn.num_in * number + read)
    kept = hidden * number + normed * read + always
    if not ffn.experts or moe:
        return kept
    hidden_row = ffn.num_in * read if software.repeats("moe_act") else ffn.num_in * number + read
    per_row = ffn.row(hidden) * read + ffn.d_expert * hidden_row
    return kept + ffn.top_k * per_row + 2 * ffn.experts * FP32


def _rows(ffn: Experts, hidden: int, layout: Layout) -> float:
    if layout.ep * layout.etp == 1:
        return 0.0
    return 2 * layout.tokens / layout.tp * ffn.top_k * ffn.row(hidden) * BF16


def _number(software: Software) -> int:
    """Bytes of a kept number."""
    return FP32 if software.bits > 16 else BF16


def _read(software: Software) -> float:
    """Bytes of a kept number that only a product reads."""
    return max(8, software.bits) / 8
