"""Llama 4's blocks, which scale what their experts read: called like others while they are captured, and for good where
they are rewritten."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moecompile import compile_model, make_plan
from moecompile.errors import ArgumentError, ConfigError
from moecompile.models.widen import moe_sites, widen_experts
from moecompile.nn.scaled_input import standard_calls

llama4 = pytest.importorskip("transformers.models.llama4.modeling_llama4")
ONE = ["mesh.ranks_per_node=1"]
IDS = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(0))
EXAMPLE = {"input_ids": IDS}


def built(**changes: Any) -> nn.Module:
    """Experts in the second and in the fourth layer."""
    settings = {
        "vocab_size": 64, "hidden_size": 24, "intermediate_size": 12, "intermediate_size_mlp": 32,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 32, "attention_chunk_size": 4, "num_local_experts": 4, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
    }  # fmt: skip
    model: nn.Module = llama4.Llama4ForCausalLM(llama4.Llama4TextConfig(**{**settings, **changes}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def blocks(model: nn.Module) -> list[Any]:
    return [layer.feed_forward for layer in model.model.layers[1::2]]  # type: ignore[union-attr, index]


@pytest.mark.parametrize("training", [False, True])
def test_a_block_inside_returns_and_differentiates_to_the_same(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # the sigmoid is in fp32, and rounds by the place of a row
    model = built().double().train(training)
    block, x = blocks(model)[0], torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)

    def run() -> list[Tensor]:
        out, logits = block(x)
        (out.square().sum() + logits.sin().sum()).backward()
        grads = [x.grad, *(parameter.grad for parameter in block.parameters())]
        x.grad = None
        block.zero_grad()
        return [out, logits, *grads]

    wanted = run()
    with standard_calls(model, EXAMPLE):
        got = run()
    assert all((a - b).abs().max() <= 1e-12 * b.abs().max() for a, b in zip(got, wanted, strict=True))


def test_a_plan_changes_nothing_and_a_rewritten_block_stays_changed() -> None:
    model = built()
    before, names = kinds(model), list(model.state_dict())
    plan = make_plan(model, ONE, example=EXAMPLE)
    assert kinds(model) == before
    assert [layer.site.score for layer in plan.layers] == ["sigmoid", "sigmoid"]
    with pytest.raises(ConfigError):
        compile_model(model, [*ONE, "experts.num_routed=7"], example=EXAMPLE)
    assert kinds(model) == before
    reference = copy.deepcopy(model)
    compile_model(model, [*ONE, "experts.match=model.layers.3.*"], example=EXAMPLE)
    assert [type(block) is llama4.Llama4TextMoe for block in blocks(model)] == [True, False]
    assert type(blocks(model)[0].experts) is llama4.Llama4TextExperts
    assert isinstance(blocks(model)[1], llama4.Llama4TextMoe)
    assert list(model.state_dict()) == names
    got, wanted = (each(IDS, labels=IDS, output_router_logits=True) for each in (copy.deepcopy(model), reference))
    assert (got.logits - wanted.logits).abs().max() <= 1e-5
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got.router_logits, wanted.router_logits, strict=True))


def test_its_code_has_no_loss_of_routers_that_would_count_twice() -> None:
    """It has a coefficient of one in its config all the same, and trains with it here."""
    model = compile_model(built().train(), ONE, example=EXAMPLE)
    loss = model(IDS, labels=IDS, output_router_logits=True).loss
    assert torch.allclose(loss, built()(IDS, labels=IDS).loss)


def test_on_the_meta_device_the_plan_is_the_same() -> None:
    meta = {name: tensor.to("meta") for name, tensor in EXAMPLE.items()}
    assert make_plan(built().to("meta"), ONE, example=meta).hash == make_plan(built(), ONE, example=EXAMPLE).hash


def test_more_experts_for_a_token_are_refused() -> None:
    """Each row would need a scale of its own before it is sent."""
    with pytest.raises(ConfigError, match="not called with hidden states"):
        compile_model(built(num_experts_per_tok=2), ONE, example=EXAMPLE)


def test_it_is_widened_with_one_expert_for_a_token() -> None:
    with pytest.raises(ArgumentError, match=r"top_k=scaled: .* scales what its experts read"):
        widen_experts(built(), 2, example=EXAMPLE)
    wide = widen_experts(built(), 2, example=EXAMPLE, top_k="kept")
    assert wide.reason is None and wide.max_abs_diff <= 1e-5
    assert [site.num_experts for site in moe_sites(wide.model, EXAMPLE)] == [8, 8]


def test_a_block_that_computes_something_else_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of transformers whose scores are others."""
    own = llama4.Llama4TextMoe.forward
    monkeypatch.setattr(llama4.Llama4TextMoe, "forward", lambda self, x: (own(self, x)[0] * 1.01, own(self, x)[1]))
    model = built()
    before = kinds(model)
    with pytest.raises(ConfigError, match="not called with hidden states"):
        compile_model(model, ONE, example=EXAMPLE)
    assert kinds(model) == before
