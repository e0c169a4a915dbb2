"""Embedding tables whose rows are spread over ranks: which, what a rank has of them, and what lookups send.

n: ranks with different tokens, over which rows are spread; N, D: rows and width of a table; q: its ids per token, T:
tokens of a micro-batch; a: bytes of an element in compute.

1. A rank stores ceil(N / n) rows, and their gradients and moments. FSDP would gather all N for use.  -> `numbers_here`
   Of a table that is stepped by rows, gradients are of the rows alone that were read, and the state is that of the
   rule (schema/moments.py).                                                  -> `kept_bytes`, `state_of_rows`
2. Ids are taken to be uniform over the rows, as those of hashes are. Of the T q of a micro-batch
       U = N (1 - (1 - 1 / N)^(T q))                                      are different            -> `different`
   Text repeats n-grams, so there are fewer in fact, and of given ids far fewer.
3. Of these (n - 1) / n are on other ranks. In forward an id of 4 bytes goes there, and a row of a D bytes comes back;
   in backward a row of its gradient goes there, in fp32 or wider.                    -> `sent_forward`, `sent_backward`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import expm1, log1p

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec, Part
from moecompile.plan import Lookup, LookupTraffic, Plan, Traffic
from moecompile.planner.optimizer import near
from moecompile.planner.params import FP32_BYTES, ModelFacts, RunFacts, TableFact
from moecompile.schema import ROW_STATE, Config, EmbeddingsConfig, EmbeddingShard, RowRule

ID_BYTES = 4
_PLACE_BYTES = 8  # of a row that a token reads: which of those that came


def is_wanted(numbers: int, config: EmbeddingsConfig, *, computed: bool) -> bool:
    """Whether a config asks for the rows of a table to be spread."""
    is_kind = config.shard is EmbeddingShard.ep or (config.shard is EmbeddingShard.auto and computed)
    return is_kind and numbers >= config.min_numbers


def plan_lookups(mesh: MeshSpec, facts: ModelFacts, config: Config) -> tuple[tuple[Lookup, ...], ModelFacts]:
    """The tables whose rows are spread, and the facts without them.

    Raises:
        ConfigError: `embeddings.shard=ep`, and there is none, or one cannot be spread; or one that is spread is split
            over `tp` by the model's tp_plan.
    """
    settings = config.embeddings
    if settings.shard is EmbeddingShard.ep:
        _check(facts.tables, settings)
    chosen = [
        fact for fact in facts.tables
        if is_wanted(fact.lookup.numbers, settings, computed=fact.lookup.computed) and not fact.refused
    ]  # fmt: skip
    if settings.optimizer is not RowRule.same and not chosen:
        raise ConfigError(
            "embeddings.optimizer", settings.optimizer.value, "steps rows of spread tables, and there is none "
            f"(embeddings.shard={settings.shard.value}, embeddings.min_numbers={settings.min_numbers})",
            "Use same, or change these",
        )  # fmt: skip
    for axis in mesh.axes(Part.WEIGHTS):
        names = {f"{fact.path}.weight" for fact in facts.split}
        if split := next((fact for fact in chosen if fact.lookup.weight in names), None):
            rule = f"splits {split.lookup.weight} by the model's tp_plan, and its rows are spread over ranks"
            raise ConfigError(f"mesh.{axis}", mesh.size(axis), rule, f"Use mesh.{axis}=1, or embeddings.shard=none")
    by_rows = "" if settings.optimizer is RowRule.same else settings.optimizer.value
    lookups = tuple(replace(fact.lookup, by_rows=by_rows) for fact in chosen)
    return lookups, without_tables(facts, lookups)


def _check(tables: Sequence[TableFact], settings: EmbeddingsConfig) -> None:
    large = [fact for fact in tables if fact.lookup.numbers >= settings.min_numbers]
    if not large:
        most = max((fact.lookup.numbers for fact in tables), default=0)
        raise ConfigError(
            "embeddings.min_numbers", settings.min_numbers,
            f"no embedding has so many numbers; the largest of {len(tables)} has {most:,}", "Use a smaller number",
        )  # fmt: skip
    if refused := next((fact for fact in large if fact.refused), None):
        rule = f"the rows of {refused.lookup.weight} cannot be spread: {refused.refused}"
        raise ConfigError("embeddings.shard", "ep", rule, "Use auto, or a larger embeddings.min_numbers")


def table_notes(facts: ModelFacts, config: Config) -> list[str]:
    """Why tables that the config asks for are not spread, for the user."""
    return [
        f"{fact.lookup.weight} is sharded and gathered by FSDP, its rows are not spread: {fact.refused}"
        for fact in facts.tables
        if fact.refused and is_wanted(fact.lookup.numbers, config.embeddings, computed=fact.lookup.computed)
    ]


def without_tables(facts: ModelFacts, lookups: Sequence[Lookup]) -> ModelFacts:
    """The facts of the model that FSDP shards, without the tables whose rows are spread."""
    planned = {each.weight: each for each in lookups}
    chosen = [fact for fact in facts.tables if fact.lookup.weight in planned]
    if not chosen:
        return facts
    numbers = sum(fact.lookup.numbers for fact in chosen)
    kept = sum(fact.lookup.numbers for fact in chosen if not fact.is_trained)
    weights = list(facts.weights)
    for table in (fact for fact in chosen if not fact.is_apart):
        of, its = table.lookup, (table.lookup.rows, table.is_root, table.is_trained)
        for i, fact in enumerate(weights):
            is_its = (fact.rows, fact.is_root, fact.is_trained) == its and fact.site is None
            if is_its and fact.params >= of.numbers:
                weights[i] = replace(fact, params=fact.params - of.numbers)
                break
    frozen = dict(facts.frozen)
    if "" in frozen:
        frozen[""] = (frozen[""][0] - kept, frozen[""][1] - numbers)
    alone = [fact for fact in chosen if fact.is_apart]
    apart = [sum(fact.lookup.numbers for fact in alone if fact.is_trained is trained) for trained in (True, False)]
    return replace(
        facts, params_total=facts.params_total - numbers, apart=facts.apart - apart[0],
        apart_frozen=facts.apart_frozen - apart[1],
        params_embedding=facts.params_embedding - sum(fact.lookup.numbers for fact in chosen if fact.is_root),
        weights=tuple(fact for fact in weights if fact.params), frozen=frozen, tables=(),
        spread=tuple(replace(fact, lookup=planned[fact.lookup.weight]) for fact in chosen),
    )  # fmt: skip


def numbers_here(facts: ModelFacts, mesh: MeshSpec) -> dict[TableFact, int]:
    """Of each spread table, the numbers that the fullest rank stores (step 1)."""
    return {fact: mesh.share(fact.lookup.rows, Part.ROWS) * fact.lookup.width for fact in facts.spread}


def different(num_ids: float, num_rows: int) -> float:
    """How many of so many ids are expected to be different (step 2)."""
    return num_rows * -expm1(num_ids * log1p(-1 / num_rows)) if num_rows > 1 else min(1.0, num_ids)


def asked(lookup: Lookup, tokens: float) -> float:
    """Different rows that a rank asks for in a micro-batch, in all reads (step 2)."""
    return lookup.reads * different(tokens * lookup.ids_per_token / lookup.reads, lookup.rows)


def sent_forward(lookups: Sequence[Lookup], mesh: MeshSpec, tokens: float, element_bytes: int) -> float:
    """Bytes that a rank sends in the forward of a micro-batch: ids it asks for, and rows it is asked for (step 3)."""
    return _elsewhere(mesh) * sum(
        asked(each, tokens) * (ID_BYTES + each.width * element_bytes) for each in lookups
    )  # fmt: skip


def sent_backward(lookups: Sequence[Lookup], mesh: MeshSpec, tokens: float, element_bytes: int) -> float:
    """Bytes of gradients that a rank sends in the backward of a micro-batch (step 3)."""
    wide = max(FP32_BYTES, element_bytes)
    return _elsewhere(mesh) * sum(asked(each, tokens) * each.width * wide for each in lookups)


def row_buffers(facts: ModelFacts, mesh: MeshSpec, tokens: float, element_bytes: int) -> float:
    """Bytes of rows that a rank has at once for the largest read: those that it reads, and those that it gets."""
    if mesh.size(Part.ROWS) == 1:
        return 0.0
    wide = max(FP32_BYTES, element_bytes)
    of_reads = (asked(f.lookup, tokens) / f.lookup.reads * f.lookup.width for f in facts.spread)
    return max(of_reads, default=0.0) * (wide + element_bytes)


def state_of_rows(facts: ModelFacts, mesh: MeshSpec) -> int:
    """Bytes of the optimizer's state of the tables that are stepped by rows."""
    total = 0
    for fact in facts.trained_tables:
        if fact.lookup.by_rows:
            numbers = sum(
                fact.lookup.width if is_of_each else 1
                for is_of_each in ROW_STATE[RowRule(fact.lookup.by_rows)].values()
            )
            total += mesh.share(fact.lookup.rows, Part.ROWS) * numbers * max(FP32_BYTES, fact.number_bytes)
    return total


def kept_bytes(facts: ModelFacts, run: RunFacts) -> float:
    """Bytes that are kept beside the layers: rows that tokens read, until backward, unless they are looked up again,
    of all micro-batches that are in flight; and gradients by rows over the micro-batches of a step.
    """
    tokens, total = run.tokens_per_rank, 0.0
    for fact in facts.spread:
        if fact.is_root or run.checkpointing != "full":
            numbers = fact.lookup.width * run.compute_bytes + _PLACE_BYTES
            total += run.in_flight * tokens * fact.lookup.ids_per_token * numbers
    for fact in facts.trained_tables:
        if fact.lookup.by_rows:
            rows = different(tokens * run.accumulation * fact.lookup.ids_per_token, fact.lookup.rows)
            total += rows * fact.lookup.width * max(FP32_BYTES, fact.number_bytes)
    return total


def lookup_traffic(plan: Plan, facts: ModelFacts, tokens: int, element_bytes: int) -> LookupTraffic | None:
    """What lookups cost; None without any."""
    lookups, mesh = plan.lookups, plan.mesh
    if not lookups:
        return None
    read = sum(each.ids_per_token for each in lookups) * tokens
    stored = {fact.lookup.weight: here * fact.number_bytes for fact, here in numbers_here(facts, mesh).items()}
    return LookupTraffic(
        stored=max(sum(stored[each.weight] for each in here) for here in _of_ranks(plan)),
        forward=round(sent_forward(lookups, mesh, tokens, element_bytes) / mesh.pp),
        backward=round(sent_backward([f.lookup for f in facts.trained_tables], mesh, tokens, element_bytes) / mesh.pp),
        share=round(sum(asked(each, tokens) for each in lookups) / read, 4),
    )


def lookup_step(plan: Plan, tokens: float, micro_batches: int, element_bytes: int) -> Traffic:
    """Bytes that a rank sends in a step, by link class; of stages, one of that which sends the most."""

    def of(here: Sequence[Lookup]) -> float:
        sent = sent_forward(here, plan.mesh, tokens, element_bytes)
        if plan.adapters is None:  # else the tables are frozen
            sent += sent_backward(here, plan.mesh, tokens, element_bytes)
        return sent

    most, on_node = max(map(of, _of_ranks(plan))), near(plan.mesh, (Part.ROWS,))
    return Traffic(intra_node=on_node * most, inter_node=(1 - on_node) * most).times(micro_batches)


def _of_ranks(plan: Plan) -> list[Sequence[Lookup]]:
    """Those of the ranks of each place along pp."""
    if plan.pipeline is None:
        return [plan.lookups]
    stages = [plan.pipeline.stages_of(index) for index in range(plan.pipeline.ranks)]
    return [
        [each for each in plan.lookups if any(plan.pipeline.stages[i].holds(each.weight) for i in own)]
        for own in stages
    ]  # fmt: skip


def _elsewhere(mesh: MeshSpec) -> float:
    ranks = mesh.size(Part.ROWS)
    return (ranks - 1) / ranks
