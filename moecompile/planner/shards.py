"""What FSDP makes of weights: shards of the fullest rank, and what gathers and reductions of them send.

E: experts of a rank of the EP group; r: ranks that hold the same ones (edp_shard); F, L: widths of an expert and a row.

1. The stacks of a layer: gate and up in one (E, n F, L), down (E, L, F), biases (E, n F) and (E, L); of adapters A
   (E, rank, d_in) and B (E, d_out, rank). A model may store some transposed, which changes nothing here.
                                                                                             -> `expert_stacks`
2. A rank stores the largest shard of each (plan/experts.py): 1 / (ep r) of all parameters if all can be cut evenly.
                                                                                             -> `expert_share`
3. A gather leaves r times the largest shard on each rank, of which it receives (r - 1) / r; a reduction sends as many
   fp32 numbers of trained weights. How often: schedule.py.                                 -> `expert_shards`

Other weights are cut along dim 0 over n ranks. Each shard has ceil(rows / n) rows, filled up where there are fewer, so
a gather leaves n ceil(rows / n) rows on each rank: 8,192 for 7,168 rows on 2,048 ranks.                  -> `padding`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod

from moecompile.mesh import MeshSpec, Part
from moecompile.plan import ExpertShards, ExpertsSite, LayerPlan, largest_shard
from moecompile.planner.params import FP32_BYTES, ModelFacts, RunFacts, model_params, trained_params

Shape = tuple[int, ...]


def expert_stacks(layer: LayerPlan, mesh: MeshSpec) -> tuple[list[Shape], list[Shape]]:
    """Shapes on a rank of the EP group: of the experts' own weights, and of their adapters (step 1)."""
    site, experts = layer.row_site, layer.experts.num_routed // mesh.ep
    wide, row, narrow = site.num_in_projections * layer.experts.d_expert, site.d_model, layer.experts.d_expert
    own: list[Shape] = [(experts, wide, row), (experts, row, narrow)]
    own += [(experts, wide)] * site.bias_up + [(experts, row)] * site.bias_down
    if layer.adapters is None:
        return own, []
    adapters: list[Shape] = []
    for name in layer.adapters.weights:
        d_in, d_out = (narrow, row) if name == "down_proj" else (row, wide)
        adapters += [(experts, layer.adapters.rank, d_in), (experts, d_out, layer.adapters.rank)]
    return own, adapters


def padded_experts(layer: LayerPlan, mesh: MeshSpec) -> int:
    """Numbers of a layer's experts and their adapters on a rank after a gather."""
    own, adapters = expert_stacks(layer, mesh)
    return mesh.edp_shard * sum(largest_shard(shape, mesh.edp_shard) for shape in own + adapters)


@dataclass(frozen=True, kw_only=True)
class Padding:
    """Numbers of dense weights that FSDP adds to those of all layers, and of the root, when it gathers them."""

    layers: int = 0
    root: int = 0


def padding(layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts) -> Padding:
    """What is added, where the shapes of the weights are known. Adapters of linears are left out."""
    ranks, parts, planned = mesh.size(Part.STORED), mesh.size(Part.WEIGHTS), {layer.site.fqn for layer in layers}
    if mesh.world_size == 1 or not facts.weights:
        return Padding()
    added = {True: 0, False: 0}
    for fact in facts.weights:
        if fact.site not in planned:
            rows = -(-fact.rows // parts) if fact.split == "rows" else fact.rows
            added[fact.is_root] += _added(rows, fact.params // (parts if fact.split else 1), ranks)
    of_ours = mesh.size(Part.STORED, Part.WEIGHTS)
    made = sum(_added(rows, params, of_ours) for layer in layers for rows, params in _made(layer))
    return Padding(layers=added[False] + made, root=added[True])


def _added(rows: int, params: int, ranks: int) -> int:
    return params * (-rows % ranks) // rows


def _made(layer: LayerPlan) -> list[tuple[int, int]]:
    """(rows, parameters) of the dense weights that a layer gets."""
    site, experts = layer.site, layer.experts
    if isinstance(site, ExpertsSite):
        return []
    number, shared, latent = site.num_in_projections, experts.d_shared, experts.latent_size
    made: list[tuple[int, int]] = []
    if shared:
        made += [(shared, number * shared * (site.d_model + site.bias_up))]
        made += [(site.d_model, site.d_model * (shared + site.bias_down))]
    if experts.shared_gate:
        made += [(1, site.d_model)]
    if latent is not None:
        made += [(latent, latent * (site.d_model + experts.latent_norm)), (site.d_model, latent * site.d_model)]
    return made


def expert_share(layers: Sequence[LayerPlan], mesh: MeshSpec, *, adapters_only: bool = False) -> Fraction:
    """The part of all parameters of experts (or of their adapters alone) that the fullest rank stores (step 2)."""
    stacks = [shape for layer in layers for shape in _of(layer, mesh, adapters_only=adapters_only)]
    held, whole = sum(largest_shard(shape, mesh.edp_shard) for shape in stacks), mesh.ep * sum(map(prod, stacks))
    return Fraction(held, whole) if whole else Fraction(1, mesh.ep * mesh.edp_shard)


def expert_shards(layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts) -> ExpertShards | None:
    """Bytes of the experts of all layers (steps 2 and 3); None if no rank shares its experts."""
    ranks, params = mesh.edp_shard, model_params(layers, facts)
    if ranks == 1 or not params.experts:
        return None
    own, adapters = (
        sum(largest_shard(shape, ranks) for layer in layers for shape in expert_stacks(layer, mesh)[i]) for i in (0, 1)
    )
    wide = max(FP32_BYTES, facts.bytes_per_param)  # of adapters
    casts = run.compute_bytes < facts.bytes_per_param
    trained = (own + adapters) * trained_params(layers, facts).experts / params.experts
    return ExpertShards(
        ranks=ranks,
        stored=own * facts.bytes_per_param + adapters * wide,
        gathered=(ranks - 1) * (own * run.compute_bytes + adapters * (run.compute_bytes if casts else wide)),
        reduced=round((ranks - 1) * (trained if facts.adapters is None else adapters)) * FP32_BYTES,
        times_even=round(float(expert_share(layers, mesh) * mesh.ep * ranks), 4),
    )


def _of(layer: LayerPlan, mesh: MeshSpec, *, adapters_only: bool) -> list[Shape]:
    own, adapters = expert_stacks(layer, mesh)
    return adapters if adapters_only else own + adapters
