"""The router equals transformers' own routers: experts, weights and gradients, for fp32 and bf16 hidden states."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from moecompile.nn import Router
from tests.tiny import a_router, tokens

EXPERTS, TOP_K, TOKENS, D = 16, 4, 64, 8
PLAIN = {"hidden_size": D, "num_experts_per_tok": TOP_K}


class Case(NamedTuple):
    """family: transformers' folder; module: its router; settings: of its config; options: ours."""

    family: str
    module: str
    settings: dict[str, Any]
    options: dict[str, Any]


def deepseek_v3(family: str, module: str, groups: int, top_groups: int, normalize: bool) -> Case:
    settings = {
        **PLAIN, "n_routed_experts": EXPERTS, "n_group": groups, "topk_group": top_groups,
        "routed_scaling_factor": 2.5, "norm_topk_prob": normalize,
    }  # fmt: skip
    options = {
        "score": "sigmoid", "normalize": normalize, "scale": 2.5, "groups": groups, "top_groups": top_groups,
        "group_score": "top2",
    }  # fmt: skip
    return Case(family, module, settings, options)


def deepseek_v2(groups: int, top_groups: int) -> Case:
    settings = {
        **PLAIN, "n_routed_experts": EXPERTS, "n_group": groups, "topk_group": top_groups, "num_attention_heads": 2,
        "routed_scaling_factor": 16.0, "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
    }  # fmt: skip
    options = {"normalize": False, "scale": 16.0, "groups": groups, "top_groups": top_groups, "group_score": "max"}
    return Case("deepseek_v2", "DeepseekV2TopkRouter", settings, options)


def qwen(family: str, module: str, normalize: bool) -> Case:
    return Case(
        family, module, {**PLAIN, "num_experts": EXPERTS, "norm_topk_prob": normalize}, {"normalize": normalize}
    )


CASES = {
    "mixtral": Case("mixtral", "MixtralTopKRouter", {**PLAIN, "num_local_experts": EXPERTS}, {}),
    "deepseek_v2 greedy": deepseek_v2(1, 1),
    "deepseek_v2 4 groups": deepseek_v2(4, 2),
    "deepseek_v2 8 groups": deepseek_v2(8, 3),
    "deepseek_v3": deepseek_v3("deepseek_v3", "DeepseekV3TopkRouter", 1, 1, True),
    "deepseek_v3 4 groups": deepseek_v3("deepseek_v3", "DeepseekV3TopkRouter", 4, 2, True),
    "deepseek_v3 one group open": deepseek_v3("deepseek_v3", "DeepseekV3TopkRouter", 4, 1, True),
    "deepseek_v3 8 groups, not normalised": deepseek_v3("deepseek_v3", "DeepseekV3TopkRouter", 8, 3, False),
    "dots1": deepseek_v3("dots1", "Dots1TopkRouter", 4, 2, True),
    "glm4_moe": deepseek_v3("glm4_moe", "Glm4MoeTopkRouter", 1, 1, True),
    "qwen2_moe": qwen("qwen2_moe", "Qwen2MoeTopKRouter", False),
    "qwen3_moe": qwen("qwen3_moe", "Qwen3MoeTopKRouter", True),
    "qwen3_moe not normalised": qwen("qwen3_moe", "Qwen3MoeTopKRouter", False),
    "olmoe": qwen("olmoe", "OlmoeTopKRouter", False),
    "olmoe normalised": qwen("olmoe", "OlmoeTopKRouter", True),
    "gpt_oss": Case(
        "gpt_oss", "GptOssTopKRouter", {**PLAIN, "num_local_experts": EXPERTS},
        {"score": "softmax_after_topk", "normalize": False, "bias": True},
    ),
}  # fmt: skip
_CASTS_ITSELF = ("deepseek_v2", "deepseek_v3", "dots1", "glm4_moe")


@torch.no_grad()
def router(options: dict[str, Any], top_k: int = TOP_K) -> Router:
    """Random weights; correction biases too where the model has them."""
    made, generator = a_router(D, EXPERTS, top_k=top_k, **options), torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if made.config.score == "sigmoid":
        made.correction_bias.copy_(torch.randn(EXPERTS, generator=generator) * 0.2)
    return made


def theirs(case: Case, ours: Router) -> nn.Module:
    from transformers import AutoConfig

    source = importlib.import_module(f"transformers.models.{case.family}.modeling_{case.family}")
    module: nn.Module = getattr(source, case.module)(AutoConfig.for_model(case.family, **case.settings))
    renames = {"e_score_correction_bias": "correction_bias"}
    module.load_state_dict({name: ours.state_dict()[renames.get(name, name)] for name in module.state_dict()})
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_same_experts_weights_and_gradients(name: str, dtype: torch.dtype) -> None:
    """Routers that compute in the hidden states' precision get them as fp32: ours never rounds to bf16."""
    case, results = CASES[name], []
    ours = router(case.options)
    other = theirs(case, ours)
    for module in (ours, other):
        x = tokens(TOKENS).to(dtype).requires_grad_()
        given = x.float() if module is other and case.family not in _CASTS_ITSELF else x
        weights, ids = module(given) if module is ours else module(given)[1:]
        table = torch.zeros(TOKENS, EXPERTS).scatter(1, ids, weights)
        (table * torch.arange(1, EXPERTS + 1)).square().sum().backward()
        results.append([table, x.grad, *(module.get_parameter(n).grad for n, _ in ours.named_parameters())])
    assert all(len(set(row)) == TOP_K for row in ids.tolist())
    assert torch.equal(results[0][0] > 0, results[1][0] > 0)
    for one, wanted in zip(*results, strict=True):
        largest = float(wanted.detach().abs().max())
        assert largest > 0
        assert (one - wanted).abs().max() <= largest * (1e-6 if one.dtype == torch.float32 else 4e-3)


# -- Switch ----------------------------------------------------------------------------------------------------------


def switch(capacity: int, ours: Router) -> nn.Module:
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

    module = SwitchTransformersTop1Router(
        SwitchTransformersConfig(
            hidden_size=D, d_model=D, num_experts=EXPERTS, expert_capacity=capacity, router_bias=False, router_jitter_noise=0.0
        )
    )  # fmt: skip
    module.classifier.load_state_dict({"weight": ours.weight})
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("factor", "capacity"), [(0.5, 2), (1.25, 5), (1.3, 6), (16.0, 64)])
def test_equals_switch_with_its_capacity(factor: float, capacity: int, dtype: torch.dtype) -> None:
    """One sequence is the micro-batch here; transformers counts capacity per sequence. It rounds probabilities to the
    input's precision before it compares them, so it gets the bf16 states as fp32.
    """
    ours = router({"normalize": False, "capacity_factor": factor, "drop": "position"}, top_k=1)
    x = tokens(TOKENS).to(dtype)
    chosen, probs, _ = switch(capacity, ours)(x.float().unsqueeze(0))
    weights, ids = ours(x.unsqueeze(0))
    kept = chosen[0].sum(-1) > 0
    assert torch.equal(ids[:, 0] < EXPERTS, kept)
    assert torch.equal(ids[kept, 0], chosen[0][kept].argmax(-1))
    assert torch.allclose(weights[kept], probs[0][kept], rtol=1e-6)
    assert torch.equal(weights[~kept], torch.zeros(int((~kept).sum()), 1))
    assert kept.all() == (factor == 16.0)
