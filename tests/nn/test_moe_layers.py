"""Rewritten layers with every kind of router: against transformers' blocks, against plain sums, per layer, in graphs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

import moecompile
from moecompile.errors import ConfigError
from moecompile.nn import auxiliary_loss, routers_of, set_random_key, update_balance
from moecompile.schema import PerLayerConfig
from tests.tiny import COPY4, Gated, TinyGPT, UpDown, config, ids, max_diff, randomize, tiny_llama, tokens, trace

F64 = torch.float64
ALL_LOSSES = {"micro_batch": 0.3, "sequence": 0.2, "global_batch": 0.1, "z": 0.01}
KINDS = {
    "softmax": [],
    "sigmoid with a bias rule": ["routing.score=sigmoid", "balance.rule=bias"],
    "softmax over the chosen": ["routing.score=softmax_after_topk", "routing.bias=true"],
    "switch": ["routing.top_k=1", "routing.normalize=false", "routing.capacity_factor=1.25"],
    "capacity by score": ["routing.capacity_factor=0.75", "routing.drop=score"],
    "expert choice": ["routing.choice=expert", "routing.normalize=false"],
    "jitter": ["routing.jitter=0.1"],
    "balanced": ["routing.workload=balanced"],
    "zipf": ["routing.workload=zipf"],
    "hot": ["routing.workload=hot", "routing.capacity_factor=1.0"],
    "drift": ["routing.workload=drift", "routing.groups=2", "routing.top_groups=1"],
    "shared gate": ["experts.num_shared=1", "experts.shared_gate=true"],
}


def compiled(ffn: nn.Module, *overrides: str, losses: dict[str, float] | None = None) -> fx.GraphModule:
    given = config(*COPY4, "balance.rule=none", *overrides)
    for name, coefficient in (losses or {}).items():
        setattr(given.balance.losses, name, coefficient)
    graph_module = moecompile.transform(trace(ffn), given)
    randomize(graph_module)
    return graph_module


def losses_of(name: str) -> dict[str, float]:
    return {"z": 0.01} if name == "expert choice" else ALL_LOSSES


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    inputs = x.clone().requires_grad_()
    out = module(inputs)
    aux = auxiliary_loss(module)
    (out.square().sum() + out.sum() + (0.0 if aux is None else 10 * aux)).backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return {"output": out.detach(), "input": inputs.grad, **grads}


# -- transformers' blocks ----------------------------------------------------------------------------------------------


def test_equals_switch_with_dropped_tokens() -> None:
    """Outputs and every gradient of transformers' layer, whose experts are ReLU FFNs without biases."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    settings = SwitchTransformersConfig(
        d_model=8, d_ff=16, num_experts=4, expert_capacity=5, router_bias=False, router_jitter_noise=0.0, dropout_rate=0.0,
        dense_act_fn="relu",
    )  # fmt: skip
    mine = compiled(UpDown(bias=False), "routing.top_k=1", "routing.normalize=false", "routing.capacity_factor=1.25")
    other = SwitchTransformersSparseMLP(settings)
    with torch.no_grad():
        other.router.classifier.weight.copy_(mine.router.weight)
        for i in range(4):
            other.experts[f"expert_{i}"].wi.weight.copy_(mine.experts.up_proj[i])
            other.experts[f"expert_{i}"].wo.weight.copy_(mine.experts.down_proj[i])
    x = tokens(16).unsqueeze(0)
    got, wanted = gradients(mine, x), gradients(other, x)
    assert mine.router.meter.sums[1] > 0
    for name in ("output", "input"):
        assert max_diff(got[name], wanted[name]) <= 1e-6
    assert max_diff(got["router.weight"], wanted["router.classifier.weight"]) <= 1e-6
    for i in range(4):
        for ours, theirs in (("up_proj", "wi"), ("down_proj", "wo")):
            assert max_diff(got[f"experts.{ours}"][i], wanted[f"experts.expert_{i}.{theirs}.weight"]) <= 1e-6


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_equals_qwen2_moe_with_its_gated_shared_expert(implementation: str) -> None:
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    settings = Qwen2MoeConfig(
        hidden_size=8, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=4, num_experts_per_tok=2,
        norm_topk_prob=False,
    )  # fmt: skip
    settings._experts_implementation = implementation
    mine = compiled(
        Gated(), "experts.init=random", "experts.granularity=2", "experts.num_shared=1", "experts.shared_gate=true",
        "routing.normalize=false",
    )  # fmt: skip
    renames = {"gate.weight": "router.weight", "shared_expert_gate.weight": "shared_experts.gate_weight"}

    def ours(name: str) -> str:
        return renames.get(name, name.replace("shared_expert.", "shared_experts."))

    other = Qwen2MoeSparseMoeBlock(settings)
    other.load_state_dict({name: mine.state_dict()[ours(name)] for name in other.state_dict()})
    x = tokens(14).view(2, 7, 8)
    got, wanted = gradients(mine, x), gradients(other, x)
    assert len(got) == len(wanted) == 2 + 7
    for name, value in wanted.items():
        assert max_diff(got[ours(name)], value) <= 2e-6 * max(1.0, float(value.abs().max())), name
        assert value.abs().max() > 0


# -- plain sums --------------------------------------------------------------------------------------------------------


def plain(module: fx.GraphModule, x: Tensor) -> Tensor:
    """Every token through every expert that the router gave it, one by one."""
    weights, chosen = module.router(x)
    rows, experts = x.reshape(-1, x.shape[-1]), module.experts
    out = []
    for t, row in enumerate(rows):
        total = torch.zeros_like(row)
        for k, expert in enumerate(chosen[t].tolist()):
            if expert < experts.num_experts:
                gate, up = (experts.gate_up_proj[expert] @ row).chunk(2)
                total = total + weights[t, k] * (experts.down_proj[expert] @ (F.silu(gate) * up))
        out.append(total)
    result = torch.stack(out).view_as(x)
    return result + module.shared_experts(x) if hasattr(module, "shared_experts") else result


@pytest.mark.parametrize("name", KINDS)
def test_equals_a_plain_sum(name: str) -> None:
    module, results = compiled(Gated().to(F64), *KINDS[name], losses=losses_of(name)), []
    set_random_key(module, 0, 0, 0)
    twin = copy.deepcopy(module)
    x = tokens(24, dtype=F64).view(2, 12, 8)
    results.append(gradients(module, x))
    forward = type("Plain", (nn.Module,), {"forward": lambda self, x: plain(twin, x)})()
    forward.twin = twin
    results.append({k.removeprefix("twin."): v for k, v in gradients(forward, x).items()})
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert max_diff(value, results[1][key]) <= 1e-12 * max(1.0, float(value.abs().max())), key
    assert results[0]["router.weight"].abs().max() > 0
    assert torch.equal(module.router.meter.load, twin.router.meter.load)


def test_a_token_that_every_expert_dropped_gets_nothing() -> None:
    """All tokens alike choose the same experts: those beyond the capacity come out as zeros, not as NaN."""
    module = compiled(Gated(), "routing.capacity_factor=0.5")
    out = module(torch.ones(8, 8))
    assert out[:2].abs().min() > 0
    assert torch.equal(out[2:], torch.zeros(6, 8))
    grads = gradients(module, torch.ones(8, 8))
    assert torch.equal(grads["input"][2:], torch.zeros(6, 8))
    assert all(value.isfinite().all() for value in grads.values())


# -- per layer ---------------------------------------------------------------------------------------------------------


def test_layers_with_settings_of_their_own_train_together() -> None:
    given = config("experts.num_routed=4", "routing.top_k=2", "balance.rule=none")
    given.balance.losses.z = 0.01
    given.per_layer = {
        "first": PerLayerConfig(
            layers=":1", experts={"num_routed": 6}, routing={"top_k": 3, "score": "sigmoid"},
            balance={"rule": "bias", "rate": 0.5},
        ),
        "last": PerLayerConfig(
            match="blocks.2.*", routing={"top_k": 1, "normalize": False, "capacity_factor": 0.75},
            balance={"losses": {"micro_batch": 0.1, "z": 0.0}},
        ),
    }  # fmt: skip
    model = moecompile.compile_model(TinyGPT(layers=3), given, example=ids())
    randomize(model)
    x = ids(2, 8)
    (model(x).square().mean() + auxiliary_loss(model)).backward()
    routers = [router for _, router in routers_of(model)]
    assert [(r.num_experts, r.config.top_k, r.config.score) for r in routers] == [
        (6, 3, "sigmoid"),
        (4, 2, "softmax"),
        (4, 1, "softmax"),
    ]
    assert [list(r.aux_losses) for r in routers] == [["z"], ["z"], ["micro_batch"]]
    assert all(parameter.grad is not None for parameter in model.parameters())
    loads = update_balance(model)
    assert [int(load.load.sum()) for load in loads] == [16 * 3, 16 * 2, 16]
    assert [load.dropped > 0 for load in loads] == [False, False, True]
    assert [bool(r.correction_bias.any()) for r in routers] == [True, False, False]


def test_expert_choice_on_a_language_model_is_refused() -> None:
    chosen = ["routing.choice=expert", "routing.normalize=false"]
    with pytest.raises(ConfigError, match=r"routing\.choice=expert.*this model is causal"):
        moecompile.compile_model(tiny_llama(), config(*COPY4, *chosen), example={"input_ids": ids()})
    given = config(*COPY4, *chosen, "routing.allow_future=true")
    model = moecompile.compile_model(tiny_llama(), given, example={"input_ids": ids()})
    assert model(ids()).logits.isfinite().all()


# -- graphs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_region_compiles_without_breaks(name: str) -> None:
    torch.compiler.reset()
    module = compiled(Gated(), *KINDS[name], losses=losses_of(name))
    set_random_key(module, 0, 0, 0)
    x, other = tokens(16).view(2, 8, 8), copy.deepcopy(module)
    wanted = gradients(module, x)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        fast = torch.compile(other, backend="aot_eager", fullgraph=True)
        got = gradients(fast, x)
    assert torch.equal(other.router.meter.load, module.router.meter.load)
    assert torch.allclose(other.router.meter.sums, module.router.meter.sums)
    assert other.router.aux_losses.keys() == module.router.aux_losses.keys()
    for key, value in wanted.items():
        assert torch.allclose(got[f"_orig_mod.{key}" if key not in ("output", "input") else key], value, atol=1e-5), key


def test_a_new_key_needs_no_new_compilation() -> None:
    torch.compiler.reset()
    module = compiled(Gated(), "routing.jitter=0.1", "routing.workload=drift")
    fast = torch.compile(module, backend="aot_eager", fullgraph=True)
    outputs = []
    with torch._dynamo.config.patch(error_on_recompile=False):
        set_random_key(module, 0, 0, 0)
        fast(tokens())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            set_random_key(module, 0, step, 0)
            outputs.append(fast(tokens()).detach())
    set_random_key(module, 0, 2, 0)
    assert torch.allclose(outputs[2], module(tokens()))
    assert not torch.allclose(outputs[1], outputs[2])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "retrace"])
def test_round_trips_compute_the_same(name: str, how: str) -> None:
    module = compiled(Gated(), *KINDS[name], losses=losses_of(name))
    set_random_key(module, 0, 0, 0)
    module(tokens())  # leaves losses behind
    module.eval()
    ways: dict[str, Any] = {
        "deepcopy": copy.deepcopy, "pickle": lambda g: pickle.loads(pickle.dumps(g)), "retrace": fx.symbolic_trace,
    }  # fmt: skip
    assert torch.equal(ways[how](module)(tokens()), module(tokens()))


@pytest.mark.parametrize("name", KINDS)
def test_fake_tensors_give_shapes(name: str) -> None:
    module = compiled(Gated(), *KINDS[name], losses=losses_of(name))
    with FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True), allow_non_fake_inputs=True) as mode:
        out = module(mode.from_tensor(tokens().view(2, 3, 8)))
    assert out.shape == (2, 3, 8)


@pytest.mark.parametrize("name", KINDS)
def test_on_the_meta_device(name: str) -> None:
    module = moecompile.transform(trace(Gated().to("meta")), config(*COPY4, *KINDS[name]))
    assert all(p.is_meta for p in module.parameters())
    assert module.router.meter.load.is_meta
