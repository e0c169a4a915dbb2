"""A region is held against its module by what rounding explains: mistakes are refused, near ties of a router are not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moecompile.capture import Example, ModuleCall
from moecompile.errors import PassError
from moecompile.match.regions import Region
from moecompile.nn import Experts
from moecompile.nn.existing import WideWeights
from moecompile.passes import scaling
from moecompile.passes.agreement import agreements
from moecompile.passes.receipt import Comparison
from moecompile.passes.run import Graphs, on_one_device, replacements, run_passes
from moecompile.pipeline import compile_with_report, make_plan
from moecompile.pipeline.captured import capture_planned
from moecompile.plan import LayerPlan
from moecompile.report.text import NOT_COMPARED, step0_text
from moecompile.schema import Config
from moecompile.tasks.show import step0_fields
from tests.existing_models import moe_model
from tests.tiny import COPY4, TinyGPT, UpDown, config, ids, max_diff, tiny_llama

DTYPES = [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]
IDS = ids(2, 8, vocab=61)
SEEDS = 5


class Rewritten:
    """A model with the replacements of its regions, which are not in place yet."""

    def __init__(self, model: nn.Module, given: Config, example: Example) -> None:
        self.model, self.example = model.eval(), example
        captured = capture_planned(model, plan := make_plan(model, given, example=example), given, example)
        self.layers: dict[str, list[LayerPlan]] = captured.planned(plan.layers)
        self.regions: dict[str, Region] = {path: captured.regions[path] for path in self.layers}
        self.graphs: Graphs = replacements(model, self.regions, run_passes(on_one_device(0), self.regions, self.layers))

    def compare(self, changed: Graphs) -> None:
        """Raises if a region is refused; nothing is replaced then."""
        Comparison(self.example, self.regions, self.layers).replace(self.model, {**self.graphs, **changed})


def existing(dtype: torch.dtype, architecture: str, **changes: Any) -> Rewritten:
    return Rewritten(moe_model(architecture, dtype=dtype, **changes), config(), {"input_ids": IDS})


def dense(dtype: torch.dtype, *overrides: str, model: nn.Module | None = None) -> Rewritten:
    model = (model or tiny_llama()).to(dtype)
    return Rewritten(model, config(*COPY4, *overrides), {"input_ids": IDS})


# -- mistakes ---------------------------------------------------------------------------------------------------------


def stacks(graph: fx.GraphModule) -> dict[str, nn.Parameter]:
    """Weights and biases of the experts by their last name. Those of a model's own experts belong to the graph."""
    owner = next((module for module in graph.modules() if isinstance(module, Experts)), graph)
    return dict(owner.named_parameters(recurse=False))


@torch.no_grad()
def swap_experts(graph: fx.GraphModule) -> None:
    down = stacks(graph)["down_proj"]
    down[[0, 1]] = down[[1, 0]]


@torch.no_grad()
def exchange_gate_and_up(graph: fx.GraphModule) -> None:
    gate_up = stacks(graph)["gate_up_proj"]
    gate_up.copy_(torch.cat(gate_up.chunk(2, 1)[::-1], 1))


def percent_more(name: str, *, half: int | None = None, expert: int | slice = slice(None)) -> Any:
    @torch.no_grad()
    def change(graph: fx.GraphModule) -> None:
        weight = stacks(graph)[name][expert]
        (weight if half is None else weight.chunk(2, -2)[half]).mul_(1.01)

    return change


@torch.no_grad()
def random_percent(graph: fx.GraphModule) -> None:
    down = stacks(graph)["down_proj"]
    down.mul_(1 + 0.01 * torch.randn(down.shape, generator=torch.Generator().manual_seed(0)).to(down))


@torch.no_grad()
def wrong_expert(graph: fx.GraphModule) -> None:
    stacks(graph)["down_proj"][2].neg_()


@torch.no_grad()
def drop_bias_of_down(graph: fx.GraphModule) -> None:
    stacks(graph)["down_proj_bias"].zero_()


@torch.no_grad()
def drop_bias_of_up(graph: fx.GraphModule) -> None:
    biases = {name: bias for name, bias in stacks(graph).items() if name.endswith("up_proj_bias")}
    (bias,) = biases.values()
    bias.zero_()


class _NotNormalised(WideWeights):
    """The routing weights of a token sum to less than they should."""

    def forward(self, weights_TK: Tensor, hidden_TD: Tensor) -> Tensor:
        return super().forward(weights_TK, hidden_TD) * 0.97


def not_normalised(graph: fx.GraphModule) -> None:
    graph.wide_weights = _NotNormalised()


COMMON = {
    "two experts are swapped": swap_experts,
    "gate and up are exchanged": exchange_gate_and_up,
    "one expert is wrong": wrong_expert,
    "a percent more in every gate": percent_more("gate_up_proj", half=0),
    "a percent more in every up": percent_more("gate_up_proj", half=1),
    "a percent more in every down": percent_more("down_proj"),
    "a percent more in the gate of an expert": percent_more("gate_up_proj", half=0, expert=2),
    "a percent of noise in down": random_percent,
}
Mistake = Callable[[fx.GraphModule], None]


def assert_refused(rewritten: Rewritten, mistakes: Mapping[str, Mistake], message: str) -> None:
    """Each mistake in the last region alone is refused, by the name of its layer; without one, nothing is."""
    path = list(rewritten.graphs)[-1]
    fqn = rewritten.layers[path][0].site.fqn
    for name, mistake in mistakes.items():
        mistake(wrong := copy.deepcopy(rewritten.graphs[path]))
        with pytest.raises(PassError, match=message) as caught:
            rewritten.compare({path: wrong})
            pytest.fail(f"{name} is not seen")
        assert fqn in str(caught.value), name
    rewritten.compare({})


SAID = "outputs on the example are promised to stay but differ by .* of their size in (bfloat16|float32), and rounding"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mistakes_in_a_models_own_experts_are_refused(dtype: torch.dtype) -> None:
    assert_refused(existing(dtype, "mixtral"), {**COMMON, "routing weights are not normalised": not_normalised}, SAID)
    biases = {"the bias of down is gone": drop_bias_of_down, "the bias of up is gone": drop_bias_of_up}
    assert_refused(existing(dtype, "gpt_oss"), biases, SAID)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mistakes_in_experts_that_no_token_of_the_example_chose_are_refused(dtype: torch.dtype) -> None:
    settings = {"num_local_experts": 48, "num_experts_per_tok": 1}  # 16 tokens
    mistakes = {f"expert {e}": percent_more("down_proj", expert=e) for e in (0, 17, 30, 47)}
    assert_refused(existing(dtype, "mixtral", **settings), mistakes, SAID)
    settings = {"num_experts": 24, "expert_capacity": 64}  # ids are one-hot, experts are modules
    mistakes = {f"expert {e}": percent_more("down_proj", expert=e) for e in (0, 9, 23)}
    rewritten = Rewritten(
        moe_model("switch_transformers", dtype=dtype, **settings), config(),
        {"input_ids": IDS[:1], "decoder_input_ids": IDS[1:]},
    )  # fmt: skip
    assert_refused(rewritten, mistakes, SAID)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mistakes_in_copies_of_a_dense_ffn_are_refused(dtype: torch.dtype) -> None:
    unequal = "experts are promised to be copies of the dense FFN, but differ among themselves in |" + SAID
    mistakes: dict[str, Mistake] = {k: v for k, v in COMMON.items() if k != "two experts are swapped"}  # they are equal
    assert_refused(dense(dtype), mistakes, unequal)
    assert_refused(dense(dtype, "routing.scale=2.5"), mistakes, unequal)  # the copies are rounded again
    slices = ("experts.init=virtual_group", "experts.granularity=4", "experts.num_routed=12", "routing.top_k=3")
    assert_refused(dense(dtype, "experts.num_shared=1", *slices), COMMON, unequal)
    biases = {"the bias of down is gone": drop_bias_of_down, "the bias of up is gone": drop_bias_of_up}
    model = TinyGPT(vocab=61)
    assert_refused(Rewritten(model.to(dtype), config(*COPY4, "routing.scale=2.5"), {"ids": IDS}), biases, unequal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_that_is_forgotten_is_refused(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecompile.passes.upcycle.factors", lambda *_: scaling.Factors(1.0, 1.0, 1.0))
    with pytest.raises(PassError, match=SAID):
        compile_with_report(tiny_llama().to(dtype), config(*COPY4, "routing.scale=2.5"), example={"input_ids": IDS})


# -- what is no mistake -----------------------------------------------------------------------------------------------


def test_a_near_tie_of_a_router_is_shown_and_not_refused() -> None:
    """The second choice of every token in the last layer is a tie but for the rounding of the layer below."""
    model = moe_model(
        "deepseek_v3", dtype=torch.bfloat16, first_k_dense_replace=0, n_group=1, topk_group=1, n_routed_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    seen: list[Tensor] = []
    router, experts = model.get_submodule("model.layers.1.mlp.gate"), model.get_submodule("model.layers.1.mlp.experts")
    handle = router.register_forward_pre_hook(lambda _, args: seen.append(args[0].double().flatten(0, 1)))
    with torch.no_grad():
        before = model(IDS).logits
        handle.remove()
        (hidden_TD,) = seen
        always = torch.linalg.lstsq(hidden_TD, hidden_TD.new_full((16, 1), 4.0)).solution[:, 0]
        tied = torch.linalg.svd(hidden_TD).Vh[-1]  # orthogonal to all tokens
        router.weight = nn.Parameter(torch.stack([always, tied, -tied, -always]).float())
        experts.down_proj *= 4
        before = model(IDS).logits
    compiled = compile_with_report(model, config(), example={"input_ids": IDS}, until="rewrite")
    receipt = compiled.step0
    assert receipt.max_abs_diff is not None and receipt.max_abs_diff > 0.5
    assert receipt.regions_only and receipt.region_part is not None and receipt.region_part < 0.5
    with torch.no_grad():
        assert max_diff(model(IDS).logits.float(), before.float()) == pytest.approx(receipt.max_abs_diff)
    text = step0_text(step0_fields(compiled))
    assert text == (
        f"equals the model before layer by layer, and their outputs differ by {receipt.max_abs_diff:.1e}: rounding may "
        "send a token to other experts"
    )


class Noisy(TinyGPT):
    """Its own forward draws random numbers, also in evaluation mode."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 6 * torch.rand(())


class Counting(TinyGPT):
    """Every forward is another one."""

    count = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.count += 1
        return super().forward(ids) + self.count


def test_a_model_that_draws_random_numbers_is_compared_from_one_random_state() -> None:
    model = Noisy().eval()
    with torch.no_grad():
        assert max_diff(model(ids()), model(ids())) > 0.01
    state = torch.get_rng_state()
    receipt = compile_with_report(model, config(*COPY4), example=ids()).step0
    assert receipt.max_abs_diff is not None and receipt.max_abs_diff <= 1e-5
    assert torch.equal(torch.get_rng_state(), state)


def test_of_a_model_that_does_not_repeat_itself_no_equality_is_claimed() -> None:
    compiled = compile_with_report(Counting(), config(*COPY4), example=ids())
    receipt = compiled.step0
    assert receipt.max_abs_diff is None and receipt.promised_max_abs_diff is None
    said = "not compared: two forwards of the model itself from one random state differ by 1"
    assert receipt.reason == said and said.startswith(NOT_COMPARED)
    assert receipt.region_part is not None and receipt.region_part < 0.5  # its layers are compared all the same
    assert step0_text(step0_fields(compiled)) == said


class Scalar(nn.Module):
    """One region, with a single number at its end. stepped: the hidden units have the digits of bf16 alone, so that
    rounding moves one of them by a whole step, or not at all.
    """

    def __init__(self, stepped: bool) -> None:
        super().__init__()
        self.stepped, self.up, self.down, self.head = stepped, nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x))
        hidden = hidden.bfloat16().float() if self.stepped else hidden
        return self.head(self.down(hidden))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_chance_refuses_nothing(dtype: torch.dtype) -> None:
    """Single numbers, which may cancel, with steps and without, over many weights and inputs."""
    for seed in range(SEEDS):
        for stepped in (False, True)[: 1 + (dtype == torch.float32)]:
            torch.manual_seed(seed)
            x, model = torch.randn(1, 32).to(dtype), Scalar(stepped).to(dtype)
            receipt = compile_with_report(model, config(*COPY4, "routing.scale=1.7"), example=x).step0
            assert receipt.region_part is not None and receipt.region_part < 0.9, (seed, stepped)


def test_the_smallest_numbers_of_fp16_have_no_relative_error() -> None:
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model, x = UpDown(32, 64, bias=False), torch.randn(16, 32).half()
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 1e-3
            assert 0 < float(model(x.float()).abs().max()) < 1e-5
        receipt = compile_with_report(model.half(), config(*COPY4, "routing.scale=1.7"), example=x).step0
        assert receipt.region_part is not None and receipt.region_part < 0.9


def test_outliers_do_not_hide_a_mistake_elsewhere() -> None:
    """One token is a thousand times as large as the others, as the first of a text may be in a trained model."""
    model = UpDown(32, 64).to(torch.bfloat16)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x[0] *= 1000
    given = config("experts.num_routed=2", "routing.top_k=1")
    captured = capture_planned(model, plan := make_plan(model, given, example=x), given, x)
    region, layers = captured.regions[""], list(plan.layers)
    after = run_passes(on_one_device(0), {"": region}, {"": layers})[""].graph
    assert all(each.holds for each in agreements(region, after, ModuleCall((x,), {}), layers)[0])
    wrong_expert_of = stacks(after)["down_proj"]
    wrong_expert_of.data.mul_(1.01)
    assert not all(each.holds for each in agreements(region, after, ModuleCall((x,), {}), layers)[0])


class InBfloat16(nn.Module):
    """A region that refuses another dtype, as kernels of attention do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16:
            raise TypeError("this kernel takes bf16 alone")
        return x + self.down(F.relu(self.up(x)))


def test_a_region_that_does_not_run_in_fp32_is_compared_in_bf16_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 32).to(torch.bfloat16)
    compiled = compile_with_report(InBfloat16().to(torch.bfloat16), config(*COPY4), example=x)
    assert compiled.step0.region_part is not None and compiled.step0.region_part < 0.9
    (note,) = [note for note in compiled.notes if "float32" in note]
    assert note.startswith("the model does not run in float32, so step 0 is compared in the model's own dtype alone: ")
    monkeypatch.setattr("moecompile.passes.upcycle.factors", lambda *_: scaling.Factors(1.0, 1.0, 1.0))
    with pytest.raises(PassError, match=r"differ by .* of their size in bfloat16"):
        compile_with_report(InBfloat16().to(torch.bfloat16), config(*COPY4, "routing.scale=2.5"), example=x)


def test_under_autocast_rounding_is_that_of_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        receipt = compile_with_report(TinyGPT(), config(*COPY4), example=ids()).step0
    assert receipt.region_part is not None and receipt.region_part < 0.9


class Twice(nn.Module):
    """One FFN at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = UpDown(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.ffn(x) * 100)


def test_every_call_of_a_shared_layer_is_compared() -> None:
    """The mistake shows in large numbers alone, which the second call has."""
    model, x = Twice(), torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    rewritten = Rewritten(model, config(*COPY4), x)
    (path,) = rewritten.graphs
    wrong = copy.deepcopy(rewritten.graphs[path])
    handle = next(m for m in wrong.modules() if isinstance(m, Experts)).register_forward_pre_hook(
        lambda _, args: (args[0].clamp(-10, 10), *args[1:])
    )
    with pytest.raises(PassError, match=SAID):
        rewritten.compare({path: wrong})
    handle.remove()
    rewritten.compare({path: wrong})
