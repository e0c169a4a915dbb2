"""Upcycling: at step 0 the MoE equals the dense FFN, in float64, wherever that is promised."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import moecompile
from moecompile.nn import Experts
from moecompile.passes.upcycle import step0_reason
from moecompile.pipeline import compile_with_report
from tests.tiny import COPY4, Gated, UpDown, config, max_diff, plan_for, tokens, trace

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
    "one expert of each slice": [*virtual_group(4, 0, 3, 1), "routing.even_groups=true"],
    "two of each slice, beside a shared one": [*virtual_group(4, 1, 3, 2), "routing.even_groups=true"],
    "copies in even groups": [*COPY4, "routing.groups=2", "routing.even_groups=true"],
    "granularity 1": virtual_group(1, 0, 4, 2),
    "copy beside a gated shared expert": [*COPY4, "experts.num_shared=1", "experts.shared_gate=true"],
    "a latent width as wide as the model": [*COPY4, "experts.latent_size=8"],
    "virtual groups in such a width": [*virtual_group(4, 1, 2, 1), "experts.latent_size=8"],
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


@pytest.mark.parametrize("even", [True, False])
def test_one_expert_of_each_slice_keeps_the_dense_ffn_whatever_the_router_learns(even: bool) -> None:
    """Copies of a slice are equal until experts are trained: then any one of each slice makes up the FFN, and no other set."""
    model, x = Gated(bias=True).to(F64), tokens(64, dtype=F64)
    compiled = transformed(model, [*virtual_group(4, 0, 3, 1), f"routing.even_groups={even}"]).eval()
    with torch.no_grad():
        compiled.router.weight.normal_(0.0, 1e-3, generator=torch.Generator().manual_seed(0))
    assert (max_diff(compiled(x), model(x)) < 1e-2 * model(x).abs().max()) == even
    _, ids = compiled.router(x)
    assert even == all(sorted(i // 3 for i in row) == [0, 1, 2, 3] for row in ids.tolist())


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


# -- how experts are scaled --------------------------------------------------------------------------------------------


class SquaredReLU(UpDown):
    """up -> relu -> square -> down."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


SWITCH = ["experts.num_routed=8", "routing.top_k=1", "routing.normalize=false"]
UNNORMALISED = {
    "switch": SWITCH,
    "deepseek_v2": [*virtual_group(4, 1, 4, 1), "routing.normalize=false"],
    "sigmoid": ["experts.num_routed=8", "routing.score=sigmoid", "routing.normalize=false", "routing.scale=2.0"],
}
ACTIVATIONS = {"gated": Gated, "relu": UpDown, "squared relu": SquaredReLU}


def output_ratio(model: nn.Module, overrides: list[str]) -> float:
    """Norm of the rewritten FFN's outputs over the dense one's, on tokens of unit variance."""
    x = tokens(512, 64, seed=3)
    with torch.no_grad():
        return float(transformed(model, overrides).eval()(x).norm() / model(x).norm())


@pytest.mark.parametrize("router", UNNORMALISED)
@pytest.mark.parametrize("form", ACTIVATIONS)
def test_expected_weights_start_routers_that_do_not_normalise_near_the_dense_ffn(form: str, router: str) -> None:
    torch.manual_seed(0)
    model = ACTIVATIONS[form](64, 256)
    ratio = {
        scaling: output_ratio(model, [*UNNORMALISED[router], f"experts.weight_scaling={scaling}"])
        for scaling in ("exact", "expected", "nvidia")
    }
    assert ratio["expected"] == pytest.approx(1, abs=0.05)
    # A router whose logits are not all alike gives the chosen experts more than 1 / E each.
    assert 1 < ratio["nvidia"] < 1.6
    if router != "sigmoid":
        assert ratio["exact"] < 0.6  # the factor of weights that sum to `scale`


@pytest.mark.parametrize(
    ("form", "share", "ins"), [("gated", 1 / 3, 1 / 3), ("relu", 1 / 2, 1 / 2), ("squared relu", 1 / 3, 1 / 3)]
)
def test_the_published_factor_is_spread_over_the_projections(form: str, share: float, ins: float) -> None:
    """(experts * slices / top_k) ** (1/3) for a gated silu and for squared relu, else ** (1/2), biases included."""
    model = ACTIVATIONS[form](bias=True)
    overrides = [*virtual_group(4, 0, 2, 1), "routing.normalize=false", "experts.weight_scaling=nvidia"]
    experts, factor = transformed(model, overrides).experts, 8 * 4 / 4
    down, first = experts.down_proj, getattr(experts, experts.in_name)
    wanted = model.gate if form == "gated" else model.up
    assert max_diff(down[1], model.down.weight[:, 4:8] * factor**share) <= 1e-6
    assert max_diff(first[1, :4], wanted.weight[4:8] * factor**ins) <= 1e-6
    assert max_diff(getattr(experts, f"{experts.in_name}_bias")[1, :4], wanted.bias[4:8] * factor**ins) <= 1e-6
    assert max_diff(experts.down_proj_bias[0], model.down.bias * factor) <= 1e-6


def test_an_activation_that_does_not_grow_is_not_scaled() -> None:
    model = UpDown(activation=torch.tanh)
    experts = transformed(model, [*SWITCH, "experts.weight_scaling=nvidia"]).experts
    assert torch.equal(experts.up_proj[0], model.up.weight)
    assert max_diff(experts.down_proj[0], model.down.weight * 8) <= 1e-6


@pytest.mark.parametrize("scaling", ["expected", "nvidia"])
def test_where_the_router_normalises_the_factor_is_the_exact_one(scaling: str) -> None:
    """relu lets a factor through, so that also the published spread keeps the sum."""
    model, x = UpDown(bias=False).to(F64), tokens(32, dtype=F64)
    overrides = [*virtual_group(4, 0, 3, 2), "routing.scale=2.5", f"experts.weight_scaling={scaling}"]
    assert max_diff(transformed(model, overrides).eval()(x), model(x)) <= 1e-10


def test_without_scaling_slices_count_as_little_as_their_weights() -> None:
    model, x = UpDown(bias=False).to(F64), tokens(32, dtype=F64)
    overrides = [*virtual_group(4, 0, 3, 1), "experts.weight_scaling=none"]
    assert max_diff(transformed(model, overrides).eval()(x), model(x) / 4) <= 1e-10


# -- drop-upcycling ----------------------------------------------------------------------------------------------------

DROP = [*COPY4, "experts.init=drop"]


def drawn_units(kept: Tensor, wanted: Tensor) -> list[int]:
    """Rows of `kept` that are not those of `wanted`."""
    return [i for i in range(wanted.shape[0]) if not torch.equal(kept[i], wanted[i])]


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_each_expert_draws_other_hidden_units_anew_and_keeps_the_rest(ratio: float) -> None:
    model = Gated(64, 128, bias=True)
    experts = transformed(model, [*DROP, f"experts.drop_ratio={ratio}"]).experts
    chosen = []
    for expert in range(4):
        gate, up = experts.gate_up_proj[expert].chunk(2)
        gate_bias, up_bias = experts.gate_up_proj_bias[expert].chunk(2)
        units = drawn_units(gate, model.gate.weight)
        assert len(units) == ratio * 128
        for kept, wanted in (
            (up, model.up.weight), (experts.down_proj[expert].T, model.down.weight.T),
            (gate_bias, model.gate.bias), (up_bias, model.up.bias),
        ):  # fmt: skip
            assert drawn_units(kept, wanted) == units
        assert torch.equal(experts.down_proj_bias[expert], model.down.bias)
        chosen.append(tuple(units))
    assert len(set(chosen)) == (4 if ratio < 1 else 1)


def test_drawn_entries_have_the_statistics_of_those_they_replace() -> None:
    model = UpDown(64, 512)
    nn.init.normal_(model.up.weight, mean=0.3, std=0.5)
    nn.init.normal_(model.down.weight, mean=-0.2, std=0.1)
    experts = transformed(model, [*DROP, "experts.drop_ratio=0.5"]).experts
    units = drawn_units(experts.up_proj[0], model.up.weight)
    for drawn, mean, std in ((experts.up_proj[0, units], 0.3, 0.5), (experts.down_proj[0][:, units], -0.2, 0.1)):
        assert drawn.mean().item() == pytest.approx(mean, abs=0.05 * std)
        assert drawn.std().item() == pytest.approx(std, rel=0.03)


def test_what_is_drawn_depends_on_the_seed_the_site_and_the_expert_alone() -> None:
    """Not on how many experts there are: so a rank may fill its own alone."""
    torch.manual_seed(0)
    model = nn.Sequential(UpDown(), UpDown())
    model[1].load_state_dict(model[0].state_dict())

    def experts(seed: int, num_routed: int) -> list[Tensor]:
        graph = transformed(model, [*DROP, f"experts.num_routed={num_routed}", f"seed={seed}"])
        return [graph.get_submodule(name).experts.up_proj for name in ("0", "1")]

    first, again, other = experts(0, 4), experts(0, 8), experts(1, 4)
    assert torch.equal(first[0], again[0][:4]) and torch.equal(first[1], again[1][:4])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])


def test_slices_are_dropped_within_themselves_and_the_shared_slice_is_kept() -> None:
    model = UpDown(64, 128)
    overrides = [*virtual_group(4, 1, 2, 1), "experts.init=drop", "experts.drop_ratio=0.25"]
    compiled = transformed(model, overrides)
    assert torch.equal(compiled.shared_experts.up_proj.weight, model.up.weight[:32])
    for expert in range(6):
        piece = model.up.weight[32 * (1 + expert % 3) :][:32]
        assert len(drawn_units(compiled.experts.up_proj[expert], piece)) == 8
    rows = compiled.router.weight.view(2, 3, 64)
    assert torch.equal(rows[:, 0], rows[:, 2])


def test_a_latent_width_loses_nothing_of_an_ffn_that_uses_no_more() -> None:
    """An FFN that reads and writes five of eight directions, in a latent width of five; its shared slice is as it was."""
    basis, _ = torch.linalg.qr(tokens(8, dtype=F64))
    inside = basis[:, :5] @ basis[:, :5].T
    model, x = Gated().to(F64), tokens(32, dtype=F64)
    with torch.no_grad():
        for linear in (model.gate, model.up):
            linear.weight.copy_(linear.weight @ inside)
        model.down.weight.copy_(inside @ model.down.weight)
    for init in (COPY4, virtual_group(4, 1, 2, 1)):
        compiled = transformed(model, [*init, "experts.latent_size=5"])
        assert max_diff(compiled(x), model(x)) <= 1e-10
        narrower = transformed(model, [*init, "experts.latent_size=4"])
        assert max_diff(narrower(x), model(x)) > 1e-4
        down, up = narrower.latent_down.weight, narrower.latent_up.weight
        assert max_diff(down @ down.T, torch.eye(4, dtype=F64)) <= 1e-10 and torch.equal(up, down.T)


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
        (["experts.latent_size=6"], "experts work in 6 of 8 dimensions"),
        (["experts.latent_size=8", "experts.latent_norm=true"], "the sum of the experts is normed"),
        (["routing.capacity_factor=1.25"], "experts drop the tokens beyond their capacity"),
        (
            ["routing.choice=expert", "routing.normalize=false"],
            "experts choose tokens, so a token may have any number of them",
        ),
        (["routing.workload=zipf"], "the workload chooses the experts, not the router"),
        (["experts.init=drop", "experts.drop_ratio=0.25"], "every expert reinitializes 0.25 of its hidden units"),
        (["routing.scale=2.0", "experts.weight_scaling=none"], "nothing makes up for the routing weights"),
        (["routing.scale=2.0", "experts.weight_scaling=nvidia"], "the inputs of the activation are scaled too"),
    ],
)
def test_the_reason_is_given_and_no_difference(overrides: list[str], reason: str) -> None:
    (layer,) = plan_for(UpDown(), [*COPY4, *overrides]).layers
    assert step0_reason(layer) == reason
    compiled = compile_with_report(UpDown(), config(*COPY4, *overrides), example=tokens())
    assert (compiled.step0.max_abs_diff, compiled.step0.reason) == (None, reason)


def test_the_promise_is_measured_on_the_example() -> None:
    compiled = compile_with_report(UpDown(), COPY4, example=tokens())
    assert compiled.step0.reason is None
    assert compiled.step0.max_abs_diff is not None
    assert compiled.step0.max_abs_diff <= 1e-5
