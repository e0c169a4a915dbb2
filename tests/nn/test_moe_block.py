"""A rewritten FFN against transformers' DeepseekV3MoE with the same weights: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import moecompile
from tests.tiny import config, max_diff, randomize, trace

SETTINGS = {
    "hidden_size": 16, "intermediate_size": 40, "moe_intermediate_size": 8, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}  # fmt: skip
OVERRIDES = [
    "experts.init=random", "experts.granularity=5", "experts.num_shared=1", "experts.num_routed=16", "routing.top_k=4",
    "routing.score=sigmoid", "routing.scale=2.5", "routing.groups=4", "routing.top_groups=2",
    "routing.group_score=top2",
]  # fmt: skip
RENAMES = {"gate.weight": "router.weight", "gate.e_score_correction_bias": "router.correction_bias"}


def ours() -> GraphModule:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP

    dense = DeepseekV3MLP(DeepseekV3Config(**SETTINGS))
    graph_module = moecompile.transform(trace(dense), config(*OVERRIDES))
    randomize(graph_module)
    graph_module.router.correction_bias.copy_(torch.randn(16, generator=torch.Generator().manual_seed(1)) * 0.1)
    return graph_module


def theirs(state: dict[str, torch.Tensor], implementation: str) -> nn.Module:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(**SETTINGS)
    config._experts_implementation = implementation
    block = DeepseekV3MoE(config)
    block.load_state_dict({name: state[RENAMES.get(name, name)] for name in block.state_dict()})
    return block


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("shape", [(2, 7), (1, 1)])
def test_equals_deepseek_v3_moe(implementation: str, shape: tuple[int, int]) -> None:
    mine = ours()
    other = theirs(mine.state_dict(), implementation)
    assert len(mine.state_dict()) == len(other.state_dict())
    x = torch.randn(*shape, 16, generator=torch.Generator().manual_seed(2))
    grads = {}
    for name, module in (("ours", mine), ("theirs", other)):
        inputs = x.clone().requires_grad_()
        out = module(inputs)
        (out.square().sum() + out.sum()).backward()
        grads[name] = {"output": out, "input": inputs.grad, **{k: p.grad for k, p in module.named_parameters()}}
    assert len(grads["ours"]) == 2 + 6
    for name, wanted in grads["theirs"].items():
        got = grads["ours"][RENAMES.get(name, name)]
        assert max_diff(got, wanted) <= 2e-6 * max(1.0, float(wanted.detach().abs().max())), name
        assert wanted.abs().max() > 0, name
