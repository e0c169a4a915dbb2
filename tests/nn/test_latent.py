"""Experts in a latent width: against transformers' Nemotron-H, what is planned, counted and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moecompile
from moecompile.errors import ConfigError, PlanError
from moecompile.pipeline.shape import shape_of_model
from moecompile.plan import from_yaml, to_yaml
from tests.nn.test_moe_layers import compiled, gradients
from tests.tiny import COPY4, Gated, UpDown, max_diff, tiny_llama, tokens, trace

F64 = torch.float64
IDS = {"input_ids": torch.arange(8).view(1, 8)}
LATENT = ("experts.latent_size=4", "experts.latent_norm=true")


def squared_relu(x: Tensor) -> Tensor:
    return torch.nn.functional.relu(x).square()


def nemotron_block(**changes: Any) -> nn.Module:
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

    settings = {
        "hidden_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16, "moe_latent_size": 4, "routed_scaling_factor": 2.5, "n_group": 1,
        "topk_group": 1,
    }  # fmt: skip
    given = NemotronHConfig(**{**settings, **changes})
    given._experts_implementation = "eager"
    return NemotronHMoE(given)


NEMOTRON = {
    "gate.weight": "router.weight", "fc1_latent_proj.weight": "latent_down.weight",
    "fc2_latent_proj.weight": "latent_up.weight",
}  # fmt: skip


def test_equals_the_block_of_nemotron_h() -> None:
    """Outputs and every gradient, in float64."""
    mine = compiled(
        UpDown(bias=False, activation=squared_relu), "experts.latent_size=4", "experts.num_shared=1", "routing.scale=2.5",
        "routing.score=sigmoid", "balance.rule=bias",
    ).double()  # fmt: skip
    other = nemotron_block().double()
    renamed = {name: NEMOTRON.get(name, name) for name in other.state_dict()}
    renamed["gate.e_score_correction_bias"] = "router.correction_bias"
    other.load_state_dict({name: mine.state_dict()[ours] for name, ours in renamed.items()})
    other.gate.e_score_correction_bias.copy_(mine.router.correction_bias)
    x = tokens(14, dtype=F64).view(2, 7, 8)
    got, wanted = gradients(mine, x), gradients(other, x)
    assert len(got) == len(wanted) == 2 + 7
    for name, value in wanted.items():
        assert value.abs().max() > 0
        # its router scores in fp32
        assert max_diff(got[renamed.get(name, name)], value) <= 2e-6 * max(1.0, float(value.abs().max())), name


def test_the_norm_is_before_the_projection_up() -> None:
    """Kimi K3's layer, written out: routing from x, experts between the projections, norm of their weighted sum."""
    mine = compiled(Gated(), *LATENT, "experts.num_shared=1").double()
    with torch.no_grad():
        mine.latent_up.norm_weight.copy_(tokens(4, 1, dtype=F64).squeeze() + 2)
    x = tokens(14, dtype=F64)
    weights, ids = mine.router(x)
    inner, sums = x @ mine.latent_down.weight.T, []
    for token in range(14):
        total = torch.zeros(4, dtype=F64)
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            gate, up = (mine.experts.gate_up_proj[expert] @ inner[token]).chunk(2)
            total = total + weight * (mine.experts.down_proj[expert] @ (gate * gate.sigmoid() * up))
        sums.append(total)
    combined = torch.stack(sums)
    normed = combined / (combined.square().mean(1, keepdim=True) + 1e-6).sqrt() * mine.latent_up.norm_weight
    wanted = normed @ mine.latent_up.weight.T + mine.shared_experts(x)
    assert max_diff(mine(x), wanted) <= 1e-10


def test_what_is_planned_is_what_is_there() -> None:
    """Parameters, and bytes per token: rows of 8 of 32 numbers, so a quarter of what rows of the model's width are."""
    model, mesh = tiny_llama(), ["mesh.ranks_per_node=4", "dispatch.kind=dedup", "experts.num_routed=8"]
    latent = ["experts.latent_size=8", "experts.latent_norm=true", "experts.num_shared=1"]
    narrow = moecompile.make_plan(model, [*mesh, *latent], example=IDS)
    wide = moecompile.make_plan(model, [*mesh, "experts.num_shared=1"], example=IDS)
    assert narrow.estimate is not None and wide.estimate is not None
    assert from_yaml(to_yaml(narrow)) == narrow and "latent 8" in str(narrow)
    compiled_model = moecompile.compile_model(model, plan=narrow, example=IDS)
    assert narrow.estimate.params_total == sum(p.numel() for p in compiled_model.parameters())
    of_token = 6 * 3 * 8 * 64  # experts of a layer that a token does not choose
    assert narrow.estimate.params_active == narrow.estimate.params_total - 2 * of_token
    sent = [plan.estimate.bytes_per_token_per_layer.intra_node for plan in (narrow, wide)]
    assert sent[1] - sent[0] == pytest.approx(0.75 * 2 * 32 * 4 * rows_sent(wide))


def rows_sent(plan: moecompile.Plan) -> float:
    """Rows per token that leave a rank: each of three others needs a token with probability 1 - C(6, 2) / C(8, 2)."""
    assert plan.layers[0].placement.experts_per_rank == 2
    return 3 * (1 - 15 / 28)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experts.latent_norm=true"], r"experts.latent_norm=True: .*but experts.latent_size=null"),
        (["experts.latent_size=9"], r"experts.latent_size=9: must be at most d_model=8.*Use 4, or null"),
        (["experts.latent_size=0"], r"experts.latent_size=0: must be at least 1"),
    ],
)
def test_impossible_widths_are_one_message(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        moecompile.make_plan(trace(Gated()), [*COPY4, *overrides])


def test_a_plan_by_hand_is_checked() -> None:
    plan = moecompile.make_plan(tiny_llama(), ["experts.latent_size=8"], example=IDS)
    with pytest.raises(PlanError, match=r"experts.latent_size=33: must be 1 to site.d_model=32"):
        from_yaml(to_yaml(plan).replace("latent_size: 8", "latent_size: 33"))


def nemotron(**changes: Any) -> nn.Module:
    from transformers import NemotronHConfig, NemotronHForCausalLM

    settings = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "layers_block_type": ["attention", "moe", "moe"],
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8,
        "ssm_state_size": 8, "n_groups": 2, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24, "n_shared_experts": 1,
        "moe_latent_size": 8, "use_cache": False,
    }  # fmt: skip
    torch.manual_seed(0)
    return NemotronHForCausalLM(NemotronHConfig(**{**settings, **changes})).eval()


def test_latent_experts_of_a_model_are_recognised() -> None:
    """Rows, activations of the residual stream, and the forecast's shape have each their own width."""
    model = nemotron()
    plan = moecompile.make_plan(model, ["mesh.ranks_per_node=4", "dispatch.kind=flat"], example=IDS)
    assert [layer.site.d_model for layer in plan.layers] == [8, 8]
    shape = shape_of_model(model, plan)
    assert shape.hidden == 32 and [layer.ffn.latent for layer in shape.layers if layer.ffn and layer.ffn.experts] == [8]
    (moe,) = [layer.ffn for layer in shape.layers if layer.ffn and layer.ffn.experts]
    block = model.model.layers[1]
    numbers = moe.experts * moe.expert_weights(32) + moe.shared_weights(32) + moe.router_weights(32)
    assert plan.estimate is not None
    # Attention is counted in each layer by its config's heads, and here most have none: what is left is not negative.
    assert numbers <= sum(p.numel() for p in block.parameters())
    sent = plan.estimate.bytes_per_token_per_layer.intra_node
    assert sent == pytest.approx(2 * 8 * 4 * 3 * 3 / 4 + 3 * 8 * 2 / 512, rel=1e-6)
    wide = moecompile.make_plan(nemotron(moe_latent_size=None), ["mesh.ranks_per_node=4"], example=IDS)
    assert wide.estimate is not None
    memory = plan.estimate.memory_bytes_per_rank.activations
    assert (
        0.5 * wide.estimate.memory_bytes_per_rank.activations < memory < wide.estimate.memory_bytes_per_rank.activations
    )
