"""Which tables are spread, what is left for FSDP to shard, and what lookups send, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from moecompile.compose import compose_config
from moecompile.errors import ConfigError, PlanError
from moecompile.models.build import example_inputs
from moecompile.pipeline import compile_model, make_plan, transform
from moecompile.pipeline.captured import planning_facts
from moecompile.pipeline.shape import shape_of_model
from moecompile.plan import Lookup, Plan, from_yaml, to_yaml
from moecompile.planner.cost_model.forecast import forecast_plan
from moecompile.planner.lookups import (
    different,
    plan_lookups,
    sent_backward,
    sent_forward,
    state_of_rows,
    table_notes,
    without_tables,
)  # fmt: skip
from moecompile.planner.memory import own_params
from tests.table_models import Layered, build

BASE = ["experts.num_routed=4", "routing.top_k=2", "data.seq_len=16", "mesh=cpu_1x4"]
TABLES = {"tables.heads.heads.0.weight": 37 * 8, "tables.heads.heads.1.weight": 38 * 8, "tables.indexed.table": 74 * 16,
          "tables.selected.holder.weight": 41 * 16}  # fmt: skip


def planned(*overrides: str) -> Plan:
    model = build()
    return make_plan(model, [*BASE, *overrides], example=example_inputs(model, 16))


def names(plan: Plan) -> list[str]:
    return [each.weight for each in plan.lookups]


def test_tables_of_computed_ids_are_spread_where_they_are_large() -> None:
    assert names(planned()) == []
    assert names(planned("embeddings.min_numbers=300")) == list(TABLES)[1:]
    assert names(planned("embeddings.min_numbers=300", "embeddings.shard=ep")) == [
        "model.embed_tokens.weight", *list(TABLES)[1:],
    ]  # fmt: skip
    assert names(planned("embeddings.min_numbers=1", "embeddings.shard=none")) == []


def test_the_hash_is_as_before_without_tables_and_another_with() -> None:
    without, spread = planned(), planned("embeddings.min_numbers=300")
    assert without.hash == planned("embeddings.shard=none").hash != spread.hash
    assert spread.hash != planned("embeddings.min_numbers=300", "embeddings.optimizer=lazy_adamw").hash
    assert from_yaml(to_yaml(spread)) == spread


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["embeddings.shard=ep"], r"embeddings.min_numbers=16777216: no embedding has so many numbers; the largest of 5 "),
        (["embeddings.optimizer=lazy_adamw"], "embeddings.optimizer=lazy_adamw: steps rows of spread tables"),
        (["embeddings.min_numbers=0"], "embeddings.min_numbers=0"),
    ],
)  # fmt: skip
def test_what_is_not_possible_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(*overrides)


def test_fsdp_shards_the_rest_and_the_estimate_counts_both() -> None:
    whole, spread = planned("embeddings.shard=none"), planned("embeddings.min_numbers=1")
    assert whole.estimate is not None and spread.estimate is not None
    assert spread.estimate.params_total == whole.estimate.params_total
    assert whole.estimate.weight_traffic is not None and spread.estimate.weight_traffic is not None
    less = whole.estimate.weight_traffic.gathered - spread.estimate.weight_traffic.gathered
    assert less >= 3 / 4 * 4 * sum(TABLES.values())  # what a rank of four does not gather, in fp32, but for padding
    stored = 4 * sum(-(-rows // 4) * width for rows, width in ((37, 8), (38, 8), (74, 16), (41, 16)))
    assert spread.estimate.lookup_bytes is not None and spread.estimate.lookup_bytes.stored == stored
    assert whole.estimate.lookup_bytes is None


def test_facts_without_tables() -> None:
    model = build()
    config = compose_config([*BASE, "embeddings.min_numbers=1"])
    _, facts = planning_facts(model, config, example_inputs(model, 16))
    lookups = [fact.lookup for fact in facts.tables if fact.lookup.computed]
    left = without_tables(facts, lookups)
    assert facts.params_total - left.params_total == sum(TABLES.values())
    assert sum(w.params for w in facts.weights) - sum(w.params for w in left.weights) == sum(TABLES.values())
    outside = sum(fact.lookup.numbers for fact in facts.tables if fact.lookup.computed and fact.is_root)
    assert facts.params_embedding - left.params_embedding == outside > 0
    assert [fact.lookup.weight for fact in left.spread] == list(TABLES)
    assert own_params((), planned().mesh, left, 0, trained=True) < own_params(
        (), planned().mesh, facts, 0, trained=True
    )  # type: ignore[arg-type]


def test_bytes_by_hand() -> None:
    mesh = planned().mesh
    lookup = Lookup(weight="t", module="m", rows=1000, width=8, computed=True, ids_per_token=2.0)
    ids = torch.randint(1000, (200, 64), generator=torch.Generator().manual_seed(0))
    counted = sum(len(set(row.tolist())) for row in ids) / 200
    assert different(64, 1000) == pytest.approx(counted, rel=0.005)
    assert sent_forward([lookup], mesh, 32, 2) == pytest.approx(3 / 4 * different(64, 1000) * (4 + 8 * 2))
    assert sent_backward([lookup], mesh, 32, 2) == pytest.approx(3 / 4 * different(64, 1000) * 8 * 4)
    one = replace(mesh, ranks_per_node=1, ep=1)
    assert sent_forward([lookup], one, 32, 2) == 0


def test_a_table_that_is_left_alone_is_named() -> None:
    model: Any = build()
    model.tables["heads"].heads[0].max_norm = 1.0
    config = compose_config([*BASE, "embeddings.min_numbers=1"])
    _, facts = planning_facts(model, config, example_inputs(model, 16))
    (note,) = table_notes(facts, config)
    assert note.startswith("tables.heads.heads.0.weight is sharded and gathered by FSDP") and "max_norm" in note


def test_a_plan_for_another_model_names_the_table() -> None:
    plan, model = planned("embeddings.min_numbers=300"), build()
    del model.tables["indexed"]
    with pytest.raises(
        PlanError, match=r"lookups=tables.indexed.table: is planned to be spread, and tables.indexed is no"
    ):
        compile_model(model, example=example_inputs(model, 16), plan=plan)
    assert not any(isinstance(module, fx.GraphModule) for module in model.modules())
    with pytest.raises(PlanError, match="rows of tables are spread in a model, not in a graph alone"):
        transform(fx.symbolic_trace(nn.Linear(2, 2)), plan)


def test_lookups_take_time_and_tables_none() -> None:
    model = build()
    seconds = {}
    for shard in ("none", "auto"):
        config = compose_config([*BASE, "embeddings.min_numbers=1", f"embeddings.shard={shard}"])
        plan = make_plan(model, config, example=example_inputs(model, 16))
        parts = forecast_plan(shape_of_model(model, plan), plan, config).parts
        seconds[shard] = parts.get("rows of tables", 0.0), parts["dense products"]
    assert seconds["auto"][0] > 0 == seconds["none"][0]
    assert seconds["auto"][1] <= seconds["none"][1]


def test_stages_have_tables_of_their_own_which_are_no_products() -> None:
    model: Any = Layered()
    model.layers[0].table = nn.Embedding(5001, 16)  # dearer than all layers, if it were one
    words = [*BASE, "mesh.pp=2", "embeddings.min_numbers=1", "embeddings.shard=ep"]
    plan = make_plan(model, words, example=example_inputs(model, 16))
    assert plan.pipeline is not None and plan.pipeline.layout == "Et*3|tL"
    assert plan.estimate is not None and plan.estimate.lookup_bytes is not None and plan.estimate.assumes is not None
    cost, halves = plan.estimate.lookup_bytes, [-(-rows // 2) for rows in (300, 5001, 38, 39)]
    assert cost.stored == 4 * 16 * sum(halves)
    sent = sent_forward(plan.lookups, plan.mesh, plan.estimate.assumes.tokens_per_rank, 4)
    assert cost.forward == round(sent / 2) and len(plan.lookups) == 5
    whole = make_plan(model, ["mesh.pp=1" if word == "mesh.pp=2" else word for word in words],
                      example=example_inputs(model, 16))  # fmt: skip
    assert whole.estimate is not None and whole.estimate.params_total == plan.estimate.params_total


def test_state_by_rows_is_planned_as_it_is_made() -> None:
    for rule, numbers in (("lazy_adamw", lambda width: 2 * width), ("rowwise_adagrad", lambda width: 1)):
        model = build()
        config = compose_config([*BASE, "embeddings.min_numbers=300", f"embeddings.optimizer={rule}"])
        _, facts = planning_facts(model, config, example_inputs(model, 16))
        lookups, facts = plan_lookups(planned().mesh, facts, config)
        rows = [(-(-each.rows // 4), each.width) for each in lookups]
        assert state_of_rows(facts, planned().mesh) == 4 * sum(own * numbers(width) for own, width in rows)
        adapted = replace(facts, adapters=(9, False))
        assert state_of_rows(adapted, planned().mesh) == 0 and adapted.trained_tables == ()
