"""What is printed of a plan: complete, folded, and inside 80 columns where the output is not a terminal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moecompile.mesh import MeshSpec
from moecompile.plan import (
    BalancePlan,
    DispatchPlan,
    ExpertPlacement,
    ExpertsPlan,
    ExpertsSite,
    FFNSite,
    LayerPlan,
    Plan,
    Remedy,
    RoutingPlan,
    reductions,
)
from moecompile.planner import ModelFacts, RunFacts
from moecompile.report.plan_tables import print_plan, verdict
from moecompile.report.text import bytes_text
from tests.plan.plans import a_plan
from tests.report.test_console import printed, words
from tests.tiny import estimate


def deepseek_v3() -> Plan:
    mesh = MeshSpec(num_nodes=256, ranks_per_node=8, ep=64, device="cuda")
    layers = [
        LayerPlan(
            site=FFNSite(
                fqn=f"model.layers.{i}.mlp", kind="gated", d_model=7168, d_ff=18432,
                bias_up=False, bias_down=False, activation="silu, mul", index=i - 3,
            ),
            experts=ExpertsPlan(
                num_routed=256, granularity=9, num_shared=1, d_expert=2048, d_shared=2048, init="virtual_group"
            ),
            routing=RoutingPlan(
                top_k=8, score="sigmoid", normalize=True, scale=2.5, groups=8, top_groups=4, group_score="topk_over_m"
            ),
            balance=BalancePlan(rule="bias", rate=1e-3),
            placement=ExpertPlacement(num_experts=256, ep=64),
            dispatch=DispatchPlan(kind="dedup"),
        )
        for i in range(3, 61)
    ]  # fmt: skip
    facts = ModelFacts(params_total=42 * 10**9, params_embedding=2 * 10**9, num_layers=61, vocab_size=129280)
    predicted = estimate(layers, mesh, facts, RunFacts(tokens_per_rank=4096), memory_bytes=80 * 2**30)
    return Plan(mesh=mesh, layers=tuple(layers), reductions=reductions(mesh), estimate=predicted)


def test_58_equal_layers_are_one_row() -> None:
    plan = deepseek_v3()
    text = printed(lambda console: print_plan(plan, console))
    assert text.count("model.layers") == 1
    assert "model.layers.{3..60}.mlp" in text
    for shown in (
        plan.hash, "58 sites", "256 nodes x 8 ranks = 2048 on cuda", "ep 64, edp 32, dp_replicate 1, dp_shard 2048",
        "7168 x 18432", "256 x 2048", "+ shared 2048", "4 per EP rank", "sigmoid top-8", "4 of 8 groups",
        "by topk_over_m", "scale 2.5", "rate 0.001", "virtual_group",
        "dedup, forward: exchange_counts, all_to_all, exchange_assignments, all_to_all",
    ):  # fmt: skip
        assert shown in text
    assert len(text.splitlines()) < 45


def test_a_layer_that_differs_has_its_own_row() -> None:
    plan = deepseek_v3()
    wider = replace(plan.layers[10], routing=replace(plan.layers[10].routing, scale=1.0))
    changed = replace(plan, layers=(*plan.layers[:10], wider, *plan.layers[11:]))
    text = printed(lambda console: print_plan(changed, console))
    assert "{3..12,14..60}" in text
    assert "model.layers.13.mlp" in text


def test_the_estimate_says_whether_it_fits() -> None:
    plan = deepseek_v3()
    assert plan.estimate is not None
    text = printed(lambda console: print_plan(plan, console))
    assert "inter-node per token and layer" in text
    row = next(line for line in text.splitlines() if line.count("GiB") > 1)
    assert row.split()[-1] == "no"
    assumes = plan.estimate.assumes
    assert assumes is not None
    assert f"of {assumes.memory_bytes / 2**30:g} GiB" in text
    assert f"{assumes.tokens_per_rank:,} tokens a rank (1 sequence of {assumes.seq_len:,})" in words(text)
    gib = 2**30
    offered = Remedy(change="mesh.ep=8", total=60 * gib, uneven=70 * gib, seconds=3.0, fits="yes")
    even = Remedy(change="mesh.ep=64", total=60 * gib, uneven=90 * gib, seconds=2.0, fits="if even")
    uneven, asked = plan.estimate.memory_bytes_per_rank.total + gib, "tried mesh.ep (9 layouts)"
    made = replace(
        plan.estimate, remedies=(offered, even), tried=asked, memory_bytes_uneven=uneven, expected_load=6.72,
        expected_from="zipf, the median layer",
    )  # fmt: skip
    text = words(printed(lambda console: print_plan(replace(plan, estimate=made), console)))
    for shown in (
        "60 GiB 70 GiB 3 s yes mesh.ep=8", "60 GiB 90 GiB 2 s if even mesh.ep=64", asked,
        "on a rank with 6.72 x the average load (expected: zipf, the median layer)", f": {made.largest}",
    ):  # fmt: skip
        assert shown in text, shown
    needed = f"{made.memory_bytes_per_rank.total / gib:.3g} of 80 GiB, {bytes_text(uneven)} on a rank with 6.72 x"
    assert verdict(made) == f"DOES NOT FIT: {needed} the average load; add: mesh.ep=8"
    only = replace(made, fits="if even", remedies=(even,))
    assert verdict(only) == (
        f"FITS ONLY IF THE LOAD IS EVEN: {needed} the average load; add: mesh.ep=64 (fits only if the load is even)"
    )
    assert verdict(replace(only, remedies=())).endswith("; nothing that was tried fits")
    assert verdict(replace(made, fits="yes")) == f"fits: {needed} the average load"
    tiny = replace(made.memory_bytes_per_rank, **dict.fromkeys(("weights", "grads", "optimizer", "activations"), 2**20))
    assert verdict(replace(made, fits="yes", memory_bytes_per_rank=replace(tiny, dispatch=0, apart=0))).startswith(
        "fits: 4 MiB of 80 GiB, "
    )
    roomy = replace(plan, estimate=replace(plan.estimate, fits="yes"))
    assert "yes" in printed(lambda console: print_plan(roomy, console)).split()


def test_the_plan_says_whether_padding_is_a_token() -> None:
    plan = deepseek_v3()
    said = "padded tokens are routed like any other"
    assert said in words(printed(lambda console: print_plan(plan, console)))
    masked = replace(plan, layers=tuple(replace(layer, mask_padding=True) for layer in plan.layers))
    text = words(printed(lambda console: print_plan(masked, console)))
    assert "padding no token: not routed, not counted" in text and said not in text


def test_a_plan_without_estimate_or_layers_prints() -> None:
    empty = Plan(mesh=MeshSpec(), layers=(), reductions=reductions(MeshSpec()))
    assert "0 MoE layers" in printed(lambda console: print_plan(empty, console))


def existing_layer(index: int) -> LayerPlan:
    """Experts that the model has already, with groups and a bias rule."""
    return LayerPlan(
        site=ExpertsSite(
            fqn=f"model.layers.{index}.mlp.experts", d_model=7168, d_ff=2048, num_experts=256, top_k=8, groups=8,
            top_groups=4, correction_bias=True, activation="SiLU", index=index,
        ),
        experts=ExpertsPlan(num_routed=256, granularity=1, num_shared=0, d_expert=2048, d_shared=0, init="existing"),
        routing=RoutingPlan(
            top_k=8, score="own", normalize=False, scale=1.0, groups=8, top_groups=4, group_score="max"
        ),
        balance=BalancePlan(rule="bias", rate=1e-3),
        placement=ExpertPlacement(num_experts=256, ep=64),
        dispatch=DispatchPlan(kind="dedup"),
    )  # fmt: skip


def test_experts_of_the_model_are_told_from_dense_ffns() -> None:
    plan = deepseek_v3()
    own = replace(plan, layers=tuple(existing_layer(i) for i in range(3)))
    text = printed(lambda console: print_plan(own, console, ["read from the model: experts.num_routed=256"]))
    assert "expert FFN" in text and "dense FFN" not in text
    row = words(text.split("dispatch")[1].split("dedup, forward")[0])
    for part in ("gated", "256 x 2048", "own top-8", "4 of 8 groups", "balance: bias", "existing", "SiLU", "3 sites"):
        assert part in row
    assert "by max" not in row
    assert text.rstrip().endswith("note  read from the model: experts.num_routed=256")
    both = replace(plan, layers=(plan.layers[0], existing_layer(60)))
    assert " FFN" in printed(lambda console: print_plan(both, console)).replace("expert FFN", "").replace(
        "dense FFN", ""
    )


def test_how_experts_are_made_is_shown() -> None:
    plan = deepseek_v3()
    made = replace(plan.layers[0].experts, init="drop", drop_ratio=0.25, weight_scaling="expected")
    changed = replace(plan, layers=(replace(plan.layers[0], experts=made),))
    text = printed(lambda console: print_plan(changed, console))
    assert "drop 0.25" in text and "scaled: expected" in text
    assert "scaled" not in printed(lambda console: print_plan(plan, console))


def test_everything_that_is_decided_about_the_router_is_shown() -> None:
    plan = deepseek_v3()
    routing = replace(
        plan.layers[0].routing,
        score="softmax",
        bias=True,
        capacity_factor=1.25,
        drop="score",
        jitter=0.01,
        workload="zipf",
    )
    balance = BalancePlan(rule="none", rate=0.0, micro_batch=0.01, z=0.001)
    layers = tuple(replace(layer, routing=routing, balance=balance) for layer in plan.layers)
    text = words(printed(lambda console: print_plan(replace(plan, layers=layers), console)))
    for part in (
        "with bias", "capacity 1.25", "by score", "jitter 0.01", "workload: zipf", "micro_batch loss", "0.01", "z loss",
    ):  # fmt: skip
        assert part in text, part


def test_experts_that_ranks_share_are_shown_with_their_bytes() -> None:
    """58 layers, a gather and a reduction of four experts of 3 x 7168 x 2048 each, in fp32."""
    plan = deepseek_v3()
    text = words(printed(lambda console: print_plan(plan, console)))
    wanted = "experts 1.19 GiB on each of 32 ranks that share them; gathering them receives 36.9 GiB, reducing their gradients"
    assert f"{wanted} sends 36.9 GiB" in text
    assert plan.estimate is not None and plan.estimate.expert_shards is not None
    shards = replace(plan.estimate.expert_shards, times_even=2.5, ranks=5)
    padded = replace(plan, estimate=replace(plan.estimate, expert_shards=shards))
    text = words(printed(lambda console: print_plan(padded, console)))
    assert (
        "ranks that share them, up to 2.50 times an even share, as no dim of some is a multiple of 5; gathering" in text
    )


def test_lending_is_shown_with_slots_prices_memory_and_bytes() -> None:
    assert "lend" not in printed(lambda console: print_plan(a_plan(), console))
    shown = printed(lambda console: print_plan(a_plan("dispatch.balance=lend"), console))
    # An expert: two matrices of 16 x 12 in, one out with its bias, 592 numbers, 2,368 bytes.
    rows = [" ".join(row.split()) for row in shown.splitlines()]
    assert any(row.endswith("lends: 2 slots") for row in rows)
    assert any(row.endswith("from 69 rows") for row in rows) and any(row.endswith("far 69 rows") for row in rows)
    text = " ".join(rows)
    assert (
        "lending an expert is 2.31 KiB; a rank borrows up to 4.62 KiB per layer and micro-batch, and as much gradient "
        "returns; slots need 13.9 KiB"
    ) in text
    assert "forward: gather_counts, exchange_counts, lend_experts, all_to_all, exchange_assignments" in text


@pytest.mark.parametrize(("overlap", "chunks", "shown"), [("shared", 1, "shared"), ("chunks", 2, "2 chunks")])
def test_the_dispatch_says_what_is_in_flight(overlap: str, chunks: int, shown: str) -> None:
    plan = deepseek_v3()
    assert "overlap" not in printed(lambda console: print_plan(plan, console))
    dispatch = DispatchPlan(kind="dedup", overlap=overlap, chunks=chunks)
    plan = replace(plan, layers=tuple(replace(layer, dispatch=dispatch) for layer in plan.layers))
    rows = printed(lambda console: print_plan(plan, console)).splitlines()
    at = next(i for i, row in enumerate(rows) if row.rstrip().endswith("overlap:"))
    assert rows[at + 1].rstrip().endswith(shown)


def test_the_dispatch_says_that_rows_are_in_eight_bits() -> None:
    """What is rounded without it is what the precision says."""
    shown = printed(lambda console: print_plan(a_plan("dispatch.wire_dtype=fp8_128"), console))
    assert any(row.rstrip().endswith("rows fp8_128") for row in shown.splitlines())
    assert "rows bf16" not in printed(lambda console: print_plan(a_plan("dispatch.wire_dtype=bf16"), console))
