"""What a plan says of the optimizer, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from moecompile.compose import compose_config
from moecompile.mesh import MeshSpec
from moecompile.plan import Estimate, Traffic
from moecompile.planner import ModelFacts
from moecompile.planner.build_plan import build_plan
from moecompile.planner.cost_model.counts import step_bytes
from moecompile.planner.cost_model.inputs import Layout, Machine, Software, software_of
from moecompile.planner.optimizer import Kept, MuonParams, kept_of, state_bytes, step_traffic
from moecompile.planner.params import WeightFact
from moecompile.planner.traffic import Links
from tests.planner.search.test_described import TINY
from tests.planner.test_build_plan import site

FOUR = MeshSpec(ranks_per_node=4, ep=4)
# A layer: attention of two 16 x 16 matrices, an FFN of three 16 x 48; embeddings of 1000 and 50 others beside them.
FFN = {f"model.layers.0.mlp.{name}.weight": (48, 16) for name in ("gate", "up")}
FFN["model.layers.0.mlp.down.weight"] = (16, 48)
ATTENTION = {f"model.layers.0.self_attn.{name}.weight": (16, 16) for name in ("qkv", "o")}
FACTS = ModelFacts(
    params_total=3 * 48 * 16 + 2 * 256 + 1050, params_embedding=1000, num_layers=1, matrices={**FFN, **ATTENTION}
)
MUON = ("optimizer=muon", "mesh.ranks_per_node=4", "experts.num_routed=4", "routing.top_k=2")
EXPERTS = 4 * 3 * 48 * 16


def estimated(*overrides: str, facts: ModelFacts = FACTS) -> Estimate:
    found = build_plan([site(0)], compose_config(overrides), facts).estimate
    assert found is not None
    return found


def test_muons_parameters_are_those_of_matrices() -> None:
    found = estimated(*MUON)
    assert found.params_muon == 2 * 256 + EXPERTS
    assert found.assumes is not None and found.assumes.optimizer == "muon"
    shared = ["experts.granularity=2", "experts.num_shared=1", "experts.num_routed=4", "experts.init=virtual_group"]
    assert estimated(*MUON, *shared).params_muon == 2 * 256 + EXPERTS // 2 + 3 * 16 * 24


def test_an_ffn_that_is_a_part_of_its_module_is_replaced_too() -> None:
    inline = {name.replace(".mlp.", ".").replace(".self_attn.", "."): shape for name, shape in FACTS.matrices.items()}
    facts = ModelFacts(params_total=FACTS.params_total, params_embedding=1000, num_layers=1, matrices=inline)
    found = build_plan([site(0, "model.layers.0")], compose_config(MUON), facts).estimate
    assert found is not None and found.params_muon == 2 * 256 + EXPERTS


def test_patterns_give_weights_to_adamw() -> None:
    groups = 'optimizer.groups=[{match: "*.qkv.*", kind: adamw}, {match: "*experts.down_proj", kind: adamw}]'
    assert estimated(*MUON, groups).params_muon == 256 + EXPERTS * 2 // 3


def test_muon_has_one_number_of_state_where_adamw_has_two() -> None:
    adamw, muon = estimated(*MUON[1:]), estimated(*MUON)
    saved = adamw.memory_bytes_per_rank.optimizer - muon.memory_bytes_per_rank.optimizer
    assert saved == 4 * (2 * 256 + EXPERTS) // 4  # 4 bytes each, over 4 ranks
    assert adamw.params_muon == 0 and adamw.optimizer_bytes_per_step == Traffic(intra_node=0.0, inter_node=0.0)
    quarter = Fraction(1, 4)

    def bytes_of(muon: MuonParams, number: int, mesh: MeshSpec = FOUR) -> int:
        each = Fraction(number)
        return state_bytes(100, 40, muon, mesh, quarter, 50, Kept(dense=each, experts=each, of_muon=each))

    assert bytes_of(MuonParams(), 4) == 110 * 8
    assert bytes_of(MuonParams(), 2) == 100 * 4 + 10 * 8  # bf16 weights beside fp32 routers
    assert bytes_of(MuonParams(dense=120, experts=200), 4) == 110 * 8 - (30 + 50) * 4
    assert bytes_of(MuonParams(dense=120, experts=200), 4, MeshSpec(ranks_per_node=4, ep=4, cp=4)) == 110 * 8 - 80 * 4


@pytest.mark.parametrize(
    ("muon", "mesh", "intra", "inter"),
    [
        (MuonParams(dense=160, experts=999), FOUR, 2 * 160 * 3 / 16, 0.0),
        (MuonParams(dense=160), MeshSpec(), 0.0, 0.0),
        (MuonParams(dense=160), MeshSpec(ranks_per_node=4, cp=2), 2 * 160 * 3 / 16, 0.0),  # FSDP is over cp, too
        (MuonParams(dense=160), MeshSpec(ranks_per_node=4, dp_replicate=2), 2 * 160 / 4, 0.0),
        # Of the three others, one is on the same node.
        (
            MuonParams(dense=160),
            MeshSpec(num_nodes=2, ranks_per_node=2),
            2 * 160 * 3 / 16 / 3,
            2 * 160 * 3 / 16 * 2 / 3,
        ),
        # Two ranks of FSDP have 80 each, then two of tp; a rank is one of four.
        (MuonParams(split=160), MeshSpec(ranks_per_node=4, tp=2), (2 * 80 + 2 * 80) / 4, 0.0),
        (MuonParams(summed=160), MeshSpec(ranks_per_node=4, tp=2), 2 * 160 * 3 / 16, 0.0),
        (MuonParams(cut=160, experts=160), MeshSpec(ranks_per_node=4, ep=2), 2 * 80 / 4, 0.0),
    ],
)
def test_bytes_of_a_step(muon: MuonParams, mesh: MeshSpec, intra: float, inter: float) -> None:
    sent = step_traffic(muon, mesh, 4)
    assert (sent.intra_node, sent.inter_node) == pytest.approx((4 * intra, 4 * inter))


def test_experts_that_are_cut_within_are_sent() -> None:
    """Two ranks share one expert of two; the dense matrices are over four."""
    sent = estimated("optimizer=muon", "mesh.ranks_per_node=4", "mesh.ep=2", "experts.num_routed=2", "routing.top_k=1")
    assert sent.optimizer_bytes_per_step.intra_node == 4 * (2 * 512 * 3 / 16 + 2 * (EXPERTS / 2 / 2) / 4)


def test_bf16_products_halve_the_bytes() -> None:
    wide = estimated(*MUON).optimizer_bytes_per_step.intra_node
    assert wide == 4 * 2 * 512 * 3 / 16
    assert estimated(*MUON, "optimizer.muon.precision=bf16").optimizer_bytes_per_step.intra_node == wide / 2


def test_bytes_of_narrower_moments() -> None:
    """Per number: 4, 2, and 1 with a fp32 scale for a block of the rows' largest divisor up to 256."""
    facts = replace(
        FACTS,
        weights=(
            WeightFact(rows=64, params=64 * 1408, width=1408), WeightFact(rows=64, params=64),
            WeightFact(rows=64, params=999, width=64, is_trained=False), WeightFact(rows=8, params=8 * 32, width=32, split="columns"),
        ),
    )  # fmt: skip
    mesh = MeshSpec(ranks_per_node=4, ep=4)

    def kept(*overrides: str, number: int = 4, mesh: MeshSpec = mesh) -> Kept:
        return kept_of([], mesh, facts, compose_config(overrides).optimizer, number)

    assert (kept().dense, kept(number=8).dense, kept(number=2).experts) == (4, 8, 2)
    assert kept("optimizer.state=bf16").dense == kept("optimizer.state=bf16", number=2).experts == 2
    blocks, small, narrow = 64 * 1408 * (1 + Fraction(4, 176)), 64 * 4, 8 * 32 * (1 + Fraction(4, 32))
    assert kept("optimizer.state=int8").dense == (blocks + small + narrow) / (64 * 1408 + 64 + 8 * 32)
    tp = kept("optimizer.state=int8", mesh=MeshSpec(ranks_per_node=4, ep=4, tp=2))
    assert tp.dense == (blocks + small + 8 * 32 * 4) / (64 * 1408 + 64 + 8 * 32)  # 16 numbers have no block
    master = kept("optimizer.bf16_weights=master", number=2)
    assert (master.dense, master.master) == (4, 4) and kept("optimizer.bf16_weights=master").master == 0
    zeros = MuonParams(), mesh, Fraction(1, 4), 50
    assert state_bytes(100, 40, *zeros, master) == 100 * (2 * 4 + 4) + 2 * 40


def test_a_forecast_counts_the_bytes_of_moments() -> None:
    machine = Machine(
        name="any", peak={16: 1.0}, watts=1.0, memory=1.0, passes=1.0, links=Links(intra=1.0, inter=1.0), domain=64,
        units=1, capacity=1.0,
    )  # fmt: skip
    layout = Layout(gpus=4, seq=16, global_batch=4, zero=3)
    steps = [step_bytes(TINY, layout, machine, Software(moment_bits=bits)) for bits in (32, 16, 8)]
    assert [step.moments / step.owned for step in steps] == pytest.approx([28, 20, 16])
    given = ([], ["stack.moment_bits=16"])
    assert [software_of(compose_config(each).stack, moment_bits=8).moment_bits for each in given] == [8, 16]
