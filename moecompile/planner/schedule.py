"""When FSDP gathers weights and reduces gradients, and what is computed again: memory of a rank against its links.

Of what it shards, a rank receives in a step of M micro-batches                                    -> `weight_traffic`
       weights      gather=layer   M (2 layers + root)       each layer before its forward and before its backward
                    gather=step    layers + root             all stay whole until the last backward
       gradients    reduce=each    M trained weights         in fp32 or wider
                    reduce=last    trained weights           until then a rank has those of whole layers, in fp32
       replicas     all-reduce of its own shards, once a step in any case
layers, root: (r - 1) / r of a weight that r ranks share. Stacks of experts are padded, as in shards.py.

`auto`: the ways in the order of these bytes; with checkpointing=auto first all of them with keep_exchanges, then with
full, which sends the exchanges of forward again. The first with which the plan fits at the load that is to be expected
is taken. If none fits, the one with the least memory at that load.                                        -> `choose`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from moecompile.mesh import MeshSpec, Part
from moecompile.plan import GATHER, REDUCE, LayerPlan, WeightTraffic
from moecompile.planner.memory import own_params, whole_params
from moecompile.planner.params import (
    AUTO,
    CHECKPOINTING,
    FP32_BYTES,
    ModelFacts,
    RunFacts,
    model_params,
    trained_params,
)
from moecompile.planner.shards import expert_share, padded_experts


def weight_traffic(
    layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts
) -> WeightTraffic | None:
    """What FSDP sends in a step, as the module docstring says; None if no weight is on several ranks."""
    if mesh.world_size == 1:
        return None
    params, trained, share = model_params(layers, facts), trained_params(layers, facts), expert_share(layers, mesh)
    in_layers, root = whole_params(layers, mesh, facts)
    own, own_root = own_params(params, mesh, share), mesh.share(root, Part.STORED)
    layer, root = in_layers - (own - own_root), root - own_root
    once, micro = layer + root, run.accumulation * (2 * layer + root)
    own_trained = own_params(trained, mesh, share)
    reductions = run.accumulation if run.reduce == "each" else 1
    copies = mesh.size("dp_replicate")
    return WeightTraffic(
        gathered=(once if run.gather == "step" else micro) * run.compute_bytes,
        reduced=max(0, _whole_grads(layers, mesh, facts) - own_trained) * FP32_BYTES * reductions,
        replicas=2 * (copies - 1) * own_trained * FP32_BYTES // copies,
    )


def _whole_grads(layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts) -> int:
    """Numbers of the gradients of one micro-batch on a rank, before they are reduced."""
    params, trained = model_params(layers, facts), trained_params(layers, facts)
    split = min(trained.dense, trained.split_root + trained.split_layers)
    dense = trained.dense - split + mesh.share(split, Part.WEIGHTS)
    padded = sum(padded_experts(layer, mesh) for layer in layers)
    return dense + (round(padded * trained.experts / params.experts) if params.experts else 0)


def ways(layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts) -> list[RunFacts]:
    """The runs that `auto` allows, in the order in which they are tried; one, if nothing is `auto`."""

    def sent(each: RunFacts) -> int:
        traffic = weight_traffic(layers, mesh, facts, each)
        return 0 if traffic is None else traffic.gathered + traffic.reduced

    checkpointing = CHECKPOINTING if run.checkpointing == AUTO else (run.checkpointing,)
    # Where nothing is sent, or nothing is accumulated, what stands first here is taken.
    reduce = tuple(reversed(REDUCE)) if run.reduce == AUTO else (run.reduce,)
    gather = GATHER if run.gather == AUTO else (run.gather,)
    if mesh.world_size == 1:
        reduce, gather = reduce[:1], gather[:1]
    synced = [replace(run, reduce=when, gather=how) for when in reduce for how in gather]
    synced.sort(key=sent)
    return [replace(each, checkpointing=what) for what in checkpointing for each in synced]


def choose(tried: Sequence[RunFacts], needed: Callable[[RunFacts], float], limit: float) -> RunFacts:
    """The first that needs at most `limit` bytes, or the one that needs the least.

    Args:
        needed: bytes of the fullest rank at the load that is to be expected.
    """
    if len(tried) == 1:
        return tried[0]
    return next((each for each in tried if needed(each) <= limit), None) or min(tried, key=needed)
