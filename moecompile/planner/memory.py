"""Memory of the fullest rank, bytes.

P_d, P_e, P_r: dense, expert and router parameters of the model; b: bytes of a stored weight; a: bytes per element of a
weight in compute, an activation and a row (2 with trainer.precision=bf16_params); T: tokens per micro-batch; D, F, E, K
as in params.py; V: vocabulary.

1. Parameters that a rank stores.
       own = P_d / (dp_shard cp) + P_e / (ep edp_shard) + P_r                 routers are replicated -> `_own_params`
   More of P_e if no dim of a stack of experts is a multiple of edp_shard.                         -> shards.py
   With tp, those of P_d that the tp_plan splits and the shared experts are divided by tp too.
2. Parameters that FSDP gathers. It frees a layer before it gathers the next, but keeps the root (embeddings, head,
   norm):
       unsharded = root + max over layers of (dense part of the layer + E / ep experts)        -> `_unsharded_params`
   On one rank nothing is gathered. Unsharded gradients are in a buffer of the same size until they are reduced. With
   gradient accumulation they are reduced once, after the last micro-batch, and those of all weights are kept until
   then in fp32: P_d + P_e / ep.                                                         -> `_unsharded_grads_bytes`
       weights = b own + a unsharded,  grads = max(b own, unsharded grads),  optimizer: optimizer.py
   Router weights and adapters are always fp32. Frozen weights have no gradients and no moments: for these two, `own`
   counts trained parameters only (adapters, if there are any), and their number also limits the unsharded gradients.
                                                                                             -> `trained_params`
3. Activations that one forward saves for backward, and what a layer's backward needs: activations.py.
4. Exchange buffers, allocated in one layer at a time: rows sent and rows received.
       dispatch = max over layers of 2 T copies D a
   Slots for borrowed experts are counted here too.                                               -> lending.py

5. With accumulation, unsharded gradients are there at the activations' peak. Without, the reduced ones of the last step
   are there until backward begins, and those of this step grow as what was kept is freed:     -> `together`
       fullest = grads + activations                                                       with accumulation
       fullest = max(grads + kept + 2/3 loss, max(grads, kept) + max(loss, layers))        without
Routing is balanced, except for the total with `UNEVEN` times the mean rows on a rank. The process itself (PyTorch, CUDA
context, allocator fragmentation) is not counted. benchmarks/memory.py compares this with what ranks use.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil

from moecompile.mesh import MeshSpec, Part
from moecompile.plan import LayerPlan, MemoryEstimate
from moecompile.planner.activations import FP32_BYTES, Activations, activations, exchanged, row_load, tokens_of_a_rank
from moecompile.planner.lending import lending
from moecompile.planner.optimizer import muon_params, state_bytes
from moecompile.planner.params import ModelFacts, ModelParams, RunFacts, layer_params, model_params, trained_params
from moecompile.planner.shards import expert_share, padded_experts

UNEVEN = 2.0


def memory_of_fullest_rank(
    layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts
) -> MemoryEstimate:
    """The estimate in the module docstring."""
    weights, grads, optimizer = model_state_bytes(layers, mesh, facts, run)
    made = activations(layers, mesh, facts, run)
    return MemoryEstimate(
        weights=weights,
        grads=grads,
        optimizer=optimizer,
        activations=made.peak,
        dispatch=buffer_bytes(layers, mesh, run),
        apart=grads + made.peak - together(grads, made, run),
    )


def together(grads: int, made: Activations, run: RunFacts) -> int:
    """Bytes of gradients and activations at their fullest moment (step 5)."""
    if run.accumulation > 1:
        return grads + made.peak
    return round(max(grads + made.kept + made.loss * 2 / 3, max(grads, made.kept) + max(made.loss, made.layers)))


def model_state_bytes(
    layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts
) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer (steps 1 and 2); of `run`, tokens do not matter."""
    params, trained = model_params(layers, facts), trained_params(layers, facts)
    muon = muon_params(layers, mesh, facts, run.optimizer, trained)
    share = expert_share(layers, mesh)
    trained_share = share if facts.adapters is None else expert_share(layers, mesh, adapters_only=True)
    own, own_trained = _own_params(params, mesh, share), _own_params(trained, mesh, trained_share)
    number, stored = _trained_bytes(facts), own * facts.bytes_per_param + params.router * FP32_BYTES
    if facts.adapters is not None:
        stored += own_trained * (number - facts.bytes_per_param) + trained.router * FP32_BYTES
    return (
        stored + _unsharded_params(layers, mesh, facts) * run.compute_bytes,
        max(own_trained * number, _unsharded_grads_bytes(trained, layers, mesh, facts, run))
        + trained.router * FP32_BYTES,
        state_bytes(own_trained, trained.router, muon, mesh, trained_share),
    )


def buffer_bytes(layers: Sequence[LayerPlan], mesh: MeshSpec, run: RunFacts) -> int:
    """Bytes of buffers of an exchange (step 4)."""
    rows = max((exchanged(layer, mesh) * (1 + row_load(layer, run)) / 2 for layer in layers), default=0)
    lent = lending(layers, run)
    return round(tokens_of_a_rank(mesh, run) * run.compute_bytes * rows) + (0 if lent is None else lent.slot_bytes)


def _own_params(params: ModelParams, mesh: MeshSpec, share: Fraction) -> int:
    """Sharded parameters that one rank stores (step 1), without routers, which are replicated. share: of experts."""
    split = params.split_root + params.split_layers + params.shared if mesh.axes(Part.WEIGHTS) else 0
    split = min(params.dense, split)
    dense = mesh.share(params.dense - split, Part.STORED) + mesh.share(split, Part.STORED, Part.WEIGHTS)
    return dense + ceil(params.experts * share)


def _trained_bytes(facts: ModelFacts) -> int:
    """Bytes of a stored number that is trained."""
    return facts.bytes_per_param if facts.adapters is None else max(FP32_BYTES, facts.bytes_per_param)


def _unsharded_params(layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts) -> int:
    """Parameters that are unsharded at the same time (step 2)."""
    if mesh.world_size == 1:
        return 0
    counts, params = [layer_params(layer) for layer in layers], model_params(layers, facts)
    in_layers = facts.params_total - facts.params_embedding - sum(c.dense for c in counts)
    in_layers -= params.split_layers - mesh.share(params.split_layers, Part.WEIGHTS)
    root = facts.params_embedding - params.split_root + mesh.share(params.split_root, Part.WEIGHTS)
    largest = max((c.shared + padded_experts(layer, mesh) for layer, c in zip(layers, counts, strict=True)), default=0)
    return root + -(-in_layers // max(1, facts.num_layers, len(layers))) + largest


def _unsharded_grads_bytes(
    trained: ModelParams, layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts
) -> int:
    """Bytes of gradients before they are reduced (step 2)."""
    split = min(trained.dense, trained.split_root + trained.split_layers)
    all_grads = trained.dense - split + mesh.share(split, Part.WEIGHTS) + mesh.share(trained.experts, Part.EXPERTS)
    if mesh.world_size == 1 or run.accumulation == 1:
        number = run.compute_bytes if facts.adapters is None else FP32_BYTES
        return min(all_grads, _unsharded_params(layers, mesh, facts)) * number
    return all_grads * FP32_BYTES
