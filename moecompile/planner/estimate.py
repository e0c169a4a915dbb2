"""The estimate of a plan: parameters, memory and traffic. What to change if it does not fit: search/remedies.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moecompile.mesh import MeshSpec, Part
from moecompile.plan import Assumptions, Estimate, ExchangedAttention, LayerPlan, Traffic, fit_of
from moecompile.planner.context_parallel import cp_traffic
from moecompile.planner.lending import lending
from moecompile.planner.memory import largest_in_words, memory_of_fullest_rank, sends_again, tokens_of_a_rank
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
from moecompile.planner.schedule import sharded, weight_traffic
from moecompile.planner.shards import expert_shards
from moecompile.planner.tensor_parallel import tp_traffic
from moecompile.planner.traffic import Wire, forward_traffic, row_bytes
from moecompile.schema import MuonPrecision


def estimate(
    layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts, *, memory_bytes: float,
    exchanged: Sequence[ExchangedAttention] = (), expected: Expected = BALANCED,
) -> Estimate:  # fmt: skip
    """Parameters, memory of the fullest rank and bytes on the wire.

    Args:
        layers: the planned MoE layers. mesh: their mesh. facts: of the model before rewriting. run: of the training.
        memory_bytes: memory of one rank. exchanged: what attention exchanges over cp. expected: the load with which it
            must fit.
    """
    params, trained = model_params(layers, facts), trained_params(layers, facts)
    muon = muon_params(layers, mesh, facts, run.optimizer, trained)
    memory = memory_of_fullest_rank(layers, mesh, facts, run)
    traffic = _mean_traffic(layers, mesh, run)
    uneven = memory_of_fullest_rank(layers, mesh, facts, replace(run, row_load=expected.load)).total
    return Estimate(
        params_total=params.total,
        params_active=params.active,
        params_trained=trained.total,
        params_muon=muon.total,
        memory_bytes_per_rank=memory,
        memory_bytes_uneven=uneven,
        expected_load=expected.load,
        expected_from=expected.source,
        largest=largest_in_words(memory, layers, mesh, facts, run),
        fits=fit_of(memory.total, uneven, memory_bytes),
        bytes_per_token_per_layer=traffic,
        checkpointing=run.checkpointing,
        resent_bytes_per_token_per_layer=traffic.times(
            sum(sends_again(layer, run) for layer in layers) / max(1, len(layers))
        ),
        tp_bytes_per_token=tp_traffic(layers, mesh, facts, run),
        cp_bytes_per_token=cp_traffic(exchanged, mesh, run),
        optimizer_bytes_per_step=step_traffic(muon, mesh, _matrix_bytes(run)),
        assumes=Assumptions(
            hardware=run.hardware,
            memory_bytes=round(memory_bytes),
            tokens_per_rank=run.tokens_per_rank,
            seq_len=run.tokens_per_rank * mesh.size(Part.SEQUENCE) // run.micro_batch_size,
            accumulation=run.accumulation,
            precision=run.precision,
            optimizer=run.optimizer.kind.value,
        ),
        lending=lending(layers, run),
        expert_shards=expert_shards(layers, mesh, facts, run),
        weight_traffic=weight_traffic(sharded(layers, mesh, facts), run) if mesh.world_size > 1 else None,
    )


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
            element_bytes=row_bytes(layer.dispatch.wire_dtype, run.compute_bytes),
        )  # routing weights stay fp32
        traffic.append(forward_traffic(layer.dispatch.kind, layer.placement, layer.routing, mesh, wire))
    count = max(1, len(traffic))
    return Traffic(
        intra_node=sum(t.intra_node for t in traffic) / count, inter_node=sum(t.inter_node for t in traffic) / count
    )
