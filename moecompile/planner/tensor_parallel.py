"""Tensor parallelism outside of the MoE layers: the model's own `tp_plan`, as far as it can be carried.

Algorithm:
  1. Of the modules that the model's tp_plan names, those that become experts are left out: inside an MoE layer tokens
     are cut over `tp`, not weights.
  2. Every other one must have a style that is carried, and sizes that `tp` divides: the split dim of its weight, and
     the number of heads if its outputs are heads.
  3. Modules of one pattern (layers differ in their number alone) are one entry of the plan.

Bytes that a rank sends over `tp` in a forward, per token (n: ranks of a TP group, b: bytes of a number; in a ring):
    2 (n - 1) / n  b  outputs    sum after a rowwise linear or a split embedding
      (n - 1) / n  b  outputs    gather after `colwise_gather_output`, and the join of an MoE layer     -> `tp_traffic`
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.plan import STYLES, LayerPlan, SplitModules, Traffic
from moecompile.planner.params import UNNAMED, ModelFacts, RunFacts, SplitFact

_KEY_HEADS = ("k_proj", "v_proj")
_QUERY_HEADS = ("q_proj", "q_b_proj", "kv_b_proj")
_KIND_OF = {"embedding_rowwise": "embedding", "replicated_with_grad_allreduce": ""}


def split_modules(planned: Collection[str], mesh: MeshSpec, facts: ModelFacts) -> tuple[SplitModules, ...]:
    """The modules to split over `mesh.tp`; none if it is 1.

    Args:
        planned: paths of the sites that become (or are) experts.

    Raises:
        ConfigError: `mesh.tp` is not what the model's tp_plan allows; it names the weight and the reason.
    """
    if mesh.tp == 1:
        return ()
    if facts.no_split:
        raise _error(mesh.tp, facts.no_split, 1)
    left = remaining(planned, facts)  # Step 1
    if reasons := _reasons(left, mesh.tp, facts):  # Step 2
        fitting = [n for n in range(1, mesh.tp) if not mesh.tp % n and not _reasons(left, n, facts)]
        raise _error(mesh.tp, reasons[0], max(fitting))
    by_pattern = {fact.pattern: fact.style for fact in left}  # Step 3
    return tuple(SplitModules(modules=pattern, style=style) for pattern, style in by_pattern.items())


def remaining(planned: Collection[str], facts: ModelFacts) -> list[SplitFact]:
    """The modules that the model's tp_plan names and that stay dense."""
    return [fact for fact in facts.split if fact.site not in planned]


def tp_traffic(layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts) -> Traffic:
    """Bytes per token that leave a rank over tp in the forward of the whole model."""
    summed, gathered = 0, sum(layer.site.d_model for layer in layers if layer.cut_over)
    for fact in remaining([layer.site.fqn for layer in layers], facts) if mesh.tp > 1 else ():
        if fact.style.startswith("rowwise") or fact.style == "embedding_rowwise":
            summed += fact.width
        elif fact.style in ("colwise_gather_output", "colwise_rep"):
            gathered += fact.width
    sent = (2 * summed + gathered) * run.compute_bytes * (mesh.tp - 1) / mesh.tp
    on_a_node = mesh.tp <= mesh.ranks_per_node
    return Traffic(intra_node=sent if on_a_node else 0.0, inter_node=0.0 if on_a_node else sent)


def _error(tp: int, reason: str, largest: int) -> ConfigError:
    return ConfigError("mesh.tp", tp, reason, f"Use mesh.tp={largest}")


def _reasons(left: Sequence[SplitFact], tp: int, facts: ModelFacts) -> list[str]:
    """Why these modules cannot be split over `tp` ranks; none if they can."""
    return [reason for fact in left for reason in _reasons_of(fact, tp, facts)] if tp > 1 else []


def _reasons_of(fact: SplitFact, tp: int, facts: ModelFacts) -> Iterator[str]:
    where = f"{fact.path} ({fact.style} in the model's tp_plan)"
    if fact.style == UNNAMED:
        yield f"{fact.path} is not in the model's tp_plan, which splits its heads, and its weights are not those of one"
    elif fact.style not in STYLES:
        yield f"{where} cannot be split: this style is not carried outside of MoE layers"
    elif (kind := _KIND_OF.get(fact.style, "linear")) and fact.kind != kind:
        yield f"{where} cannot be split: it is a {fact.kind}, not a plain {kind}"
    elif fact.size % tp:
        yield f"{where} cannot be split into {tp} equal parts: its {fact.size_name} is {fact.size}"
    elif fact.style == "colwise":
        name = fact.path.rpartition(".")[2]
        heads = "num_key_value_heads" if name in _KEY_HEADS else "num_attention_heads"
        if name in (*_KEY_HEADS, *_QUERY_HEADS) and facts.heads.get(heads, tp) % tp:
            yield f"{where} cannot be split into {tp} equal parts: it has {heads}={facts.heads[heads]}"
