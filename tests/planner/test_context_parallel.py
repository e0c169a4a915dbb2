"""What cp allows, what is planned for attention, and what is said about the rest."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import moecompile
from moecompile.errors import ConfigError, PlanError
from moecompile.mesh import MeshSpec
from moecompile.plan import ExchangedAttention, Plan
from moecompile.planner import ModelFacts, RunFacts
from moecompile.planner.context_parallel import cp_traffic, exchanged_attention
from moecompile.planner.params import AttentionFact, SplitFact
from tests.existing_models import moe_model
from tests.tiny import COPY4, TinyGPT, config, ids, tiny_llama

FOUR = MeshSpec(ranks_per_node=4, ep=4, cp=4)
KEYS = ExchangedAttention(
    modules="layers.*.attn", layers=2, query_heads=8, key_heads=2, key_copies=2, d_key=16, d_value=8
)


def facts(**changes: Any) -> ModelFacts:
    usual = {"path": "layers.0.attn", "query_heads": 8, "key_heads": 2, "d_key": 16, "d_value": 8}
    attention = [AttentionFact(**{**usual, **changes, "path": f"layers.{i}.attn"}) for i in range(2)]
    return ModelFacts(params_total=1, attention=tuple(attention), no_context="")


def planned(model: nn.Module, *overrides: str, cp: int = 2) -> Plan:
    mesh = ["mesh.ranks_per_node=4", "mesh.ep=4", f"mesh.cp={cp}", "data.seq_len=16"]
    return moecompile.make_plan(model, config(*mesh, *overrides), example={"input_ids": ids()})


def test_heads_of_keys_that_cp_does_not_divide_are_sent_several_times() -> None:
    assert exchanged_attention((), FOUR, facts(), config("data.seq_len=16")) == (KEYS,)
    (whole,) = exchanged_attention((), FOUR, facts(key_heads=8), config("data.seq_len=16"))
    assert whole.key_copies == 1
    assert exchanged_attention((), MeshSpec(), ModelFacts(params_total=1), config()) == ()


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"query_heads": 6}, [], "mesh.cp=4: layers.0.attn has 6 heads, and must have equally many on each of the ranks. "
         "Use mesh.cp=2."),
        ({}, ["data.seq_len=18"], "data.seq_len=18: must be a multiple of mesh.cp=4, so that ranks have equally many "
         "positions. Use 20."),
        ({}, ["routing.replay=record"], "routing.replay=record: is of whole micro-batches, and mesh.cp=4 has its tokens "
         "on several ranks. Use routing.replay=null."),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_refused(changes: dict[str, Any], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        exchanged_attention((), FOUR, facts(**changes), config("data.seq_len=16", *overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("routing.capacity_factor=1.0", "routing.capacity_factor=1.0: an expert's capacity counts the tokens of a micro-"),
        ("routing.jitter=0.1", "routing.jitter=0.1: its random numbers are those of a micro-batch, and mesh.cp=2 has its"),
        ("routing.workload=zipf", "routing.workload=zipf: is drawn for a micro-batch, and mesh.cp=2 has its tokens on"),
    ],
)  # fmt: skip
def test_options_of_whole_micro_batches_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        planned(tiny_llama(), *COPY4, override)


def test_with_tp_the_heads_of_a_rank_are_exchanged() -> None:
    both = MeshSpec(ranks_per_node=8, ep=4, cp=4, tp=2)
    q_proj = SplitFact(
        path="layers.0.attn.q_proj", pattern="layers.*.attn.q_proj", style="colwise", kind="linear", size=128,
        size_name="output", params=1, site=None,
    )  # fmt: skip
    split = replace(facts(), split=(q_proj, replace(q_proj, path="layers.1.attn.q_proj")))
    (keys,) = exchanged_attention((), both, split, config("data.seq_len=16"))
    assert keys == replace(KEYS, query_heads=4, key_heads=1, key_copies=4)
    run = RunFacts(tokens_per_rank=64, compute_bytes=2)
    assert cp_traffic([keys], both, run).intra_node == 2 * (4 * (16 + 8) + 4 * (16 + 8)) * 2 * 3 / 4
    assert exchanged_attention((), both, facts(), config("data.seq_len=16")) == (KEYS,)  # each rank has all heads
    message = (
        "mesh.cp=4: layers.0.attn has 6 heads on a rank (mesh.tp=2), and must have equally many on each of the ranks. "
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}Use mesh.cp=2"):
        exchanged_attention((), both, replace(facts(query_heads=12), split=split.split), config("data.seq_len=16"))


def test_bytes_over_cp_by_hand() -> None:
    run = RunFacts(tokens_per_rank=64, compute_bytes=2)
    # a token of two layers: 8 heads of queries and outputs, 4 sent heads of keys and values; 3 of 4 parts leave
    per_token = 2 * (8 * (16 + 8) + 4 * (16 + 8)) * 2 * 3 / 4
    assert cp_traffic([KEYS], FOUR, run).intra_node == per_token
    two_nodes = cp_traffic([KEYS], replace(FOUR, num_nodes=2, ranks_per_node=2), run)
    assert (two_nodes.intra_node, two_nodes.inter_node) == (per_token / 3, per_token * 2 / 3)
    with_tp = MeshSpec(num_nodes=2, ranks_per_node=8, ep=4, cp=4, tp=4)  # a CP group is every fourth rank
    apart = cp_traffic([KEYS], with_tp, run)
    assert (apart.intra_node, apart.inter_node) == (per_token / 3, per_token * 2 / 3)


def test_a_plan_says_what_is_exchanged_and_survives_yaml() -> None:
    plan = planned(tiny_llama(), *COPY4)
    (attention,) = plan.context_parallel
    assert (attention.modules, attention.layers) == ("model.layers.*.self_attn", len(plan.layers))
    assert moecompile.plan.from_yaml(moecompile.plan.to_yaml(plan)) == plan
    assert plan.estimate is not None and plan.estimate.assumes is not None
    assert plan.estimate.assumes.seq_len == 16
    assert plan.estimate.cp_bytes_per_token.intra_node > 0 == plan.estimate.cp_bytes_per_token.inter_node
    whole = planned(tiny_llama(), *COPY4, cp=1)
    assert whole.estimate is not None and whole.estimate.assumes is not None
    assert (whole.estimate.assumes.accumulation, plan.estimate.assumes.accumulation) == (1, 2)
    both = (whole.estimate.memory_bytes_per_rank.activations, plan.estimate.memory_bytes_per_rank.activations)
    assert both[0] / both[1] == pytest.approx(2, rel=0.01)
    assert plan.estimate.memory_bytes_per_rank.optimizer == whole.estimate.memory_bytes_per_rank.optimizer


def test_a_plan_and_its_axis_belong_together() -> None:
    plan = planned(tiny_llama(), *COPY4)
    with pytest.raises(
        PlanError, match=re.escape("context_parallel=model.layers.*.self_attn: is exchanged, but mesh.cp=1")
    ):
        replace(plan, mesh=replace(plan.mesh, cp=1))
    with pytest.raises(PlanError, match=re.escape("context_parallel=[]: mesh.cp=2 needs attention to exchange")):
        replace(plan, context_parallel=())
    three = (replace(plan.context_parallel[0], query_heads=3),)
    with pytest.raises(PlanError, match=re.escape("self_attn.query_heads=3: must be a multiple of mesh.cp=2")):
        replace(plan, context_parallel=three)


def test_models_that_mix_positions_elsewhere_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^mesh.cp=2: TinyGPT is no language model of transformers"):
        moecompile.make_plan(TinyGPT(), config(*COPY4, "mesh.ranks_per_node=4", "mesh.cp=2"), example=ids())
    with pytest.raises(
        ConfigError, match=r"^mesh.cp=2: LlamaForCausalLM has attention_dropout=0.1, which would be drawn"
    ):
        planned(tiny_llama(attention_dropout=0.1), *COPY4)
    for at, what in (("norm", "norm.p"), ("layers.1.mlp", "layers.1.mlp.residual_dropout")):  # as GPT-2, and Seed-OSS
        model = tiny_llama()
        if what.endswith(".p"):
            model.set_submodule(f"model.{at}", nn.Dropout(0.1))
        else:
            vars(model.get_submodule(f"model.{at}"))["residual_dropout"] = 0.1
        with pytest.raises(ConfigError, match=rf"^mesh.cp=2: LlamaForCausalLM has model.{what}=0.1, which would be"):
            planned(model, *COPY4)
    with pytest.raises(
        ConfigError, match=r"^mesh.cp=2: SwitchTransformersFor.* has an encoder and a decoder, of which"
    ):
        both = {"input_ids": ids(), "decoder_input_ids": ids()}
        switch = moe_model("switch_transformers")
        moecompile.make_plan(switch, config("mesh.ranks_per_node=4", "mesh.ep=4", "mesh.cp=2"), example=both)
    assert planned(moe_model("gpt_oss")).context_parallel  # its sinks are a weight with a number for each head
    another_tensor = r"^mesh.cp=2: GptOss.* gives its attention s_aux, which heads would have to"
    with (
        mock.patch("moecompile.pipeline.attention.weights_of_heads", return_value={}),
        pytest.raises(ConfigError, match=another_tensor),
    ):
        planned(moe_model("gpt_oss"))


class Shifting(nn.Module):
    """A norm that adds the token before: positions are mixed outside of attention."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(x + 0.1 * x.roll(1, dims=1))
        return out


def test_a_mix_of_positions_that_no_name_tells_is_found() -> None:
    model = tiny_llama()
    layers: Any = model.get_submodule("model.layers")
    layers[1].input_layernorm = Shifting(layers[1].input_layernorm)
    with pytest.raises(
        ConfigError, match=r"^mesh.cp=2: LlamaForCausalLM mixes positions outside of the attention that"
    ):
        planned(model, *COPY4)
    assert model.config._attn_implementation == "sdpa"  # what was probed is as it was


def test_attention_outside_of_the_interface_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    layers: Any = model.get_submodule("model.layers")
    monkeypatch.setattr(layers[1].self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(ConfigError, match=r"has attention in model.layers.1 that does not go through transformers'"):
        planned(model, *COPY4)


def test_models_without_values_are_planned() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    assert planned(model, *COPY4).context_parallel == planned(tiny_llama(), *COPY4).context_parallel
