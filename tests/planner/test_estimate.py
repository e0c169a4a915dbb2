"""Parameters and memory of a small model against numbers worked out by hand; what a plan says to change where it does not
fit is what the plan of the changed config says.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import moecompile
from moecompile.mesh import MeshSpec
from moecompile.plan import (
    BalancePlan,
    DispatchPlan,
    Estimate,
    ExpertPlacement,
    ExpertsPlan,
    ExpertsSite,
    FFNSite,
    LayerPlan,
    MemoryEstimate,
    RoutingPlan,
    Traffic,
)
from moecompile.planner import ModelFacts, RunFacts, Wire, forward_traffic
from moecompile.planner.params import Expected, ffn_params, model_params
from tests.tiny import estimate

# Two layers of 50 + ffn parameters, ffn = 3 * 8 * 16 = 384, and a tied embedding of 100 * 8.
FACTS = ModelFacts(params_total=1668, params_embedding=800, num_layers=2, vocab_size=100)
RUN = RunFacts(tokens_per_rank=10)
ONE_RANK = MeshSpec()
FOUR_RANKS = MeshSpec(num_nodes=2, ranks_per_node=2, ep=4)


def site(kind: str = "gated", *, bias: bool = False) -> FFNSite:
    return FFNSite(
        fqn="layers.0.mlp", kind=kind, d_model=8, d_ff=16, bias_up=bias, bias_down=bias, activation="silu", index=0
    )


def layer(ep: int = 1, kind: str = "local", *, d_expert: int = 16, d_shared: int = 0) -> LayerPlan:
    return LayerPlan(
        site=site(),
        experts=ExpertsPlan(
            num_routed=4, granularity=16 // d_expert, num_shared=d_shared // d_expert,
            d_expert=d_expert, d_shared=d_shared, init="random",
        ),
        routing=RoutingPlan(
            top_k=2, score="softmax", normalize=True, scale=1.0, groups=1, top_groups=1, group_score="top2"
        ),
        balance=BalancePlan(rule="none", rate=0.0),
        placement=ExpertPlacement(num_experts=4, ep=ep),
        dispatch=DispatchPlan(kind=kind),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "bias", "expected"),
    [
        ("gated", False, 3 * 8 * 16),
        ("gated", True, 3 * 8 * 16 + 2 * 16 + 8),
        ("up_down", False, 2 * 8 * 16),
        ("up_down", True, 2 * 8 * 16 + 16 + 8),
    ],
)
def test_ffn_params(kind: str, bias: bool, expected: int) -> None:
    assert ffn_params(site(kind, bias=bias), 16) == expected
    assert ffn_params(site(kind, bias=bias), 0) == 0


def test_params_total_and_active() -> None:
    found = estimate([layer()], ONE_RANK, FACTS, RUN, memory_bytes=1e9)
    assert found.params_total == 1668 - 384 + 4 * 384 + 4 * 8
    assert found.params_active == 1668 - 384 + 2 * 384 + 4 * 8


def test_the_shared_expert_is_always_active() -> None:
    found = estimate([layer(d_expert=8, d_shared=8)], ONE_RANK, FACTS, RUN, memory_bytes=1e9)
    assert found.params_total == 1668 - 384 + 4 * 192 + 192 + 4 * 8
    assert found.params_active == 1668 - 384 + 2 * 192 + 192 + 4 * 8


def test_one_rank_shards_nothing() -> None:
    found = estimate([layer()], ONE_RANK, FACTS, RUN, memory_bytes=1e9)
    params = 1284 + 1536 + 32
    numbers = 2 * 12 * 8 + 3 * 100 + (2 * (2 * 8 + 4 * 16) + 2 * 4) + 4 * 16  # residuals, logits, MoE and dense layer
    assert found.memory_bytes_per_rank == MemoryEstimate(
        weights=4 * params, grads=4 * params, optimizer=8 * params, activations=4 * 10 * numbers, dispatch=0,
        apart=4 * params,  # the fullest moment is that of the logits, before there are gradients
    )  # fmt: skip
    assert found.bytes_per_token_per_layer == Traffic(intra_node=0.0, inter_node=0.0)


def test_four_ranks_shard_and_gather() -> None:
    found = estimate([layer(4, "flat")], FOUR_RANKS, FACTS, RUN, memory_bytes=1e9)
    own = 1284 // 4 + 1536 // 4
    unsharded = 800 + (1668 - 800 - 384) // 2 + 1536 // 4  # root, dense part of a layer, the rank's experts
    memory = found.memory_bytes_per_rank
    assert memory.weights == 4 * (own + unsharded + 32)
    assert memory.grads == 4 * (own - 800 // 4 + 2 * 800 + 32)  # shards of layers, when the root is reduced in a buffer
    assert memory.optimizer == 8 * (own + 32)
    assert memory.dispatch == 2 * (10 * 2) * 8 * 4


def test_replicas_are_not_sharded_over() -> None:
    mesh = MeshSpec(num_nodes=2, ranks_per_node=2, ep=2, dp_replicate=2)
    found = estimate([layer(2, "flat")], mesh, FACTS, RUN, memory_bytes=1e9)
    assert found.memory_bytes_per_rank.optimizer == 8 * (1284 // 2 + 1536 // 2 + 32)


def test_bf16_halves_all_but_the_router() -> None:
    wide, narrow = (
        estimate(
            [layer()],
            ONE_RANK,
            replace(FACTS, bytes_per_param=size),
            replace(RUN, compute_bytes=size),
            memory_bytes=1e9,
        )
        for size in (4, 2)
    )
    assert narrow.memory_bytes_per_rank.weights == 2 * (1284 + 1536) + 4 * 32
    assert narrow.memory_bytes_per_rank.optimizer == 4 * (1284 + 1536) + 8 * 32
    assert wide.memory_bytes_per_rank.optimizer == 8 * (1284 + 1536 + 32)


def test_accumulation_keeps_the_gradients_of_everything_until_they_are_reduced() -> None:
    one, four = (
        estimate([layer(4, "flat")], FOUR_RANKS, FACTS, replace(RUN, accumulation=n), memory_bytes=1e9) for n in (1, 4)
    )
    assert four.memory_bytes_per_rank.grads == 4 * (32 + 1284 + 1536 // 4)
    # At the logits the dense part of the layer that comes next is whole, no experts are, and nothing is exchanged.
    memory = four.memory_bytes_per_rank
    assert one.memory_bytes_per_rank.apart > memory.apart == 4 * 1536 // 4 + memory.dispatch
    same = {"grads": one.memory_bytes_per_rank.grads, "apart": one.memory_bytes_per_rank.apart}
    assert replace(four.memory_bytes_per_rank, **same) == one.memory_bytes_per_rank


def test_accumulated_gradients_of_a_layer_are_made_beside_those_that_are_there() -> None:
    """Where the logits are small, and a layer's backward is the fullest moment."""
    small = replace(FACTS, vocab_size=1, num_layers=1)
    one, four = (
        estimate([layer(4, "flat")], FOUR_RANKS, small, replace(RUN, accumulation=n), memory_bytes=1e9) for n in (1, 4)
    )
    assert one.memory_bytes_per_rank.apart > 0 and four.memory_bytes_per_rank.apart == -4 * 1536 // 4


def test_rows_of_a_fuller_rank_take_more_up_to_the_capacity() -> None:
    def total(load: float, capacity: float | None = None) -> int:
        planned = layer(4, "flat")
        if capacity is not None:
            routing = replace(planned.routing, capacity_factor=capacity, drop="position")
            planned = replace(planned, routing=routing)
        run = replace(RUN, row_load=load)
        return estimate([planned], FOUR_RANKS, FACTS, run, memory_bytes=1e9).memory_bytes_per_rank.total

    assert total(1) < total(2) < total(4) == total(9)
    assert total(9, capacity=1.25) == total(1.25)
    expected = Expected(load=2.0, source="a guess")
    found = estimate([layer(4, "flat")], FOUR_RANKS, FACTS, RUN, memory_bytes=1e9, expected=expected)
    assert found.memory_bytes_uneven == total(2)
    assert (found.expected_load, found.expected_from) == (2.0, "a guess")
    for even in ({"choice": "expert"}, {"top_k": 4, "groups": 4, "top_groups": 4, "even_groups": True}):
        planned = replace(layer(4, "flat"), routing=replace(layer().routing, **even))
        made = estimate([planned], FOUR_RANKS, FACTS, RUN, memory_bytes=1e9, expected=expected)
        assert made.memory_bytes_uneven == made.memory_bytes_per_rank.total


def test_layers_that_are_computed_again_keep_their_inputs_and_what_was_received() -> None:
    moe, rows = 12 * 8 + (2 * (2 * 8 + 4 * 16) + 2 * 4), 2 * 2 * 8  # top-2: two rows there, two back
    backward = 2 * (2 + 1) * 8 + 2 * 16  # two rows and one token, in and out; two hidden rows
    for checkpointing, kept in (("full", 0), ("keep_exchanges", rows)):
        run = replace(RUN, checkpointing=checkpointing)
        found = estimate([layer(4, "flat")], FOUR_RANKS, FACTS, run, memory_bytes=1e9)
        assert found.memory_bytes_per_rank.activations == 4 * 10 * (2 * 8 + kept + max(3 * 100, moe + backward))
        again = found.bytes_per_token_per_layer if checkpointing == "full" else Traffic(intra_node=0.0, inter_node=0.0)
        assert found.resent_bytes_per_token_per_layer == again


def test_bf16_parameters_are_gathered_narrow_and_stored_wide() -> None:
    wide, narrow = (
        estimate([layer(4, "flat")], FOUR_RANKS, FACTS, replace(RUN, compute_bytes=size), memory_bytes=1e9)
        for size in (4, 2)
    )
    unsharded = 800 + (1668 - 800 - 384) // 2 + 1536 // 4
    assert wide.memory_bytes_per_rank.weights - narrow.memory_bytes_per_rank.weights == 2 * unsharded
    assert narrow.memory_bytes_per_rank.optimizer == wide.memory_bytes_per_rank.optimizer
    logits = 4 * 3 * 100 * 10  # fp32 in both
    rest = [each.memory_bytes_per_rank.activations - logits for each in (narrow, wide)]
    assert 2 * rest[0] == rest[1]


def test_fits_means_no_more_than_the_memory_with_the_load_that_is_to_be_expected() -> None:
    def found(memory: int) -> Estimate:
        expected = Expected(load=2.0, source="a guess")
        return estimate([layer(4, "flat")], FOUR_RANKS, FACTS, RUN, memory_bytes=memory, expected=expected)

    even, uneven = found(0).memory_bytes_per_rank.total, found(0).memory_bytes_uneven
    cases = ((even - 1, "no"), (even, "if even"), (uneven - 1, "if even"), (uneven, "yes"))
    assert [found(memory).fits for memory, _ in cases] == [fits for _, fits in cases]


@pytest.mark.parametrize(
    ("mesh", "facts", "run", "part", "words"),
    [
        (FOUR_RANKS, FACTS, replace(RUN, accumulation=4, compute_bytes=2), "grads", "fp32, not sharded, over 4 micro-batches"),
        (ONE_RANK, FACTS, RUN, "optimizer", "adamw in fp32, for this rank's shards"),
        (FOUR_RANKS, replace(FACTS, frozen={"": (1284, 1668)}), RUN, "weights", "this rank's shards, and layers that are whole one at a time"),
        (FOUR_RANKS, FACTS, replace(RUN, tokens_per_rank=4096), "activations", "what backward needs of 4,096 tokens, kept for 2 layers"),
        (FOUR_RANKS, replace(FACTS, vocab_size=999), replace(RUN, tokens_per_rank=4096, checkpointing="full"), "activations", "logits of 4,096 tokens over 999 words, 3 times in fp32"),
        (FOUR_RANKS, FACTS, replace(RUN, tokens_per_rank=4096, checkpointing="full"), "activations", "one layer's forward and backward with 4,096 tokens"),
    ],
)  # fmt: skip
def test_the_largest_part_is_told_in_words(
    mesh: MeshSpec, facts: ModelFacts, run: RunFacts, part: str, words: str
) -> None:
    made = layer() if mesh == ONE_RANK else layer(4, "flat")
    run = replace(run, tokens_per_rank=1 if part != "activations" else run.tokens_per_rank)
    found = estimate([made], mesh, facts, run, memory_bytes=1e9)
    assert (found.memory_bytes_per_rank.largest, found.largest) == (part, words)


def test_traffic_is_the_mean_over_layers() -> None:
    layers = [layer(4, "flat"), replace(layer(4, "dedup"), site=replace(site(), fqn="layers.1.mlp"))]
    wire = Wire(d_model=8, tokens_per_rank=10)
    flat, dedup = (forward_traffic(x.dispatch.kind, x.placement, x.routing, FOUR_RANKS, wire) for x in layers)
    found = estimate(layers, FOUR_RANKS, FACTS, RUN, memory_bytes=1e9).bytes_per_token_per_layer
    assert found.inter_node == pytest.approx((flat.inter_node + dedup.inter_node) / 2)
    assert found.intra_node == pytest.approx((flat.intra_node + dedup.intra_node) / 2)


def test_a_plan_without_layers_is_the_dense_model() -> None:
    found = estimate([], FOUR_RANKS, FACTS, RUN, memory_bytes=1e9)
    assert found.params_total == found.params_active == FACTS.params_total
    assert found.bytes_per_token_per_layer == Traffic(intra_node=0.0, inter_node=0.0)


def test_importing_the_planner_does_not_import_torch() -> None:
    code = "import sys, moecompile.planner; assert not {'torch', 'hydra', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def existing(num_experts: int = 4, d_ff: int = 16) -> LayerPlan:
    """Experts that the model has already: they and their router are part of its parameters."""
    return replace(
        layer(),
        site=ExpertsSite(
            fqn="layers.0.mlp.experts",
            d_model=8,
            d_ff=d_ff,
            num_experts=num_experts,
            top_k=2,
            activation="silu",
            index=0,
        ),
        experts=ExpertsPlan(
            num_routed=num_experts, granularity=1, num_shared=0, d_expert=d_ff, d_shared=0, init="existing"
        ),
        routing=replace(layer().routing, score="own"),
        placement=ExpertPlacement(num_experts=num_experts, ep=1),
    )


def test_experts_of_the_model_are_counted_once() -> None:
    """2000 parameters, of which one layer's experts are 4 * 384: nothing is added, and a token uses two of them."""
    facts = replace(FACTS, params_total=2000)
    found = estimate([existing()], ONE_RANK, facts, RUN, memory_bytes=1e9)
    assert found.params_total == 2000
    assert found.params_active == 2000 - 2 * 384
    params = model_params([existing()], facts)
    assert (params.dense, params.experts, params.router) == (2000 - 4 * 384, 4 * 384, 0)
    assert found.memory_bytes_per_rank.weights == 2000 * 4


# -- frozen weights --------------------------------------------------------------------------------------------------


def test_frozen_weights_have_no_gradients_and_no_moments() -> None:
    """The embedding, 800, is frozen, and nothing else."""
    plain, frozen = (
        estimate([layer()], ONE_RANK, replace(FACTS, frozen=found), RUN, memory_bytes=1e9).memory_bytes_per_rank
        for found in ({}, {"": (800, 1668), "layers.0.mlp": (0, 384)})
    )
    assert plain.grads - frozen.grads == 4 * 800
    assert plain.optimizer - frozen.optimizer == 8 * 800
    assert plain.apart - frozen.apart == 4 * 800
    assert replace(plain, grads=frozen.grads, optimizer=frozen.optimizer, apart=frozen.apart) == frozen


@pytest.mark.parametrize(
    ("made", "trained"),
    [
        (layer(), 4 * 384 + 4 * 8),  # drawn anew: trained
        (replace(layer(), experts=replace(layer().experts, init="copy")), 4 * 8),  # copies of frozen weights
        (replace(layer(d_expert=8, d_shared=8), experts=replace(layer(d_expert=8, d_shared=8).experts, init="virtual_group")), 4 * 8),
        (existing(), 0),
    ],
)  # fmt: skip
def test_what_is_made_of_frozen_weights_is_frozen(made: LayerPlan, trained: int) -> None:
    """The whole model is frozen: only the router, and what is drawn anew, is trained."""
    total, inside = (2000, 4 * 384) if isinstance(made.site, ExpertsSite) else (1668, 384)
    facts = replace(FACTS, params_total=total, frozen={"": (total, total), made.site.fqn: (inside, inside)})
    found = estimate([made], ONE_RANK, facts, RUN, memory_bytes=1e9).memory_bytes_per_rank
    assert (found.grads, found.optimizer) == (4 * trained, 8 * trained)


def test_no_more_gradients_are_unsharded_than_are_trained() -> None:
    facts = replace(FACTS, frozen={"": (1668, 1668), "layers.0.mlp": (384, 384)})
    made = replace(layer(4, "flat"), experts=replace(layer().experts, init="copy"))
    for accumulation in (1, 4):
        run = replace(RUN, accumulation=accumulation)
        assert estimate([made], FOUR_RANKS, facts, run, memory_bytes=1e9).memory_bytes_per_rank.grads == 4 * 32


@pytest.mark.parametrize("frozen", [{"": (256, 1668), "layers.0.mlp": (256, 384)}, {"": (384, 1668)}])
def test_what_is_frozen_in_part_or_nobody_knows_where_counts_as_trained(frozen: dict[str, tuple[int, int]]) -> None:
    """The frozen weights are those of the FFN, which is replaced: nothing else has lost its gradients."""
    made = replace(layer(), experts=replace(layer().experts, init="copy"))
    facts = replace(FACTS, frozen=frozen)
    assert estimate([made], ONE_RANK, facts, RUN, memory_bytes=1e9) == estimate(
        [made], ONE_RANK, FACTS, RUN, memory_bytes=1e9
    )


SMALL = ["mesh.ranks_per_node=2", "data.global_batch_size=32", "data.micro_batch_size=4"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return out


def estimated(*overrides: str) -> Estimate:
    torch.manual_seed(0)
    found = moecompile.make_plan(
        nn.Sequential(*(Block() for _ in range(4))), overrides, example=torch.zeros(1, 64)
    ).estimate
    assert found is not None
    return found


def test_a_plan_that_fits_needs_none() -> None:
    assert estimated("mesh.ranks_per_node=2").remedies == ()


def limited(share: float, *overrides: str) -> tuple[list[str], Estimate]:
    """The config, and its plan where a rank has this share of the memory that it needs; nothing is left to `auto`."""
    said = [*SMALL, "trainer.checkpointing=keep_exchanges", "trainer.reduce=last", "trainer.gather=layer", *overrides]
    needed = estimated(*said).memory_bytes_per_rank.total
    given = [f"hardware.memory_gib={share * needed / 2**30}", *said]
    return given, estimated(*given)


@pytest.mark.parametrize("share", [0.99, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("checkpointing", ["none", "keep_exchanges", "full"])
def test_each_remedy_is_planned_and_fits(checkpointing: str, share: float) -> None:
    given, before = limited(share, f"trainer.checkpointing={checkpointing}")
    assert before.fits == "no"
    assert before.remedies
    for remedy in before.remedies:
        changed = {item.partition("=")[0] for item in remedy.change.split()}
        assert "data.global_batch_size" not in changed
        kept = [item for item in given if item.partition("=")[0] not in changed]
        after = estimated(*kept, *remedy.change.split())
        assert after.memory_bytes_per_rank.total == remedy.total < before.memory_bytes_per_rank.total
        assert (after.memory_bytes_uneven, after.fits) == (remedy.uneven, remedy.fits)
    fits = [remedy for remedy in before.remedies if remedy.fits == "yes"]
    assert before.remedies[: len(fits)] == tuple(fits)  # `if even` comes last
    assert all(remedy.fits == "if even" for remedy in before.remedies[len(fits) :])
    changes = [len(remedy.change.split()) for remedy in fits]
    assert changes == sorted(changes)
    seconds = [remedy.seconds for remedy in fits]
    assert seconds == sorted(seconds, reverse=True)  # more changes only where they are faster


def test_what_is_offered_and_what_was_tried() -> None:
    """One change first, then two; more ranks only where the given ones are not enough; then what was found."""
    _, one = limited(0.9)
    assert one.remedies[0].change == "data.micro_batch_size=2"
    assert one.tried == "tried mesh.ep, micro-batch and checkpointing (30 layouts)"
    _, two = limited(0.5, "trainer.checkpointing=none")
    assert two.remedies[0].change == "data.micro_batch_size=2 trainer.checkpointing=full"
    _, more = limited(0.5)
    assert more.remedies[0].change.startswith("mesh.num_nodes=2 mesh.ep=")
    assert "mesh.tp, mesh.ep, micro-batch and checkpointing" in more.tried
    moments = more.memory_bytes_per_rank.optimizer / 2**30  # two of 4 bytes, but for routers'
    saved = re.findall(r"optimizer.state=(bf16|int8) alone saves (\S+) GiB", more.tried)
    assert [kind for kind, _ in saved] == ["bf16", "int8"]
    assert float(saved[0][1]) == pytest.approx(moments / 2, rel=0.05)
    assert float(saved[0][1]) < float(saved[1][1]) < moments
    _, none = limited(0.1)
    assert none.remedies == ()
    assert "the least is 0.004 GiB, with mesh.ep=8 data.micro_batch_size=1 trainer.checkpointing=full" in none.tried


def test_what_fits_only_if_the_load_is_even_has_remedies_that_fit() -> None:
    _, before = limited(1.01)
    assert (before.fits, {remedy.fits for remedy in before.remedies}) == ("if even", {"yes"})


def test_what_the_estimate_assumes() -> None:
    assumes = estimated("hardware.memory_gib=0.001", *SMALL, "data.seq_len=64", "trainer.precision=bf16_mixed").assumes
    assert assumes is not None
    assert (assumes.tokens_per_rank, assumes.seq_len, assumes.accumulation) == (256, 64, 4)
    assert (assumes.precision, assumes.optimizer, assumes.hardware) == ("bf16_mixed", "adamw", "laptop")
    assert assumes.memory_bytes == round(0.001 * 2**30)
    described = estimated("stack=deepseek_v3").assumes
    assert described is not None
    assert described.precision == "fp32 with products in fp8 (stack=deepseek_v3)"
