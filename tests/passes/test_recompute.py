"""Layers that compute again in backward: outputs and every gradient are those without, and nothing is sent again."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moecompile
from moecompile.compose import compose_config
from moecompile.errors import ConfigError, PassError
from moecompile.passes.recompute import recompute
from moecompile.pipeline.captured import planning_facts
from moecompile.plan import Recomputed
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


# -- a budget ------------------------------------------------------------------------------------------------------


def with_parts(architecture: str) -> tuple[nn.Module, dict[str, dict[str, tuple[str, ...]]]]:
    """A compiled model in training mode, and the parts of its layers."""
    model = moe_model(architecture, dtype=torch.float64, num_hidden_layers=3)
    inputs = moe_inputs(architecture, IDS)
    config = compose_config(["mesh.ranks_per_node=1"])
    _, facts = planning_facts(model, config, inputs)
    compiled = moecompile.compile_model(model, config, example=inputs)
    return compiled.train(), {fact.path: dict(fact.parts) for fact in facts.layers}


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_any_parts_of_any_layers_have_the_same_gradients(architecture: str) -> None:
    model, parts = with_parts(architecture)
    loss, wanted = loss_and_grads(copy.deepcopy(model), architecture)
    sets = [("attention",), ("norms",), ("ffn",), ("attention", "norms"), ("attention", "norms", "ffn"), ("layer",)]
    for turn, sends in product(range(len(sets)), (False, True)):
        again, calls, recomputed = copy.deepcopy(model), Counter[str](), []
        for i, (path, of) in enumerate(parts.items()):
            chosen = sets[(turn + i) % len(sets)]
            modules = ("",) if chosen == ("layer",) else tuple(name for part in chosen for name in of[part])
            recomputed.append(Recomputed(parts=chosen, sends=sends, modules=modules, layers=(path,)))
            for name, module in again.get_submodule(path).named_children():
                module.register_forward_pre_hook(lambda *_, to=calls, key=f"{path}.{name}": to.update([key]))
        recompute(again, replace(moecompile.plan_of(again), recomputed=tuple(recomputed)), "budget")
        got_loss, got = loss_and_grads(again, architecture)
        assert torch.equal(got_loss, loss) and got.keys() == wanted.keys()
        assert all(torch.equal(grad, wanted[name]) for name, grad in got.items())
        # A layer as a whole calls its children again; a part that is wrapped has its hooks outside.
        twice = {key.rpartition(".")[0] for key, count in calls.items() if count == 2}
        assert twice == {path for each in recomputed if each.modules == ("",) for path in each.layers}


def test_an_input_that_was_changed_in_place_is_an_error() -> None:
    """torch looks at positional inputs alone, and attention has keywords."""
    model, parts = with_parts("mixtral")
    path, of = next(iter(parts.items()))
    chosen = Recomputed(parts=("attention",), sends=False, modules=of["attention"], layers=(path,))
    recompute(model, replace(moecompile.plan_of(model), recomputed=(chosen,)), "budget")
    seen: list[Tensor] = []
    attention = model.get_submodule(f"{path}.{of['attention'][0]}")
    attention.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True)
    loss = model(**moe_inputs("mixtral", IDS), labels=IDS).loss
    with torch.no_grad():
        seen[0].mul_(2)
    with pytest.raises(PassError, match=r"an input of a layer.*changed in place"):
        loss.backward()


def test_a_plan_of_another_model_is_refused() -> None:
    model, _ = with_parts("mixtral")
    other = Recomputed(parts=("attention",), sends=False, modules=("attn",), layers=("model.layers.0",))
    with pytest.raises(PassError, match=r"model.layers.0.attn.*no such module"):
        recompute(model, replace(moecompile.plan_of(model), recomputed=(other,)), "budget")


def test_what_is_written_in_place_is_looked_for_among_what_is_kept_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage of torch has an entry for every op: to look through it at each write is quadratic in the ops."""
    looked: list[set[int]] = []
    caching, _ = keeping([aten.topk.default])
    right = type(caching.storage).values  # type: ignore[attr-defined]

    class Storage(type(caching.storage)):  # type: ignore[attr-defined,misc]
        def values(self) -> Any:
            looked.append(set())
            return right(self)

    caching.storage = Storage(caching.storage.default_factory)  # type: ignore[attr-defined]
    with caching:
        written, kept = torch.zeros(4), torch.randn(4, 8).topk(2).values
        for _ in range(50):
            written.add_(1)
        assert looked == []
        kept.add_(1)
        assert len(looked) == 1
