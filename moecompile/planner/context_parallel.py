"""Context parallelism: what attention exchanges over `cp`, and what forbids it.

Algorithm:
  1. The model must say what its attention is (`ModelFacts.attention`), and nothing else may look across positions.
  2. `cp` must divide the heads of queries, and the tokens of a sequence. Heads of keys and values that it does not
     divide are sent several times. With `tp` they are a rank's, where the model's tp_plan splits them.
  3. What counts the tokens of a micro-batch, or draws random numbers for them, is refused: they are on several ranks.
  4. Attention of one pattern (layers differ in their number alone) is one entry of the plan.

Bytes that a rank sends over `cp` in a forward, per token of its own (n: ranks of a CP group, b: bytes of a number; H,
h, d_k, d_v: a rank's heads of queries and of keys and values that are sent, and their widths):
    (n - 1) / n  b  ((H + h) d_k + (h + H) d_v)       q, k, v and the output, summed over layers   -> `cp_traffic`
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import gcd

from moecompile.errors import ConfigError
from moecompile.mesh import LinkClass, MeshSpec, Part
from moecompile.plan import ExchangedAttention, LayerPlan, Traffic
from moecompile.planner.params import AttentionFact, ModelFacts, RunFacts
from moecompile.schema import Config


def exchanged_attention(
    layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, config: Config
) -> tuple[ExchangedAttention, ...]:
    """What attention exchanges over `mesh.cp`; nothing if it is 1.

    Raises:
        ConfigError: the model, or an option, does not allow it.
    """
    if mesh.cp == 1:
        return ()
    if facts.no_context:  # Step 1
        raise ConfigError("mesh.cp", mesh.cp, facts.no_context, "Use mesh.cp=1")
    attention = [_of_rank(fact, mesh, facts) for fact in facts.attention]
    for fact in attention:  # Step 2
        if fact.query_heads % mesh.cp:
            of_rank = f" on a rank ({mesh.setting(Part.WEIGHTS)})" if mesh.axes(Part.WEIGHTS) else ""
            rule = f"{fact.path} has {fact.query_heads} heads{of_rank}, and must have equally many on each of the ranks"
            fitting = gcd(*(each.query_heads for each in attention))
            largest = max(n for n in range(1, mesh.cp) if fitting % n == 0 and mesh.cp % n == 0)
            raise ConfigError("mesh.cp", mesh.cp, rule, f"Use mesh.cp={largest}")
    if config.data.seq_len % mesh.cp:
        up = -(-config.data.seq_len // mesh.cp) * mesh.cp
        rule = f"must be a multiple of mesh.cp={mesh.cp}, so that ranks have equally many positions"
        raise ConfigError("data.seq_len", config.data.seq_len, rule, f"Use {up}")
    for path, value, rule, fix in _refused(layers, config):  # Step 3
        raise ConfigError(path, value, f"{rule}, and mesh.cp={mesh.cp} has its tokens on several ranks", fix)
    return _by_pattern(attention, mesh.cp)  # Step 4


def _of_rank(fact: AttentionFact, mesh: MeshSpec, facts: ModelFacts) -> AttentionFact:
    """The heads that a rank has before the exchange."""
    parts = mesh.size(Part.WEIGHTS)
    if parts == 1 or not any(s.style == "colwise" and s.path.startswith(f"{fact.path}.") for s in facts.split):
        return fact
    return replace(fact, query_heads=fact.query_heads // parts, key_heads=fact.key_heads // parts)


def _refused(layers: Sequence[LayerPlan], config: Config) -> Iterator[tuple[str, object, str, str]]:
    """(path, value, rule, fix) of options that need all tokens of a micro-batch on one rank."""
    if config.routing.replay is not None:
        yield "routing.replay", config.routing.replay, "is of whole micro-batches", "Use routing.replay=null"
    for layer in layers:
        routing = layer.routing
        if routing.choice == "expert":
            yield "routing.choice", "expert", "experts choose among the tokens of a micro-batch", "Use token"
        if routing.capacity_factor is not None:
            rule = "an expert's capacity counts the tokens of a micro-batch"
            yield "routing.capacity_factor", routing.capacity_factor, rule, "Use routing.capacity_factor=null"
        if routing.jitter:
            rule = "its random numbers are those of a micro-batch"
            yield "routing.jitter", routing.jitter, rule, "Use routing.jitter=0"
        if routing.workload != "none":
            yield "routing.workload", routing.workload, "is drawn for a micro-batch", "Use routing.workload=none"
    if config.adapters.dropout and config.adapters.kind.value != "none":
        rule = "its random numbers are those of a micro-batch"
        yield "adapters.dropout", config.adapters.dropout, rule, "Use adapters.dropout=0"


def _by_pattern(attention: Sequence[AttentionFact], cp: int) -> tuple[ExchangedAttention, ...]:
    counts = Counter(
        (re.sub(r"\.\d+(?=\.|$)", ".*", fact.path), fact.query_heads, fact.key_heads, fact.d_key, fact.d_value)
        for fact in attention
    )
    return tuple(
        ExchangedAttention(
            modules=modules, layers=layers, query_heads=query_heads, key_heads=key_heads,
            key_copies=cp // gcd(key_heads, cp), d_key=d_key, d_value=d_value,
        )
        for (modules, query_heads, key_heads, d_key, d_value), layers in counts.items()
    )  # fmt: skip


def cp_traffic(exchanged: Sequence[ExchangedAttention], mesh: MeshSpec, run: RunFacts) -> Traffic:
    """Bytes per token that leave a rank over cp in the forward of the whole model."""
    sent = sum(each.numbers for each in exchanged) * run.compute_bytes * (mesh.cp - 1) / mesh.cp
    peers = mesh.cp - 1
    group = mesh.group(Part.SEQUENCE, rank=0)
    near = sum(mesh.link(0, rank) is LinkClass.INTRA_NODE for rank in group)  # of all ranks alike
    return Traffic(
        intra_node=sent * near / peers if peers else 0.0, inter_node=sent * (peers - near) / peers if peers else 0.0
    )
