"""What to change if a plan does not fit into memory, and the memory that it would need then.

Algorithm:
  1. Each change alone: activation checkpointing, a smaller micro-batch (more accumulation), bf16 weights, more ranks
     (with the same `mesh.ep`, so that experts and dense weights are sharded over more of them).
  2. All of them together, without more ranks; then with as few more ranks as needed.
  3. Leave out changes that save nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.plan import LayerPlan, Remedy
from moecompile.planner.memory import memory_of_fullest_rank
from moecompile.planner.params import BF16_BYTES, ModelFacts, RunFacts

_RANKS_OF_A_NODE, _MOST_RANKS = 8, 65_536
Change = tuple[str, MeshSpec, RunFacts]


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
