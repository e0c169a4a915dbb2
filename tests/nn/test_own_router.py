"""The router that a model has already: its logits are read for losses and metrics, its choices get a capacity."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import fx, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moecompile.errors import ConfigError, MoecompileError
from moecompile.nn import auxiliary_loss, forget_auxiliary_losses, update_balance
from moecompile.nn.own_router import own_routers
from moecompile.pipeline import compile_model, compile_with_report
from moecompile.torch_private import compile_whole
from tests.distributed import own_router_job as job
from tests.distributed.test_own_router import assert_equal
from tests.existing_models import moe_inputs, moe_model

CASES = {
    "softmax after top-k": job.Case(architecture="gpt_oss", capacity=0.8, padding="left"),
    "sigmoid, groups and a bias": job.Case(architecture="deepseek_v3", capacity=0.8, drop="score", padding="right"),
}
IDS = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CASES)
def test_losses_capacity_and_metrics_are_those_of_plain_torch(name: str) -> None:
    assert_equal(job.ours(CASES[name], ["data.mask_padding=always"]), job.reference(CASES[name]), CASES[name])


def _wrong_score(model: nn.Module) -> None:
    for _, router in own_routers(model):
        router.score = "sigmoid"


def _padding_counts(model: nn.Module) -> None:
    for _, router in own_routers(model):
        forward = router.forward
        router.forward = lambda ids, weights, real, forward=forward: forward(ids, weights)  # type: ignore[method-assign]


def _no_hooks(model: nn.Module) -> None:
    for _, router in own_routers(model):
        vars(router)["router"] = None


@pytest.mark.slow
@pytest.mark.parametrize("break_it", [_wrong_score, _padding_counts, _no_hooks])
def test_what_is_wrong_is_seen(break_it: Callable[[nn.Module], None]) -> None:
    case = CASES["softmax after top-k"]
    with pytest.raises((AssertionError, ValueError)):
        assert_equal(job.ours(case, ["data.mask_padding=always"], break_it=break_it), job.reference(case), case)


def compiled(architecture: str, *overrides: str, **changes: object) -> nn.Module:
    model = moe_model(architecture, **changes)
    return compile_model(model, list(overrides), example=moe_inputs(architecture, IDS)).train()


def test_the_models_own_loss_is_not_counted_twice() -> None:
    model = compiled("mixtral", "balance=aux", router_aux_loss_coef=0.02)
    labels = {"input_ids": IDS, "labels": IDS}
    model(**labels)  # without its own loss
    with pytest.raises(
        ConfigError, match=r"model\.config\.router_aux_loss_coef=0\.02: the model adds this loss of its"
    ):
        model(**labels, output_router_logits=True)
    model.eval()(**labels, output_router_logits=True)
    compiled("mixtral", "balance=none", router_aux_loss_coef=0.02)(**labels, output_router_logits=True)


def test_without_a_balance_the_loss_is_the_one_that_the_models_config_asks_for() -> None:
    """transformers' function, of each layer alone: the mean over the layers, and the same gradient of every router."""
    coefficient = 0.3
    model = compiled("mixtral", router_aux_loss_coef=coefficient, dtype=torch.float64)
    plain = moe_model("mixtral", router_aux_loss_coef=coefficient, dtype=torch.float64).train()
    model(IDS)
    loss = auxiliary_loss(model)
    assert loss is not None
    loss.backward()
    config = plain.config
    logits = plain(IDS, output_router_logits=True).router_logits
    of_layers = [
        load_balancing_loss_func((each,), config.num_local_experts, config.num_experts_per_tok) for each in logits
    ]
    wanted = coefficient * torch.stack(of_layers).mean()
    wanted.backward()
    assert len(of_layers) == 2
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)  # transformers counts in fp32
    for ours, theirs in zip(model.model.layers, plain.model.layers, strict=True):
        torch.testing.assert_close(ours.mlp.gate.weight.grad, theirs.mlp.gate.weight.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("architecture", "overrides", "losses", "said"),
    [
        ("mixtral", [], {"micro_batch": 0.001}, "=0.001: trained with balance.losses.micro_batch=0.001 a layer; balance=none"),
        ("mixtral", ["balance=none"], {}, None),
        ("mixtral", ["balance.losses.micro_batch=0"], {}, None),
        ("mixtral", ["balance.losses.global_batch=0.1"], {"global_batch": 0.1}, None),
        ("mixtral", ["balance.losses.z=0.1"], {"micro_batch": 0.001, "z": 0.1}, "=0.001: trained with"),
        (
            "mixtral", ["+per_layer.last.layers='1:'", "+per_layer.last.balance.losses.micro_batch=0.3"],
            {"micro_batch": 0.001}, "=0.001: trained with balance.losses.micro_batch=0.001 a layer",
        ),
        (
            "mixtral", ["adapters=lora"], {},
            "=0.001: not used (no load balance): the routers are frozen (adapters.train_router=false)",
        ),
        (
            "switch_transformers", [], {"z": 0.001},
            "router_aux_loss_coef=0.001: not used (no load balance): the router of "
            "encoder.block.1.layer.1.mlp.experts: it drops tokens itself, so what it chose before is not known",
        ),
    ],
)  # fmt: skip
def test_the_models_own_loss_is_planned_or_named(
    architecture: str, overrides: list[str], losses: dict[str, float], said: str | None
) -> None:
    found = compile_with_report(moe_model(architecture), overrides, example=moe_inputs(architecture, IDS))
    assert found.plan.layers[0].balance.losses == losses
    about = [note for note in found.notes if note.startswith("model.config.router_")]
    assert any(said in note for note in about) if said else not about


def test_a_copy_has_losses_of_its_own() -> None:
    model = compiled("mixtral", "balance=aux")
    copied = copy.deepcopy(model)
    copied(IDS)
    assert auxiliary_loss(copied) is not None and auxiliary_loss(model) is None
    forget_auxiliary_losses(copied)
    assert auxiliary_loss(copied) is None


def test_a_router_that_did_not_run_is_an_error() -> None:
    model = compiled("mixtral", "balance=aux")
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(MoecompileError, match="the module gate, whose logits are read, did not run before the experts"):
        experts(torch.zeros(3, 32), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))


@pytest.mark.slow
def test_losses_of_two_forwards_and_of_one_without_gradients() -> None:
    model = compiled("mixtral", "balance=aux", dtype=torch.float64)
    model(IDS)
    kept = auxiliary_loss(model)
    with torch.no_grad():
        model(IDS.flip(0))
    assert kept is not None and kept is not auxiliary_loss(model) and torch.equal(kept, auxiliary_loss(model))
    model.eval()(IDS)
    assert torch.equal(kept, auxiliary_loss(model))


@pytest.mark.slow
def test_a_frozen_router_still_has_losses_that_reach_what_is_below() -> None:
    model = moe_model("mixtral")
    model.model.layers[1].mlp.gate.weight.requires_grad_(False)
    compile_model(model, ["balance=aux"], example=moe_inputs("mixtral", IDS)).train()(IDS)
    loss = auxiliary_loss(model)
    assert loss is not None
    loss.backward()
    assert model.model.layers[0].mlp.experts.gate_up_proj.grad.abs().max() > 0


@pytest.mark.slow
def test_switch_has_a_z_loss_and_keeps_its_own_capacity() -> None:
    model = compiled("switch_transformers", "balance.losses.z=0.1")
    logits = []
    for module in model.modules():
        if hasattr(module, "classifier"):
            module.classifier.register_forward_hook(lambda m, a, out: logits.append(out))
    model(**moe_inputs("switch_transformers", IDS))
    wanted = sum(0.1 * each.logsumexp(-1).square().mean() for each in logits)
    assert float(auxiliary_loss(model).detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert all(load.entropy is not None for load in update_balance(model))
    for option, rule in {
        "balance.losses.micro_batch=0.1": "it drops tokens itself, so what it chose before is not known",
        "routing.capacity_factor=1.0": "has a capacity of its own",
    }.items():
        with pytest.raises(ConfigError, match=rule):
            compiled("switch_transformers", option)


def test_a_capacity_of_a_recipe_is_ignored_and_said() -> None:
    from moecompile.pipeline import compile_with_report

    done = compile_with_report(moe_model("mixtral"), ["recipe=switch_ep"], example=moe_inputs("mixtral", IDS))
    assert {layer.routing.capacity_factor for layer in done.plan.layers} == {None}
    (note,) = (note for note in done.notes if "capacity" in note)
    assert "routing.capacity_factor=1.25" in note and "you did not ask to drop its tokens" in note


def test_step_0_is_not_promised_with_a_capacity() -> None:
    from moecompile.pipeline import compile_with_report

    example = moe_inputs("mixtral", IDS)
    done = compile_with_report(moe_model("mixtral"), ["routing.capacity_factor=0.5"], example=example)
    assert done.step0.max_abs_diff is None
    assert done.step0.reason == "experts drop the tokens beyond their capacity"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at inputs that are no leaves
def test_other_lengths_compile_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and their gradients, of which that of sequences depends on the length, are those without compilation."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    losses = [f"balance.losses.{name}=0.1" for name in ("sequence", "micro_batch", "z")]
    plain = compiled("mixtral", *losses, dtype=torch.float64)
    model = copy.deepcopy(plain)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):  # put back what `compile_whole` sets
        for region in [module for module in model.modules() if isinstance(module, fx.GraphModule)]:
            compile_whole(region)
        for i, length in enumerate((7, 8, 9, 12, 5)):
            ids = torch.randint(1, 60, (2, length), generator=torch.Generator().manual_seed(i))
            found = []
            for each in (model, plain):
                with torch._dynamo.config.patch(error_on_recompile=i >= 3):
                    logits = each(ids).logits
                loss = auxiliary_loss(each)
                assert loss is not None
                each.zero_grad()
                (logits.square().mean() + loss).backward()
                found.append([loss.detach(), *(p.grad for p in each.parameters())])
            for got, wanted in zip(*found, strict=True):
                assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-12)
