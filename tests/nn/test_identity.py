"""Experts that return their input: against transformers' LongCat-Flash, what is planned, counted, balanced and refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import moecompile
from moecompile.errors import ConfigError, PlanError
from moecompile.mesh import MeshSpec
from moecompile.nn import update_balance
from moecompile.plan import ExpertPlacement
from moecompile.planner.traffic import copies_per_token
from tests.families import needs_identity
from tests.nn.test_moe_layers import compiled, gradients
from tests.tiny import COPY4, Gated, a_router, max_diff, tiny_llama, tokens, trace

F64 = torch.float64
IDS = {"input_ids": torch.arange(8).view(1, 8)}


def longcat_block() -> nn.Module:
    from transformers import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

    given = LongcatFlashConfig(
        hidden_size=8, expert_ffn_hidden_size=16, n_routed_experts=4, zero_expert_num=3, moe_topk=3,
        routed_scaling_factor=6.0,
    )  # fmt: skip
    given._experts_implementation = "eager"
    return LongcatFlashMoE(given)


def test_equals_the_block_of_longcat_flash() -> None:
    """Outputs and every gradient, with a correction bias over experts with and without weights."""
    mine = compiled(
        Gated(), "experts.num_identity=3", "routing.top_k=3", "routing.normalize=false", "routing.scale=6.0",
        "balance.rule=bias",
    ).double()  # fmt: skip
    mine.router.correction_bias.copy_(tokens(7, 1, dtype=F64).squeeze() / 10)
    other = longcat_block().double()
    with torch.no_grad():
        other.router.classifier.weight.copy_(mine.router.weight)
        other.router.e_score_correction_bias.copy_(mine.router.correction_bias)
        other.experts.gate_up_proj.zero_()[:4].copy_(mine.experts.gate_up_proj)
        other.experts.down_proj.copy_(mine.experts.down_proj)
    x = tokens(40, dtype=F64).view(2, 20, 8)
    got, wanted = gradients(mine, x), gradients(other, x)
    _, ids = mine.router(x)
    assert (ids >= 4).any() and (ids < 4).any()
    pairs = {
        "output": "output", "input": "input", "router.weight": "router.classifier.weight",
        "experts.gate_up_proj": "experts.gate_up_proj", "experts.down_proj": "experts.down_proj",
    }  # fmt: skip
    assert got.keys() == pairs.keys()
    for ours, theirs in pairs.items():
        value = wanted[theirs][:4] if ours == "experts.gate_up_proj" else wanted[theirs]
        # its router scores in fp32
        assert value.abs().max() > 0 and max_diff(got[ours], value) <= 1e-5 * float(value.abs().max()), ours


def test_load_and_bias_cover_all_experts() -> None:
    mine = compiled(Gated(), "experts.num_identity=3", "balance.rule=bias", "balance.rate=0.1")
    x = tokens(40)
    _, ids = mine.router.train()(x)
    (load,) = update_balance(mine)
    assert load.load.tolist() == ids.flatten().bincount(minlength=7).tolist() and load.dropped == 0
    mean = 80 / 7
    assert mine.router.correction_bias.tolist() == pytest.approx([0.1 * math.copysign(1, mean - n) for n in load.load])
    with_weights = (ids < 4).any(1).sum()
    assert load.node_tokens.tolist() == [int(with_weights)]  # the others stay where they are


def test_the_bias_of_longcat_flash_follows_all_experts() -> None:
    """Its own router's buffer has an entry for each of the seven."""
    zoo = pytest.importorskip("tests.match.test_zoo")
    if not hasattr(zoo, "language_model"):
        pytest.skip("a checkout without ../shared/zoo")
    model, inputs = zoo.language_model("longcat_flash", {"zero_expert_num": 3, "n_routed_experts": 4, "moe_topk": 3})
    needs_identity(model, 4)
    overrides = ["balance.rule=bias", "balance.rate=0.1"]
    moecompile.compile_model(model, overrides, example=inputs)
    plan = moecompile.plan_of(model)
    assert {layer.site.num_identity for layer in plan.layers} == {3}
    assert plan.estimate is not None
    assert plan.estimate.params_total == sum(p.numel() for p in model.parameters())
    model.train()(**inputs)
    loads = update_balance(model)
    for layer, load in zip(plan.layers, loads, strict=True):
        bias = model.get_submodule(layer.site.fqn.rpartition(".")[0]).router.e_score_correction_bias
        assert load.load.numel() == bias.numel() == 7 and int(load.load.sum()) == 3 * load.tokens
        wanted = [0.1 * float(torch.sign(load.load.double().mean() - n)) for n in load.load]
        assert bias.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ["flat", "dedup", "hierarchical"])
def test_planned_rows_are_those_of_all_choices(kind: str) -> None:
    """Every set of three of four experts and two identity experts, counted one by one, on two nodes with two ranks."""
    routing = a_router(8, 6, top_k=3).config
    placement = ExpertPlacement(num_experts=4, ep=4, nodes=2, num_identity=2)
    mesh = MeshSpec(num_nodes=2, ranks_per_node=2, ep=4)
    copies = copies_per_token(kind, placement, routing, mesh)
    sent = within = 0
    chosen = list(itertools.combinations(range(6), 3))
    for experts, source in itertools.product(chosen, range(4)):
        ranks = {expert for expert in experts if expert < 4}  # one expert on each rank
        near = {rank for rank in ranks if rank // 2 == source // 2 and rank != source}
        far = {rank for rank in ranks if rank // 2 != source // 2}
        if kind == "hierarchical":
            sent += len({rank // 2 for rank in far})
            # on its node, from the rank that corresponds to the source
            within += len(near) + len({rank for rank in far if rank % 2 != source % 2})
        else:
            sent, within = sent + len(far), within + len(near)
    count = len(chosen) * 4
    assert copies.inter_node == pytest.approx(sent / count)
    assert copies.intra_node == pytest.approx(within / count)


def test_what_is_planned_is_what_is_there() -> None:
    model = tiny_llama()
    plan = moecompile.make_plan(model, [*COPY4, "experts.num_identity=4"], example=IDS)
    compiled_model = moecompile.compile_model(model, plan=plan, example=IDS)
    assert plan.estimate is not None
    assert plan.estimate.params_total == sum(p.numel() for p in compiled_model.parameters())
    # one of four experts with weights on average
    assert plan.estimate.params_active == plan.estimate.params_total - 2 * 3 * 3 * 32 * 64


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["routing.choice=expert", "routing.normalize=false"], r"routing.choice=expert: .*num_identity=2"),
        (["routing.capacity_factor=1.0"], r"routing.capacity_factor=1.0: .*num_identity=2"),
        (["routing.groups=2"], r"routing.groups=2: .*num_identity=2"),
        (["routing.workload=balanced"], r"routing.workload=balanced: .*num_identity=2"),
        (["mesh.ranks_per_node=2", "mesh.tp=2"], r"num_identity=2: .*not cut over tp"),
    ],
)
def test_what_does_not_go_with_them_is_one_message(overrides: list[str], message: str) -> None:
    with pytest.raises((ConfigError, PlanError), match=message):
        moecompile.make_plan(trace(Gated()), [*COPY4, "experts.num_identity=2", *overrides])
