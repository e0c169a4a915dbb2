"""The estimate of a plan: parameters, memory and traffic.

What to change if a plan does not fit into memory, and the memory that it would need then (`remedies`):
  1. Each change alone: activation checkpointing, a smaller micro-batch (more accumulation), bf16 weights, more ranks
     (with the same `mesh.ep`, so that experts and dense weights are sharded over more of them).
  2. All of them together, without more ranks; then with as few more ranks as needed.
  3. Leave out changes that save nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec, Part
from moecompile.plan import Assumptions, Estimate, ExchangedAttention, LayerPlan, Remedy, Traffic
from moecompile.planner.context_parallel import cp_traffic
from moecompile.planner.lending import lending
from moecompile.planner.memory import UNEVEN, memory_of_fullest_rank, tokens_of_a_rank
from moecompile.planner.optimizer import muon_params, step_traffic
from moecompile.planner.params import BF16_BYTES, FP32_BYTES, ModelFacts, RunFacts, model_params, trained_params
from moecompile.planner.shards import expert_shards
from moecompile.planner.tensor_parallel import tp_traffic
from moecompile.planner.traffic import Wire, forward_traffic, row_bytes
from moecompile.schema import MuonPrecision

_RANKS_OF_A_NODE, _MOST_RANKS = 8, 65_536
Change = tuple[str, MeshSpec, RunFacts]


def estimate(
    layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts, *, memory_bytes: float,
    exchanged: Sequence[ExchangedAttention] = (),
) -> Estimate:  # fmt: skip
    """Parameters, memory of the fullest rank and bytes on the wire.

    Args:
        layers: the planned MoE layers. mesh: their mesh. facts: of the model before rewriting. run: of the training.
        memory_bytes: memory of one rank. exchanged: what attention exchanges over cp.
    """
    params, trained = model_params(layers, facts), trained_params(layers, facts)
    muon = muon_params(layers, mesh, facts, run.optimizer, trained)
    memory = memory_of_fullest_rank(layers, mesh, facts, run)
    traffic = _mean_traffic(layers, mesh, run)
    fits = memory.total <= memory_bytes
    return Estimate(
        params_total=params.total,
        params_active=params.active,
        params_trained=trained.total,
        params_muon=muon.total,
        memory_bytes_per_rank=memory,
        memory_bytes_uneven=memory_of_fullest_rank(layers, mesh, facts, replace(run, row_load=UNEVEN)).total,
        fits=fits,
        bytes_per_token_per_layer=traffic,
        checkpointing=run.checkpointing,
        resent_bytes_per_token_per_layer=traffic
        if run.checkpointing == "full"
        else Traffic(intra_node=0.0, inter_node=0.0),
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
        remedies=() if fits else remedies(layers, mesh, facts, run, memory_bytes=memory_bytes),
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


def remedies(
    layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts, *, memory_bytes: float
) -> tuple[Remedy, ...]:
    """Changes that save memory, the cheapest first; arguments as for `estimate`."""

    def total(mesh: MeshSpec, run: RunFacts) -> int:
        return memory_of_fullest_rank(layers, mesh, facts, run).total

    def fewest_ranks(mesh: MeshSpec, run: RunFacts) -> Change | None:
        """The smallest larger mesh that fits, else the largest one that still saves memory."""
        best, least = None, total(mesh, run)
        for larger in _larger(mesh):
            more = replace(run, accumulation=max(1, run.accumulation * mesh.num_batches // larger.num_batches))
            needed = total(larger, more)
            if needed >= least * 0.98:  # more sharding saves next to nothing
                break
            best, least = (_mesh_text(larger, mesh, run), larger, more), needed
            if needed <= memory_bytes:
                break
        return best

    single, together = list(_single(mesh, run)), (mesh, run)  # Step 1
    for text, _, _ in single:
        together = (mesh, _applied(together[1], text))
    changes = [*single]
    if (ranks := fewest_ranks(mesh, run)) is not None:
        changes.append(ranks)
    if len(single) > 1:  # Step 2
        names = " ".join(text for text, _, _ in single)
        changes.append((names, *together))
        if total(*together) > memory_bytes and (ranks := fewest_ranks(*together)) is not None:
            changes.append((f"{names} {ranks[0]}", *ranks[1:]))
    now = total(mesh, run)
    saving = (Remedy(change=text, total=needed, fits=needed <= memory_bytes)
              for text, other, changed in changes if (needed := total(other, changed)) < now)  # fmt: skip
    return tuple(saving)  # Step 3


def _single(mesh: MeshSpec, run: RunFacts) -> Iterator[Change]:
    texts = []
    if run.checkpointing == "none":
        texts.append("trainer.checkpointing=keep_exchanges")
    if run.checkpointing == "keep_exchanges":
        texts.append("trainer.checkpointing=full")
    if run.micro_batch_size > 1:
        texts.append("data.micro_batch_size=1")
    if run.compute_bytes > BF16_BYTES:
        texts.append("trainer.precision=bf16_params")
    for text in texts:
        yield text, mesh, _applied(run, text)


def _applied(run: RunFacts, text: str) -> RunFacts:
    """`run` with one change of `_single`."""
    key, _, value = text.partition("=")
    if key == "trainer.checkpointing":
        return replace(run, checkpointing=value)
    if key == "trainer.precision":
        return replace(run, compute_bytes=BF16_BYTES, is_mixed=False, precision=value)
    size = run.micro_batch_size
    return replace(
        run, tokens_per_rank=run.tokens_per_rank // size, micro_batch_size=1, accumulation=run.accumulation * size
    )


def _larger(mesh: MeshSpec) -> Iterator[MeshSpec]:
    """Meshes with 2, 4, 8, ... times as many ranks: first up to a full node, then more nodes."""
    while mesh.world_size * 2 <= _MOST_RANKS:
        fills = mesh.num_nodes == 1 and mesh.ranks_per_node * 2 <= _RANKS_OF_A_NODE
        name = "ranks_per_node" if fills else "num_nodes"
        try:
            mesh = replace(mesh, **{name: getattr(mesh, name) * 2})
        except ConfigError:  # an EP group would not fill whole nodes
            return
        yield mesh


def _mesh_text(larger: MeshSpec, mesh: MeshSpec, run: RunFacts) -> str:
    text = f"mesh.num_nodes={larger.num_nodes} mesh.ranks_per_node={larger.ranks_per_node} mesh.ep={larger.ep}"
    if run.accumulation * mesh.num_batches >= larger.num_batches:
        return text
    return f"{text} data.global_batch_size={larger.num_batches * run.micro_batch_size}"  # one micro-batch each
