"""The estimate of a plan: parameters, memory and traffic. What to change if it does not fit: search/remedies.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moecompile.mesh import MeshSpec, Part
from moecompile.plan import Assumptions, Estimate, LayerPlan, Plan, Traffic, fit_of
from moecompile.planner.context_parallel import cp_traffic
from moecompile.planner.lending import lending
from moecompile.planner.lookups import lookup_traffic
from moecompile.planner.memory import largest_in_words, sends_again, tokens_of_a_rank
from moecompile.planner.optimizer import muon_params, step_traffic
from moecompile.planner.params import (
    BALANCED,
    BF16_BYTES,
    FP32_BYTES,
    Expected,
    ModelFacts,
    RunFacts,
    model_params,
    trained_params,
)
from moecompile.planner.pipeline import OfRank, fullest, ranks_of
from moecompile.planner.schedule import sharded, weight_traffic
from moecompile.planner.shards import expert_shards
from moecompile.planner.tensor_parallel import tp_traffic
from moecompile.planner.traffic import Wire, forward_traffic
from moecompile.schema import Bf16Weights, MuonPrecision, OptimizerConfig, StateKind
from moecompile.stages import crossings_of


def estimate(
    plan: Plan, facts: ModelFacts, run: RunFacts, *, memory_bytes: float, ranks: Sequence[OfRank] | None = None,
    expected: Expected = BALANCED,
) -> Estimate:  # fmt: skip
    """Parameters, memory of the fullest rank and bytes on the wire.

    Args:
        plan: without its estimate. facts: of the model before rewriting. run: of the training. memory_bytes: memory of
            one rank. ranks: of `ranks_of`, if they are known. expected: the load with which it must fit.
    """
    layers, mesh, ranks = plan.layers, plan.mesh, ranks_of(plan, facts) if ranks is None else ranks
    params, trained = model_params(layers, facts), trained_params(layers, facts)
    full, memory = fullest(ranks, plan, run)
    muon = muon_params(layers, mesh, facts, run.optimizer, trained)
    of_rank = muon
    if plan.pipeline is not None:
        trained_here = trained_params(full.layers, full.facts)
        of_rank = muon_params(full.layers, full.mesh, full.facts, run.optimizer, trained_here)
    traffic = _mean_traffic(layers, mesh, run)
    uneven = fullest(ranks, plan, replace(run, row_load=expected.load))[1].total
    return Estimate(
        params_total=params.total,
        params_active=params.active,
        params_trained=trained.total,
        params_muon=muon.total,
        memory_bytes_per_rank=memory,
        memory_bytes_uneven=uneven,
        expected_load=expected.load,
        expected_from=expected.source,
        largest=largest_in_words(memory, full.layers, full.mesh, full.facts, full.run(run, plan.pipeline)),
        fits=fit_of(memory.total, uneven, memory_bytes),
        bytes_per_token_per_layer=traffic,
        checkpointing=run.checkpointing,
        resent_bytes_per_token_per_layer=traffic.times(
            sum(sends_again(layer, run) for layer in layers) / max(1, len(layers))
        ),
        tp_bytes_per_token=tp_traffic(layers, mesh, facts, run),
        cp_bytes_per_token=cp_traffic(plan.context_parallel, mesh, run),
        optimizer_bytes_per_step=step_traffic(of_rank, full.mesh, _matrix_bytes(run)),
        assumes=Assumptions(
            hardware=run.hardware,
            memory_bytes=round(memory_bytes),
            tokens_per_rank=run.tokens_per_rank,
            seq_len=run.tokens_per_rank * mesh.size(Part.SEQUENCE) // run.micro_batch_size,
            accumulation=run.accumulation,
            precision=run.precision,
            number_bytes=run.compute_bytes,
            optimizer=_optimizer_text(run.optimizer),
        ),
        lending=lending(layers, run),
        expert_shards=expert_shards(full.layers, full.mesh, full.facts, run),
        weight_traffic=(
            weight_traffic(sharded(full.layers, full.mesh, full.facts), run) if full.mesh.world_size > 1 else None
        ),
        stage_bytes_per_step=_stage_bytes(plan, run),
        lookup_bytes=lookup_traffic(plan, facts, run.tokens_per_rank, run.compute_bytes),
    )


def _stage_bytes(plan: Plan, run: RunFacts) -> int:
    """Bytes that the rank that sends the most sends to other stages in a step: forward, and the gradients back."""
    if plan.pipeline is None:
        return 0
    pipeline = plan.pipeline
    received = {cut: numbers for cut, numbers in crossings_of(pipeline) if not pipeline.is_local(cut)}
    numbers = [
        sum(received.get(stage + 1, 0.0) + received.get(stage, 0.0) for stage in pipeline.stages_of(index))
        for index in range(pipeline.ranks)
    ]
    return round(max(numbers) * run.tokens_per_rank * run.compute_bytes * run.accumulation)


def _optimizer_text(config: OptimizerConfig) -> str:
    """`adamw`, `muon with int8 moments and master bf16 weights`."""
    kept = [] if config.state is StateKind.auto else [f"{config.state.value} moments"]
    kept += [] if config.bf16_weights is Bf16Weights.nearest else [f"{config.bf16_weights.value} bf16 weights"]
    return config.kind.value + f" with {' and '.join(kept)}" * bool(kept)


def _matrix_bytes(run: RunFacts) -> int:
    """Bytes of a number of a matrix that is gathered."""
    return BF16_BYTES if run.optimizer.muon.precision is MuonPrecision.bf16 else FP32_BYTES


def _mean_traffic(layers: Sequence[LayerPlan], mesh: MeshSpec, run: RunFacts) -> Traffic:
    """Mean over the MoE layers; zero without any."""
    traffic = []
    for layer in layers:
        wire = Wire(
            d_model=layer.row_site.d_model,
            tokens_per_rank=tokens_of_a_rank(mesh, run),
            element_bytes=run.compute_bytes,
            wire_dtype=layer.dispatch.wire_dtype,
        )  # routing weights stay fp32
        traffic.append(forward_traffic(layer.dispatch.kind, layer.placement, layer.routing, mesh, wire))
    count = max(1, len(traffic))
    return Traffic(
        intra_node=sum(t.intra_node for t in traffic) / count, inter_node=sum(t.inter_node for t in traffic) / count
    )
