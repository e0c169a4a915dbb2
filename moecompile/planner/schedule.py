"""When FSDP gathers weights and reduces gradients, and what is computed again: memory of a rank against its links.

Of what it shards, a rank receives in a step of M micro-batches                                    -> `weight_traffic`
       weights      gather=layer   M (2 layers + root)       each layer before its forward and before its backward
                    gather=step    layers + root             all stay whole until the last backward
       gradients    reduce=each    M trained weights         in fp32 or wider
                    reduce=last    trained weights           until then a rank has those of whole layers, in fp32
       replicas     all-reduce of its own shards, once a step in any case
layers, root: (r - 1) / r of a weight that r ranks share, padded as in shards.py.

`auto`: the ways in the order of these bytes; with checkpointing=auto first all of them with keep_exchanges, then with
full, which sends the exchanges of forward again. The first with which the plan fits at the load that is to be expected
is taken. If none fits, the one with the least memory at that load.                                        -> `choose`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

from moecompile.mesh import MeshSpec, Part
from moecompile.plan import GATHER, REDUCE, LayerPlan, WeightTraffic, reductions
from moecompile.plan.plan import DENSE
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
from moecompile.planner.shards import expert_share, padded_experts, padding


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """layers, root, grads: numbers that a rank receives when FSDP gathers all layers, and the root, and when it reduces
    all gradients. owned: trained numbers that it stores. replicas: ranks that store the same.
    """

    layers: int
    root: int
    grads: int
    owned: int
    replicas: int


def sharded(layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts) -> Sharded:
    """What FSDP shards of a model, as the module docstring says."""
    params, trained, share = model_params(layers, facts), trained_params(layers, facts), expert_share(layers, mesh)
    in_layers, root = whole_params(layers, mesh, facts)
    own, owned = (own_params(layers, mesh, facts, share, trained=trained) for trained in (False, True))
    own_root, summed = mesh.share(root, Part.STORED), next(r for r in reductions(mesh) if r.parameters == DENSE)
    split = min(trained.dense, trained.split_root + trained.split_layers)
    added = padding(layers, mesh, facts)
    dense = trained.dense - split + mesh.share(split, Part.WEIGHTS)
    if facts.adapters is None:
        dense += (added.layers + added.root) * trained.dense // max(1, params.dense)
    experts = sum(padded_experts(layer, mesh) for layer in layers) if trained.experts else 0
    experts = round(experts * trained.experts / params.experts) if experts else 0
    return Sharded(
        layers=in_layers - (own - own_root),
        root=root - own_root,
        grads=max(0, dense + experts - owned),
        owned=owned,
        replicas=prod(mesh.size(axis) for axis in summed.sum_over if axis not in summed.sharded_over),
    )


def weight_traffic(of: Sharded, run: RunFacts) -> WeightTraffic:
    """Bytes of a step."""
    gathered = of.layers + of.root
    if run.gather == "layer":
        gathered = run.accumulation * (2 * of.layers + of.root)
    return WeightTraffic(
        gathered=gathered * run.compute_bytes,
        reduced=of.grads * FP32_BYTES * (run.accumulation if run.reduce == "each" else 1),
        replicas=2 * (of.replicas - 1) * of.owned * FP32_BYTES // of.replicas,
    )


def ways(of: Sharded | None, run: RunFacts) -> list[RunFacts]:
    """The runs that `auto` allows, in the order in which they are tried; one, if nothing is `auto`.

    Args:
        of: None on one rank.
    """

    def sent(each: RunFacts) -> int:
        traffic = weight_traffic(of, each) if of is not None else None
        return 0 if traffic is None else traffic.gathered + traffic.reduced

    checkpointing = CHECKPOINTING if run.checkpointing == AUTO else (run.checkpointing,)
    # Where nothing is sent, or nothing is accumulated, what stands first here is taken.
    reduce = tuple(reversed(REDUCE)) if run.reduce == AUTO else (run.reduce,)
    gather = GATHER if run.gather == AUTO else (run.gather,)
    if of is None:
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
    known: list[float] = []
    for each in tried:
        known.append(needed(each))
        if known[-1] <= limit:
            return each
    return tried[known.index(min(known))]
