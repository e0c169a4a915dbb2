"""Activations that a forward saves for backward, bytes on one rank.

a: bytes of an activation; T: tokens per micro-batch; D, F (of an expert), E, K as in params.py; S: width of the shared
expert; n: projections before the activation, 2 for gated, 1 for up_down; V: vocabulary.

1. One layer, without its input.
       dense FFN      = a T 2 n d_ff                                 into and out of the activation
       MoE, unfused   = a T (K (2 D + 2 n F) + 2 n S + 2 E)          rows in and out, hidden rows; router logits, scores
       MoE, fused     = b K T 2 F + a T 2 n S + T (4 E + 36 K + 12)  what precedes the activation; fp32 scores; ids,
                        + x                                          sources, order and weights of the assignments
   b: bytes per element in the experts (2 under autocast). Padding rows of bf16 on some CPUs, 1/64 to 1/16, are left
   out. x: copies of the input. Our router reads it in fp32, which is a copy if the input is narrower (4 T D); under
   autocast, experts read it in bf16 (2 T D), and bf16 copies of their weights are kept (2 * 3 D F E / ep). With
   exchanges, the received rows are kept in the dtype that experts read: b T D copies.           -> `moe_bytes`
2. All layers. c = 12 numbers per element of the residual stream are assumed for norms, attention, residuals and the
   FFN's input: 10 to 11 were counted for Llama and Qwen3 and 6 for OPT; multi-head latent attention (DeepSeek) needs
   up to 30.
       activations = sum over layers of (a T c D + layer) + 3 a T V    logits, their log-softmax, their gradient
       with checkpointing = sum over layers of (a T D + kept) + max over layers of (a T c D + layer) + 3 a T V
       kept        = 2 copies D of an MoE layer with keep_exchanges: rows received in dispatch and combine; else 0
                                                                                                 -> `activation_bytes`
3. Where exchanges are in flight, weight gradients are computed after those of the rows (passes/collect.py). What they
   need is kept until then, in backward, one layer at a time; this is added to both:
       fused   = b T (K F + copies D)            gradients of the hidden rows and of the partial sums
       unfused = a T K (n F + D)                 gradients of the rows into and out of the activation  -> `left_bytes`
Routing is assumed to be balanced: a rank's experts get K T rows. Dense layers are assumed to have the D and d_ff of the
widest planned site.
"""

from __future__ import annotations

from collections.abc import Sequence

from moecompile.mesh import MeshSpec
from moecompile.plan import FFNSite, LayerPlan
from moecompile.planner.params import BF16_BYTES, ModelFacts, RunFacts
from moecompile.planner.traffic import copies_per_token

FP32_BYTES = 4
RESIDUAL_NUMBERS = 12  # c in step 2
LOGITS_COPIES = 3
ASSIGNMENT_BYTES = 36  # ids, sources and order int64, sources again int32, weights in both orders fp32
TOKEN_BYTES = 12  # saved by the normalization of the weights


def activation_bytes(layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts) -> int:
    """Step 2."""
    num_layers, number = max(facts.num_layers, len(layers)), run.compute_bytes * run.tokens_per_rank
    d_model = max((layer.site.d_model for layer in layers), default=0)
    dense = max((2 * layer.site.num_in_projections * layer.site.d_ff for layer in layers), default=0)
    moe = [moe_bytes(layer, mesh, run) for layer in layers]
    saved = [RESIDUAL_NUMBERS * d_model * number + ffn for ffn in moe + [dense * number] * (num_layers - len(layers))]
    logits = LOGITS_COPIES * facts.vocab_size * number
    total = logits + sum(saved)
    if run.checkpointing != "none":
        kept = sum(exchanged(layer, mesh) for layer in layers) if run.checkpointing == "keep_exchanges" else 0
        recomputed = logits + (num_layers * d_model + kept) * number + max(saved, default=0)
        total = min(total, recomputed)
    return round(total + max((left_bytes(layer, mesh, run) for layer in layers), default=0))


def moe_bytes(layer: LayerPlan, mesh: MeshSpec, run: RunFacts) -> float:
    """Step 1, for an MoE layer."""
    site, experts, top_k, tokens = layer.site, layer.experts, layer.routing.top_k, run.tokens_per_rank
    hidden = 2 * site.num_in_projections
    if not layer.fused:
        routed = top_k * (2 * site.d_model + hidden * experts.d_expert)
        return run.compute_bytes * tokens * (routed + hidden * experts.d_shared + 2 * experts.num_routed)
    narrow = BF16_BYTES if run.is_mixed else run.compute_bytes
    saved = narrow * top_k * tokens * 2 * experts.d_expert + run.compute_bytes * tokens * hidden * experts.d_shared
    saved += tokens * (FP32_BYTES * experts.num_routed + ASSIGNMENT_BYTES * top_k + TOKEN_BYTES)
    if isinstance(site, FFNSite) and run.compute_bytes < FP32_BYTES:
        saved += FP32_BYTES * tokens * site.d_model
    if run.is_mixed:
        saved += BF16_BYTES * 3 * site.d_model * experts.d_expert * layer.placement.experts_per_rank
    if layer.dispatch.exchanges:
        return saved + narrow * tokens * exchanged(layer, mesh) / 2
    return saved + (narrow * tokens * site.d_model if run.is_mixed else 0)


def left_bytes(layer: LayerPlan, mesh: MeshSpec, run: RunFacts) -> float:
    """Step 3."""
    if not layer.dispatch.in_flight:
        return 0
    top_k, d_expert = layer.routing.top_k, layer.experts.d_expert
    number = run.tokens_per_rank * (BF16_BYTES if run.is_mixed else run.compute_bytes)
    if layer.fused:
        return number * (top_k * d_expert + exchanged(layer, mesh) / 2)
    return number * top_k * (layer.site.num_in_projections * d_expert + layer.site.d_model)


def exchanged(layer: LayerPlan, mesh: MeshSpec) -> float:
    """Elements per token that the exchanges of one layer move in dispatch and combine."""
    if not layer.dispatch.exchanges:
        return 0
    copies = copies_per_token(layer.dispatch.kind, layer.placement, layer.routing, mesh)
    return 2 * (copies.own + copies.intra_node + copies.inter_node) * layer.site.d_model
