"""Replayed routers choose what was recorded, with live weights: gradients flow, and shapes that do not fit are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moecompile
from moecompile.errors import ArgumentError, MoecompileError
from moecompile.nn.replay import NOT_RECORDED, record_routes, replay_layers, replay_routes
from moecompile.passes.recompute import recompute
from moecompile.pipeline import plan_of
from tests.existing_models import moe_inputs, moe_model
from tests.tiny import randomize, tiny_llama

IDS = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(0))
MODELS = ("mixtral", "deepseek_v3", "gpt_oss", "llama")


def compiled(name: str, *overrides: str) -> nn.Module:
    llama = name == "llama"
    model = tiny_llama().double() if llama else moe_model(name, dtype=torch.float64)
    options = ["experts.num_routed=4", "routing.top_k=2"] if llama else []
    moecompile.compile_model(model, [*options, *overrides], example={"input_ids": IDS})
    randomize(model)
    return model.train()


def logits_of(model: nn.Module) -> Tensor:
    out: Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def others(model: nn.Module, chosen: Tensor) -> Tensor:
    """Neighbouring experts of those chosen."""
    return (chosen + 1) % replay_layers(model)[0].num_experts


@pytest.mark.parametrize("name", MODELS)
def test_what_was_recorded_is_chosen_again(name: str) -> None:
    model = compiled(name)
    with record_routes(model) as routes:
        wanted = logits_of(model)
    chosen = routes.stacked()
    assert chosen.shape == (IDS.numel(), len(replay_layers(model)), replay_layers(model)[0].top_k)
    with replay_routes(model, chosen):
        assert torch.equal(logits_of(model), wanted)
    asked = others(model, chosen)
    with replay_routes(model, asked.view(2, 7, *asked.shape[1:]).to(torch.uint8)), record_routes(model) as again:
        changed = logits_of(model)
    assert torch.equal(again.stacked().sort(-1).values, asked.sort(-1).values)
    assert float((changed - wanted).detach().abs().max()) > 1e-3
    assert torch.equal(logits_of(model), wanted)  # outside, routers choose for themselves


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_live(name: str) -> None:
    """The derivative along a random change of the router equals a finite difference: no gradient is lost."""
    model = compiled(name)
    with record_routes(model) as routes:
        logits_of(model)
    asked = others(model, routes.stacked())
    path = "mlp.router.weight" if name in ("llama", "gpt_oss") else "mlp.gate.weight"
    (weight,) = [p for name, p in model.named_parameters() if name.endswith(f"layers.1.{path}")]
    direction = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(1))

    def loss() -> Tensor:
        with replay_routes(model, asked):
            return logits_of(model).sin().sum()

    @torch.no_grad()
    def shifted(by: float) -> float:
        weight.add_(direction, alpha=by)
        value = float(loss())
        weight.sub_(direction, alpha=by)
        return value

    loss().backward()
    assert weight.grad is not None
    slope = float((weight.grad * direction).sum())
    assert abs(slope) > 1e-2
    step = 1e-3  # transformers computes scores in fp32, also in a model of float64
    assert slope == pytest.approx((shifted(step) - shifted(-step)) / (2 * step), rel=1e-2)


def test_mixtral_with_given_experts_in_plain_torch() -> None:
    """Shares nothing with the code: softmax, gather, normalise, a loop over experts."""
    model = compiled("mixtral")
    block = model.model.layers[0].mlp
    asked = torch.randint(0, 4, (14, 1), generator=torch.Generator().manual_seed(2)) + torch.tensor([0, 1])
    asked = torch.stack((asked % 4, asked % 4), dim=1)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    with replay_routes(model, asked):
        got = block(x)
    probs = F.linear(x.view(14, 32), block.gate.weight).softmax(-1, dtype=torch.float32)
    weights = probs.gather(1, asked[:, 0])
    weights = weights / weights.sum(1, keepdim=True)
    wanted = torch.zeros(14, 32, dtype=torch.float64)
    experts = dict(block.experts.named_parameters())
    for token in range(14):
        for slot in range(2):
            expert = asked[token, 0, slot]
            gate, up = F.linear(x.view(14, 32)[token], experts["gate_up_proj"][expert]).chunk(2)
            wanted[token] += weights[token, slot] * F.linear(F.silu(gate) * up, experts["down_proj"][expert])
    torch.testing.assert_close(got.view(14, 32), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_tokens_without_a_record_choose_for_themselves(name: str) -> None:
    model = compiled(name)
    with record_routes(model) as routes:
        logits_of(model)
    live = routes.stacked()
    asked = others(model, live)
    asked[::2] = NOT_RECORDED
    asked[1] = 255  # what a file of uint8 has there
    with replay_routes(model, asked), record_routes(model) as again:
        logits_of(model)
    first = again.stacked()[:, 0].sort(-1).values
    wanted = torch.where((asked[:, 0] >= 0) & (asked[:, 0] < 4), asked[:, 0], live[:, 0]).sort(-1).values
    assert torch.equal(first, wanted)


@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_recomputed_layers_choose_the_same(name: str) -> None:
    def grads(model: nn.Module) -> tuple[dict[str, Any], int]:
        asked = torch.tensor([3, 1]).expand(IDS.numel(), 2, 2)
        with replay_routes(model, asked), record_routes(model) as routes:
            logits_of(model).sin().sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}, len(next(iter(routes.ids.values())))

    plain, again = compiled(name), compiled(name)
    recompute(again, plan_of(again), "full")
    (wanted, _), (got, forwards) = grads(plain), grads(again)
    assert forwards == 1  # a forward that is computed again is recorded once
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_padding_is_not_recorded() -> None:
    model = moe_model("mixtral", dtype=torch.float64)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    moecompile.compile_model(model, example={"input_ids": IDS, "attention_mask": mask})
    with record_routes(model) as routes:
        model(input_ids=IDS, attention_mask=mask, use_cache=False)
    assert ((routes.stacked() == NOT_RECORDED).all(-1).all(-1).view(2, 7) == ~mask.bool()).all()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(14, 3, 2, dtype=torch.int64), r"ids=\(14, 3, 2\): must be \(tokens, 2 layers, top-k\)"),
        (torch.zeros(14, 2, 3, dtype=torch.int64), r"ids=\(14, 3\): must be \(tokens, 2\) for model.layers.0"),
        (torch.rand(14, 2, 2), r"ids=torch.float32: must be whole numbers for model.layers.0"),
        (
            {"model.layers.0.mlp.experts": torch.zeros(14, 2, dtype=torch.int64)},
            "has no entry for model.layers.1.mlp.experts",
        ),
    ],
)
def test_shapes_that_do_not_fit(ids: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message), replay_routes(compiled("mixtral"), ids):
        pass


def test_a_forward_that_was_not_recorded_is_told() -> None:
    model = compiled("llama")
    with record_routes(model) as routes:
        pass
    with pytest.raises(MoecompileError, match=r"^forward 0 is not recorded: there are 0, in 2 layers$"):
        routes.stacked()
    with record_routes(model) as routes:
        logits_of(model)
    assert torch.equal(routes.stacked(-1), routes.stacked())
    with pytest.raises(MoecompileError, match=r"^forward 1 is not recorded: there are 1, in 2 layers$"):
        routes.stacked(1)


def test_another_number_of_tokens() -> None:
    model = compiled("llama")
    with (
        pytest.raises(MoecompileError, match="routes of 5 tokens are replayed, but 14 are routed"),
        replay_routes(model, torch.zeros(5, 2, 2, dtype=torch.int64)),
    ):
        logits_of(model)


def test_a_router_that_does_not_choose_by_topk_is_refused() -> None:
    model = moe_model("switch_transformers")
    inputs = moe_inputs("switch_transformers", IDS)
    moecompile.compile_model(model, example=inputs)
    with record_routes(model) as routes:
        model(**inputs)
    with (
        pytest.raises(MoecompileError, match=r"own router: 0 calls of torch.topk choose 1 of 4"),
        replay_routes(model, routes.stacked()),
    ):
        model(**inputs)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["routing.choice=expert", "routing.normalize=false", "routing.allow_future=true"], "experts choose tokens"),
        (["routing.workload=balanced"], "routing.workload=balanced chooses"),
    ],
)
def test_layers_without_a_choice(overrides: list[str], why: str) -> None:
    with pytest.raises(MoecompileError, match=f"cannot be recorded or replayed: {why}"):
        replay_layers(compiled("llama", *overrides))
