"""A shared expert whose slices the router weighs: against transformers' Inkling, written out, what is planned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moecompile
from moecompile.errors import ConfigError, PlanError
from moecompile.nn import Router
from moecompile.plan import from_yaml, to_yaml
from tests.nn.test_moe_layers import compiled, gradients
from tests.tiny import Gated, max_diff, tiny_llama, tokens, trace

F64 = torch.float64
IDS = {"input_ids": torch.arange(8).view(1, 8)}
INKLING = (
    "experts.init=random", "experts.granularity=4", "experts.num_shared=2", "experts.shared_routed=true",
    "experts.num_routed=6", "routing.top_k=3", "routing.score=sigmoid", "routing.scale=2.5", "balance.rule=bias",
)  # fmt: skip


def inkling_block(width: int) -> nn.Module:
    from transformers.models.inkling.configuration_inkling import InklingTextConfig
    from transformers.models.inkling.modeling_inkling import InklingMoE

    given = InklingTextConfig(
        hidden_size=8, moe_intermediate_size=width, n_routed_experts=6, num_experts_per_tok=3, n_shared_experts=2,
        route_scale=2.5, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=32,
    )  # fmt: skip
    given._experts_implementation = "eager"
    return InklingMoE(given)


def test_equals_the_block_of_inkling() -> None:
    """Outputs and every gradient in float64; its router scores in fp32. Its `global_scale` is a part of routing.scale."""
    mine = compiled(Gated(), *INKLING).double()
    with torch.no_grad():
        mine.router.correction_bias.copy_(tokens(6, 1, dtype=F64).squeeze() * 0.1)
    width = mine.experts.d_expert
    other = inkling_block(width).double()
    own, shared = mine.state_dict(), mine.shared_experts
    other.load_state_dict(
        {
            "gate.weight": torch.cat((own["router.weight"], own["router.shared_weight"])),
            "gate.global_scale": torch.ones(1),
            "gate.e_score_correction_bias": own["router.correction_bias"],
            "experts.gate_up_proj": own["experts.gate_up_proj"],
            "experts.down_proj": own["experts.down_proj"],
            "shared_experts.gate_proj": shared.gate_proj.weight.unflatten(0, (2, width)),
            "shared_experts.up_proj": shared.up_proj.weight.unflatten(0, (2, width)),
            "shared_experts.down_proj": shared.down_proj.weight.unflatten(1, (2, width)).transpose(0, 1),
        }
    )
    x = tokens(14, dtype=F64).view(2, 7, 8)
    got, wanted = gradients(mine, x), gradients(other, x)
    wanted.pop("gate.global_scale")
    pairs = {
        "output": got["output"],
        "input": got["input"],
        "gate.weight": torch.cat((got["router.weight"], got["router.shared_weight"])),
        "experts.gate_up_proj": got["experts.gate_up_proj"],
        "experts.down_proj": got["experts.down_proj"],
        "shared_experts.gate_proj": got["shared_experts.gate_proj.weight"].unflatten(0, (2, width)),
        "shared_experts.up_proj": got["shared_experts.up_proj.weight"].unflatten(0, (2, width)),
        "shared_experts.down_proj": got["shared_experts.down_proj.weight"].unflatten(1, (2, width)).transpose(0, 1),
    }
    assert pairs.keys() == wanted.keys() and len(got) == 9
    for name, value in wanted.items():
        assert value.abs().max() > 0
        assert max_diff(pairs[name], value) <= 2e-6 * max(1.0, float(value.abs().max())), name


def test_the_weights_of_a_token_are_one_sum() -> None:
    """Written out in float64."""
    mine = compiled(Gated(), *INKLING).double()
    x = tokens(10, dtype=F64)
    weights, ids, gammas = mine.router(x)
    scores, beside = (x @ mine.router.weight.T).sigmoid(), (x @ mine.router.shared_weight.T).sigmoid()
    chosen = scores.gather(1, ids)
    total = chosen.sum(1, keepdim=True) + beside.sum(1, keepdim=True)
    assert max_diff(weights, 2.5 * chosen / total) <= 1e-12 and max_diff(gammas, 2.5 * beside / total) <= 1e-12
    shared, wanted = mine.shared_experts, torch.zeros_like(x)
    width = mine.experts.d_expert
    for piece in range(2):
        rows = slice(piece * width, (piece + 1) * width)
        gate, up = x @ shared.gate_proj.weight[rows].T, x @ shared.up_proj.weight[rows].T
        part = (gate * gate.sigmoid() * up) @ shared.down_proj.weight[:, rows].T
        wanted = wanted + gammas[:, piece : piece + 1] * part
    assert max_diff(shared(x, gammas), wanted) <= 1e-12


def test_it_begins_near_the_dense_ffn() -> None:
    """With logits of zero all weights are alike, and slices times their weights are the dense FFN."""
    dense = Gated().double()
    sliced = [*INKLING[1:], "experts.init=virtual_group", "routing.top_k=2"]
    mine = moecompile.transform(trace(dense), sliced).double()
    x = tokens(10, dtype=F64)
    with torch.no_grad():
        mine.router.weight.zero_()
        mine.router.shared_weight.zero_()
        mine.router.correction_bias.copy_(torch.tensor([1.0, 1.0, 0, 0, 0, 0]))
    assert max_diff(mine(x), dense(x)) <= 1e-10


def test_what_is_planned_is_what_is_there() -> None:
    overrides = [
        "experts.granularity=4", "experts.num_shared=2", "experts.num_routed=8", "experts.init=virtual_group",
        "experts.shared_routed=true", "routing.top_k=4", "routing.score=sigmoid",
    ]  # fmt: skip
    model = tiny_llama()
    plan = moecompile.make_plan(model, overrides, example=IDS)
    assert from_yaml(to_yaml(plan)) == plan and plan.estimate is not None
    done = moecompile.compile_model(model, plan=plan, example=IDS)
    assert plan.estimate.params_total == sum(p.numel() for p in done.parameters())
    routers = [module for module in done.modules() if isinstance(module, Router)]
    assert [router.shared_weight.shape for router in routers if router.shared_weight is not None] == [(2, 32), (2, 32)]
    with pytest.raises(PlanError, match=r"experts.num_shared=0: leaves no shared expert to weigh"):
        from_yaml(to_yaml(plan).replace("num_shared: 2", "num_shared: 0").replace("d_shared: 32", "d_shared: 0"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["experts.num_shared=0"], r"experts.num_shared=0: leaves no shared expert to weigh.*Use 1, or"),
        (["experts.shared_gate=true"], r"experts.shared_gate=True: is another weight of the shared expert"),
        (["routing.score=softmax"], r"routing.score=softmax: has no score for a shared expert.*Use sigmoid"),
        (["routing.normalize=false"], r"routing.normalize=False: leaves no sum to share"),
        (["mesh.ranks_per_node=2", "mesh.tp=2"], r"experts.shared_routed=True: weighs a shared expert for tokens that"),
    ],
)
def test_what_does_not_go_together_is_refused(changed: list[str], message: str) -> None:
    def plan(*overrides: Any) -> None:
        moecompile.make_plan(tiny_llama(), [*INKLING, *overrides], example=IDS)

    with pytest.raises((ConfigError, PlanError), match=message):
        plan(*changed)
