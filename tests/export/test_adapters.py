"""Adapters in peft's format: experts and routers that classes of transformers describe badly, and what else is trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from moecompile.errors import PlanError
from moecompile.export import with_adapters
from moecompile.pipeline import Compilation, compile_with_report
from tests.existing_models import CONFIGS, VOCAB, moe_model
from tests.tiny import max_diff

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft
LORA = ["adapters=lora", "adapters.rank=3", "adapters.alpha=8", "mesh.ranks_per_node=1"]
ROUTER = "adapters.train_router=true"
EXAMPLE = {"input_ids": torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    # (E, d_in, d_out) without the flag that says it; down_proj is square, so that no shape says it either
    "llama4_text": {"intermediate_size": 32, "intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 8, **_ATTENTION},
    # a correction bias beside the router, not in it
    "minimax_m2": {
        "intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8, **_ATTENTION,
    },
    # linears of the shared expert have as many rows as the router
    "qwen2_moe": {
        "intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 8, "num_experts": 8,
        "num_experts_per_tok": 2, **_ATTENTION,
    },
}  # fmt: skip


@torch.no_grad()
def trained(architecture: str, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[nn.Module, Compilation]:
    """A model before training, and compiled with random values in what is trained."""
    monkeypatch.setitem(CONFIGS, architecture, FAMILIES[architecture])
    base = moe_model(architecture)
    with torch.enable_grad():
        done = compile_with_report(copy.deepcopy(base), [*LORA, *overrides], example=EXAMPLE, until="rewrite")
    generator = torch.Generator().manual_seed(1)
    for parameter in done.model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return base, done


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    out: torch.Tensor = model(**EXAMPLE, use_cache=False).logits
    return out


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(("architecture", "overrides"), [("llama4_text", []), ("qwen2_moe", [ROUTER])])
def test_peft_computes_what_was_trained(
    architecture: str, overrides: list[str], alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, done = trained(architecture, monkeypatch, *overrides)
    before, wanted = logits(base), logits(done.model)
    model = with_adapters(base, done.model, done.plan, alone=alone)
    got = logits(model if alone else model.merge_and_unload())
    assert max_diff(got, wanted) <= 1e-5
    assert max_diff(before, wanted) > 1e-2


def test_a_bias_beside_its_router_is_merged_and_refused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    base, done = trained("minimax_m2", monkeypatch, ROUTER, "balance.rule=bias")
    name = "model.layers.1.mlp.e_score_correction_bias"
    done.model.get_buffer(name).copy_(torch.linspace(-0.001, 0.001, 8))  # so little that no choice need change
    with pytest.raises(PlanError, match=rf"^adapters={name}: was changed by training.*export\.adapters=merged"):
        with_adapters(copy.deepcopy(base), done.model, done.plan, alone=True)
    merged = with_adapters(base, done.model, done.plan, alone=False).merge_and_unload()
    assert torch.equal(merged.get_buffer(name), done.model.get_buffer(name))
    assert max_diff(logits(merged), logits(done.model)) <= 1e-5
