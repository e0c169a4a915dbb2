"""Upcycling: at step 0 the MoE equals the dense FFN, in float64, wherever that is promised."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import moecompile
from moecompile.nn import Experts
from moecompile.passes.upcycle import step0_reason
from moecompile.pipeline import compile_with_report
from tests.models import COPY4, Gated, UpDown, config, max_diff, plan_for, tokens, trace

F64 = torch.float64

FORMS = {
    "gated": Gated,
    "gated with biases": lambda: Gated(bias=True),
    "up-down": lambda: UpDown(activation=F.gelu, bias=False),
    "up-down with biases": lambda: UpDown(activation=F.gelu),
    "bias up alone": lambda: nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8, bias=False)),
    "bias down alone": lambda: nn.Sequential(nn.Linear(8, 16, bias=False), nn.SiLU(), nn.Linear(16, 8)),
}


def virtual_group(granularity: int, num_shared: int, copies: int, groups_of_k: int) -> list[str]:
    routed = granularity - num_shared
    return [
        "experts.init=virtual_group", f"experts.granularity={granularity}", f"experts.num_shared={num_shared}",
        f"experts.num_routed={routed * copies}", f"routing.top_k={routed * groups_of_k}",
    ]  # fmt: skip


INITS = {
    "copy top-1": ["experts.num_routed=4", "routing.top_k=1"],
    "copy top-2": COPY4,
    "copy all": ["experts.num_routed=4", "routing.top_k=4"],
    "copy beside a shared expert": [*COPY4, "experts.num_shared=1"],
    "copy beside two shared experts": [*COPY4, "experts.num_shared=2"],
    "one virtual group": virtual_group(4, 0, 1, 1),
    "two virtual groups": virtual_group(4, 0, 2, 1),
    "three virtual groups, two chosen": virtual_group(4, 0, 3, 2),
    "virtual groups and a shared slice": virtual_group(4, 1, 3, 1),
    "virtual groups and a shared slice, two chosen": virtual_group(4, 1, 3, 2),
    "virtual groups and three shared slices": virtual_group(4, 3, 4, 2),
    "slices of one hidden unit": virtual_group(16, 4, 2, 1),
    "virtual groups within routing groups": [*virtual_group(4, 0, 4, 1), "routing.groups=2", "routing.top_groups=1"],
    "granularity 1": virtual_group(1, 0, 4, 2),
    "copy beside a gated shared expert": [*COPY4, "experts.num_shared=1", "experts.shared_gate=true"],
    "virtual groups and a gated shared slice": [*virtual_group(4, 1, 3, 2), "experts.shared_gate=true"],
}
SCORES = {
    "softmax": [],
    "sigmoid": ["routing.score=sigmoid"],
    "sigmoid, scale 2.5": ["routing.score=sigmoid", "routing.scale=2.5"],
    "softmax, scale 0.5": ["routing.scale=0.5"],
    "softmax over the chosen": ["routing.score=softmax_after_topk", "routing.normalize=false", "routing.bias=true"],
    "softmax over the chosen, scale 2.5": ["routing.score=softmax_after_topk", "routing.scale=2.5"],
    "jitter, which evaluation has not": ["routing.jitter=0.5"],
}


def transformed(model: nn.Module, overrides: list[str]) -> fx.GraphModule:
    return moecompile.transform(trace(model), config(*overrides))


@pytest.mark.parametrize(("form", "init"), list(itertools.product(FORMS, INITS)))
def test_step_0_equals_the_dense_ffn(form: str, init: str) -> None:
    model, x = FORMS[form]().to(F64), tokens(32, dtype=F64)
    for score in SCORES.values():
        compiled = transformed(model, [*INITS[init], *score]).eval()
        (layer,) = moecompile.plan_of(compiled).layers
        assert step0_reason(layer) is None
        assert max_diff(compiled(x), model(x)) <= 1e-10


@pytest.mark.parametrize("init", INITS)
def test_the_input_gradient_is_the_dense_one_too(init: str) -> None:
    model = Gated(bias=True).to(F64)
    compiled = transformed(model, [*INITS[init], "routing.score=sigmoid", "routing.scale=2.5"])
    grads = []
    for module in (model, compiled):
        x = tokens(dtype=F64).requires_grad_()
        module(x).square().sum().backward()
        grads.append(x.grad)
    assert max_diff(*grads) <= 1e-10


def test_experts_of_a_virtual_group_are_the_slices_in_order() -> None:
    model = UpDown(d_ff=8, bias=True)
    with torch.no_grad():
        model.up.weight.copy_(torch.arange(8.0).unsqueeze(1).expand(8, 8))
        model.up.bias.copy_(torch.arange(8.0) * 10)
        model.down.weight.copy_(torch.arange(8.0).expand(8, 8) + 1)
        model.down.bias.fill_(6.0)
    compiled = transformed(model, [*virtual_group(4, 1, 2, 1), "routing.scale=1.5"])
    experts, shared = compiled.experts, compiled.shared_experts
    # slices of two hidden units; slice 0 is the shared one, expert = copy * 3 + slice - 1
    assert experts.up_proj[:, :, 0].tolist() == [[2, 3], [4, 5], [6, 7]] * 2
    assert experts.up_proj_bias.tolist() == [[20, 30], [40, 50], [60, 70]] * 2
    assert experts.down_proj[:, 0].tolist() == [[6, 8], [10, 12], [14, 16]] * 2  # times 3 slices / scale 1.5
    assert experts.down_proj_bias.abs().max() == 0  # the shared expert bears it
    assert shared.up_proj.weight[:, 0].tolist() == [0, 1]
    assert shared.up_proj.bias.tolist() == [0, 10]
    assert shared.down_proj.weight[0].tolist() == [1, 2]
    assert shared.down_proj.bias.tolist() == [6.0] * 8


def test_without_a_shared_expert_the_first_slice_bears_the_down_bias() -> None:
    model = UpDown()
    compiled = transformed(model, [*virtual_group(4, 0, 2, 1), "routing.scale=2.0"])
    biases = compiled.experts.down_proj_bias
    for expert in range(8):
        wanted = model.down.bias * 2 if expert % 4 == 0 else torch.zeros(8)  # 4 slices / scale 2
        assert torch.equal(biases[expert], wanted)


def test_router_rows_are_equal_within_a_virtual_group_and_differ_between_two() -> None:
    weight = transformed(Gated(), virtual_group(4, 1, 3, 1)).router.weight
    by_group = weight.view(3, 3, 8)
    assert all(torch.equal(by_group[:, 0], by_group[:, i]) for i in (1, 2))
    assert len({tuple(row) for row in by_group[:, 0].tolist()}) == 3


def test_tokens_choose_virtual_groups_whole() -> None:
    compiled = transformed(Gated(), virtual_group(4, 0, 4, 2))
    _, ids = compiled.router(tokens(64))
    for row in ids.tolist():
        copies = [i // 4 for i in row]
        assert sorted(copies) == sorted([copies[0]] * 4 + [next(c for c in copies if c != copies[0])] * 4)


def test_a_shared_expert_beside_copies_starts_silent_and_can_learn() -> None:
    compiled = transformed(Gated(bias=True), [*COPY4, "experts.num_shared=1"])
    shared = compiled.shared_experts
    assert shared.down_proj.weight.abs().max() == shared.down_proj.bias.abs().max() == 0
    assert shared.up_proj.weight.abs().max() > 0
    compiled(tokens()).square().sum().backward()
    assert shared.down_proj.weight.grad.abs().max() > 0


def test_a_gated_shared_slice_is_doubled_and_its_gate_is_one_half() -> None:
    model = UpDown(d_ff=8)
    compiled = transformed(model, [*virtual_group(4, 1, 2, 1), "experts.shared_gate=true"])
    shared = compiled.shared_experts
    assert shared.gate_weight.abs().max() == 0
    assert torch.equal(shared.down_proj.weight, 2 * model.down.weight[:, :2])
    assert torch.equal(shared.down_proj.bias, 2 * model.down.bias)
    compiled(tokens()).square().sum().backward()
    assert shared.gate_weight.grad.abs().max() > 0  # it can learn


def test_the_routers_bias_starts_at_zero() -> None:
    assert transformed(Gated(), [*COPY4, "routing.bias=true"]).router.bias.tolist() == [0.0] * 4
    random = transformed(Gated(), [*COPY4, "routing.bias=true", "experts.init=random"])
    assert random.router.bias.tolist() == [0.0] * 4


def test_copies_are_independent_weights() -> None:
    model = Gated()
    experts = transformed(model, COPY4).experts
    with torch.no_grad():
        experts.down_proj[0].zero_()
    assert torch.equal(experts.down_proj[1], model.down.weight)


# -- where nothing is promised ----------------------------------------------------------------------------------------


def test_random_experts_have_the_spread_of_the_dense_weights() -> None:
    model = UpDown(d_model=64, d_ff=128)
    nn.init.normal_(model.up.weight, std=0.5)
    nn.init.normal_(model.down.weight, std=0.1)
    experts = transformed(model, [*COPY4, "experts.init=random"]).experts
    assert isinstance(experts, Experts)
    assert experts.up_proj.std().item() == pytest.approx(0.5, rel=0.05)
    assert experts.down_proj.std().item() == pytest.approx(0.1, rel=0.05)
    assert experts.up_proj_bias.abs().max() == experts.down_proj_bias.abs().max() == 0
    assert len({float(p.sum()) for p in experts.up_proj.detach()}) == 4


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["experts.init=random"], "experts are random"),
        (["routing.normalize=false"], "the routing weights of a token do not sum to a constant"),
        (["experts.init=random", "routing.normalize=false"], "experts are random"),
        (
            ["routing.top_k=1", "routing.normalize=false", "routing.capacity_factor=1.25"],  # Switch
            "the routing weights of a token do not sum to a constant",
        ),
        (["routing.capacity_factor=1.25"], "experts drop the tokens beyond their capacity"),
        (
            ["routing.choice=expert", "routing.normalize=false"],
            "experts choose tokens, so a token may have any number of them",
        ),
        (["routing.workload=zipf"], "the workload chooses the experts, not the router"),
    ],
)
def test_the_reason_is_given_and_no_difference(overrides: list[str], reason: str) -> None:
    (layer,) = plan_for(UpDown(), [*COPY4, *overrides]).layers
    assert step0_reason(layer) == reason
    compiled = compile_with_report(UpDown(), config(*COPY4, *overrides), example=tokens())
    assert (compiled.step0_max_abs_diff, compiled.step0_reason) == (None, reason)


def test_the_promise_is_measured_on_the_example() -> None:
    compiled = compile_with_report(UpDown(), COPY4, example=tokens())
    assert compiled.step0_reason is None
    assert compiled.step0_max_abs_diff is not None
    assert compiled.step0_max_abs_diff <= 1e-5
