"""Each layout that a search proposes is what a plan with its settings is: bytes of a rank and seconds of a step."""

from __future__ import annotations

import pytest

from moecompile.compose import compose_config
from moecompile.plan import FFNSite, Lookup, Plan
from moecompile.planner import ModelFacts
from moecompile.planner.build_plan import build_plan
from moecompile.planner.cost_model.forecast import step_of
from moecompile.planner.cost_model.inputs import inputs_of
from moecompile.planner.cost_model.shapes import Experts, Layer, ModelShape
from moecompile.planner.params import TableFact
from moecompile.planner.search.chosen import with_settings
from moecompile.planner.search.run import search

LAYERS, D, F, VOCAB, ROWS, WIDTH = 2, 1024, 2048, 1000, 2_000_000, 16
SITES = [
    FFNSite(
        fqn=f"layers.{i}.mlp",
        kind="gated",
        d_model=D,
        d_ff=F,
        bias_up=False,
        bias_down=False,
        activation="silu",
        index=i,
    )
    for i in range(LAYERS)
]
OUTSIDE = 2 * VOCAB * D + ROWS * WIDTH
TABLE = Lookup(weight="table.weight", module="table", rows=ROWS, width=WIDTH, computed=True, ids_per_token=4.0, reads=1)
FACTS = ModelFacts(
    params_total=LAYERS * (3 * D * F + 4 * D * D) + OUTSIDE, params_embedding=OUTSIDE, num_layers=LAYERS,
    vocab_size=VOCAB, d_model=D, tables=(TableFact(lookup=TABLE, is_root=True),),
)  # fmt: skip


def shape(plan: Plan) -> ModelShape:
    one = plan.layers[0]
    ffn = Experts(
        experts=one.experts.num_routed, top_k=one.routing.top_k, d_expert=one.experts.d_expert, always=4 * D * D
    )
    return ModelShape(
        name="", hidden=D, vocab=VOCAB, layers=(Layer(mixer=None, ffn=ffn, count=LAYERS),), weight_bytes=4
    )


@pytest.mark.parametrize(
    "given",
    [
        ["dispatch.overlap=auto"],
        ["dispatch.overlap=chunks"],
        ["dispatch.kind=auto", "data.seq_len=32", "experts.num_routed=64", "routing.top_k=8"],
        ["embeddings.min_numbers=1000"],  # a larger micro-batch repeats more of the ids
    ],
)
def test_what_the_micro_batch_decides(given: list[str]) -> None:
    config = compose_config([
        "recipe=mixtral_ep", "mesh=h100_2x8", "balance=none", "experts.num_routed=16", "data.seq_len=128",
        "data.global_batch_size=256", "search.described=false", "search.axes=[ep,micro_batch]", *given,
    ])  # fmt: skip
    config.mesh.ep, config.data.micro_batch_size = 16, 1
    found = search(SITES, FACTS, config, shape, rounds=False)
    assert len({each.settings["data.micro_batch_size"] for each in found.runs}) > 2
    for each in found.runs:
        chosen = with_settings(config, each.settings)
        plan = build_plan(SITES, chosen, FACTS, shape)
        assert sum(step_of(inputs_of(shape(plan), plan, chosen)).values()) == pytest.approx(each.seconds, rel=1e-12)
        assert plan.estimate is not None
        assert plan.estimate.memory_bytes_per_rank.total == each.memory_bytes
        assert plan.estimate.memory_bytes_uneven == each.memory_bytes_uneven
