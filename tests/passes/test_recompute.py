"""Layers that compute again in backward: outputs and every gradient are those without, and nothing is sent again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moecompile
from moecompile.errors import ConfigError
from moecompile.passes.recompute import recompute
from moecompile.torch_private import keeping
from tests.existing_models import moe_inputs, moe_model

IDS = torch.randint(1, 60, (2, 10), generator=torch.Generator().manual_seed(3))
aten = torch.ops.aten


def normalized(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """As Mixtral's router does."""
    values /= values.sum(dim=-1, keepdim=True)
    return values, ids


def through_views(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    values[:, 0] *= 2
    values.view(-1)[1::3] += 1
    values.div_(values.sum(dim=-1, keepdim=True)).clamp_(max=0.7)
    return values, ids


def several_at_once(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    torch._foreach_mul_([values, values.detach().clone()], 3.0)
    return values, ids


def other_experts(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    ids.add_(1).remainder_(8)
    torch.mul(values.detach(), 2, out=values.detach())
    return values, ids


def untouched(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return values * 2, ids + 0


@pytest.mark.parametrize("write", [normalized, through_views, several_at_once, other_experts, untouched])
def test_results_are_kept_as_they_were_before_they_were_written_to(
    write: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """The second forward has other scores, so that by itself it would choose others."""
    x, seen = torch.randn(5, 8, requires_grad=True), []

    def run(x: Tensor) -> Tensor:
        values, ids = write(*(x.detach() + torch.randn_like(x)).softmax(-1).topk(3))
        seen.append((values.clone(), ids.clone()))
        return (values * x.gather(1, ids)).exp()

    kept = partial(keeping, {aten.topk.default})
    out = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False, context_fn=kept)
    out.sum().backward()
    (first, second) = seen
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("write", [normalized, through_views, several_at_once, untouched])
def test_gradients_are_those_without(write: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        values, ids = write(*(x @ w).softmax(-1).topk(3))
        return (values * x.gather(1, ids)).exp()

    kept = partial(keeping, {aten.topk.default})
    wanted = torch.autograd.grad(run(x).square().sum(), (x, w))
    again = checkpoint(run, x, use_reentrant=False, context_fn=kept)
    got = torch.autograd.grad(again.square().sum(), (x, w))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(got, wanted, strict=True))


# -- whole models --------------------------------------------------------------------------------------------------


def compiled(architecture: str) -> nn.Module:
    """In training mode, with its caches as they are by default: on."""
    model = moe_model(architecture, dtype=torch.float64)
    model.config.use_cache = True
    inputs = moe_inputs(architecture, IDS)
    return moecompile.compile_model(model, ["mesh.ranks_per_node=1"], example=inputs).train()


def loss_and_grads(model: nn.Module, architecture: str, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**moe_inputs(architecture, IDS), labels=IDS, **more).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) > 10
    return loss.detach(), grads


@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v3", "gpt_oss", "switch_transformers"])
def test_models_with_caches_that_are_on(architecture: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = compiled(architecture)
    loss, wanted = loss_and_grads(copy.deepcopy(model), architecture, use_cache=False)
    for checkpointing in ("full", "keep_exchanges"):
        for more in ({}, {"use_cache": True}, {"use_cache": False}):
            again = copy.deepcopy(model)
            recompute(again, moecompile.plan_of(again), checkpointing)
            got_loss, got = loss_and_grads(again, architecture, **more)
            assert torch.equal(got_loss, loss) and got.keys() == wanted.keys()
            assert all(torch.equal(grad, wanted[name]) for name, grad in got.items())
            assert capsys.readouterr().err.count("use_cache is off") == (more.get("use_cache") is not False)
            loss_and_grads(again, architecture, **more)
            assert "use_cache" not in capsys.readouterr().err  # said once
            assert again.config.use_cache


def test_without_gradients_the_cache_is_used() -> None:
    model = compiled("mixtral").eval()
    recompute(model, moecompile.plan_of(model), "keep_exchanges")
    with torch.no_grad():
        assert model(input_ids=IDS).past_key_values.get_seq_length() == IDS.shape[1]
    wanted = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False), wanted)


def test_a_cache_that_is_given_is_refused() -> None:
    model = compiled("mixtral")
    with torch.no_grad():
        filled = model(input_ids=IDS).past_key_values
    recompute(model, moecompile.plan_of(model), "full")
    with pytest.raises(ConfigError, match=r"^checkpointing=full: layers are computed again .*past_key_values a second"):
        model(input_ids=IDS, past_key_values=filled)
