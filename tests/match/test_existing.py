"""Models that are MoE already: their experts become sites, their routers and the names of their weights stay."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import moecompile
from moecompile.capture import call_with
from moecompile.compose import compose_config, load_resolved, save_resolved
from moecompile.errors import ConfigError, PlanError
from moecompile.match.regions import Captured
from moecompile.match.sites import find_existing, record_model
from moecompile.nn import meters_of, update_balance
from moecompile.nn.existing import ExistingExperts
from moecompile.passes.base import count_ops
from moecompile.passes.prove import unproven
from moecompile.passes.rewrite import Rewrite
from moecompile.pipeline import compile_with_report, make_plan
from moecompile.plan import ExpertsSite, FFNSite, from_yaml, layer_on_one_device, to_yaml
from moecompile.planner.existing import notes
from moecompile.verify import worst
from tests.existing_models import CONFIGS, moe_inputs, moe_model, stacked
from tests.tiny import COPY4, TinyGPT, config, max_diff, passed

IDS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(3))
EXAMPLE = {"input_ids": IDS}
TWO_NODES = ["mesh.num_nodes=2", "mesh.ranks_per_node=2"]


def loss_and_grads(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, gradients of their mean square); a weight without a gradient has a zero one."""
    model.zero_grad()
    logits = model(**inputs).logits
    logits.square().mean().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return logits.detach(), grads


# -- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_outputs_and_every_gradient_equal_transformers(architecture: str, training: bool) -> None:
    model = moe_model(architecture)
    reference, inputs = copy.deepcopy(model), moe_inputs(architecture, IDS)
    compiled = compile_with_report(model, [], example=inputs)
    assert compiled.step0.max_abs_diff is not None and compiled.step0.max_abs_diff <= 1e-5
    wanted, wanted_grads = loss_and_grads(reference.train(training), inputs)
    got, got_grads = loss_and_grads(compiled.model.train(training), inputs)
    assert max_diff(got, wanted) <= 1e-5
    assert worst(got_grads, stacked(wanted_grads)) < (1e-4, "")


def test_another_weight_gives_another_output() -> None:
    """Else equality would say nothing: the experts that are compared are those that are computed."""
    model = moe_model("mixtral")
    before = model(**EXAMPLE).logits
    moecompile.compile_model(model, [], example=EXAMPLE)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.experts.down_proj").mul_(1.5)
    assert max_diff(model(**EXAMPLE).logits, before) > 1e-3


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_the_graph_owns_the_models_parameters_under_their_names(architecture: str) -> None:
    model = moe_model(architecture)
    names = list(model.state_dict())
    before = dict(model.named_parameters())
    moecompile.compile_model(model, [], example=EXAMPLE)
    assert list(model.state_dict()) == names
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    graph_module = model.get_submodule("model.layers.1.mlp.experts")
    assert isinstance(graph_module, fx.GraphModule)
    assert isinstance(graph_module.experts, ExistingExperts)
    assert not list(graph_module.experts.parameters())
    assert model.load_state_dict(moe_model(architecture).state_dict()) is not None


def test_a_saved_model_is_one_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = moe_model("mixtral")
    wanted = model(**EXAMPLE).logits
    moecompile.compile_model(model, [], example=EXAMPLE)
    model.save_pretrained(tmp_path)
    assert max_diff(AutoModelForCausalLM.from_pretrained(tmp_path)(**EXAMPLE).logits, wanted) <= 1e-5


def test_separate_experts_are_stacked_and_so_renamed() -> None:
    model = moe_model("switch_transformers")
    before = stacked(model.state_dict())
    compiled = compile_with_report(model, [], example=moe_inputs("switch_transformers", IDS))
    after = compiled.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {layer.site.form for layer in compiled.plan.layers} == {"modules"}
    assert "encoder.block.1.layer.1.mlp.experts.experts.up_proj" in after


def test_the_graph_is_a_load_meter_between_the_models_own_arguments_and_the_dispatch() -> None:
    compiled = compile_with_report(moe_model("gpt_oss"), [], example=EXAMPLE)
    graph_module = compiled.graphs["lowered"]["model.layers.0.mlp.experts"]
    placeholders = [node.target for node in graph_module.graph.nodes if node.op == "placeholder"]
    assert placeholders == ["hidden_states", "router_indices", "routing_weights"]
    ops = count_ops(graph_module)
    assert {op: ops[op] for op in ("meter", "permute", "experts", "unpermute")} == dict.fromkeys(
        ("meter", "permute", "experts", "unpermute"), 1
    )
    called = next(node for node in graph_module.graph.nodes if node.target == "experts")
    weights = ["gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"]
    assert [argument.target for argument in called.args[2:]] == weights


@pytest.mark.parametrize("kind", ["flat", "dedup"])
def test_lowered_experts_keep_their_weights_as_arguments(kind: str) -> None:
    overrides = ["mesh.ranks_per_node=2", f"dispatch.kind={kind}"]
    compiled = compile_with_report(moe_model("mixtral"), overrides, example=EXAMPLE)
    graph_module = compiled.graphs["lowered"]["model.layers.0.mlp.experts"]
    called = next(node for node in graph_module.graph.nodes if node.target == "experts")
    assert [argument.target for argument in called.args[2:]] == ["gate_up_proj", "down_proj"]
    assert count_ops(graph_module)["all_to_all"] == 2


def test_generate_gives_the_same_text() -> None:
    model = moe_model("mixtral")
    arguments: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    wanted = model.generate(IDS, **arguments)
    moecompile.compile_model(model, [], example=EXAMPLE)
    assert torch.equal(model.generate(IDS, **arguments), wanted)


def test_copies_and_training_flags() -> None:
    model = moe_model("deepseek_v3")
    moecompile.compile_model(model, ["balance.rule=bias"], example=EXAMPLE)
    again = copy.deepcopy(model)
    assert max_diff(again(**EXAMPLE).logits, model(**EXAMPLE).logits) == 0
    experts = again.get_submodule("model.layers.1.mlp.experts")
    assert experts.num_experts == 8  # what code around them may read stays
    assert experts.meter.balance.rate == 0.001
    assert not any(module.training for module in again.modules())
    again.train()
    assert all(module.training for module in again.modules())


def test_hooks_on_the_experts_still_run() -> None:
    model, calls = moe_model("mixtral"), []
    model.model.layers[0].mlp.experts.register_forward_hook(lambda *_: calls.append(1))
    moecompile.compile_model(model, [], example=EXAMPLE)
    calls.clear()
    model(**EXAMPLE)
    assert calls == [1]


def test_half_precision_models() -> None:
    model = moe_model("mixtral", num_hidden_layers=1).bfloat16()  # a second router might choose others by rounding
    wanted = model(**EXAMPLE).logits
    moecompile.compile_model(model, [], example=EXAMPLE)
    got = model(**EXAMPLE).logits
    assert got.dtype == torch.bfloat16
    assert max_diff(got, wanted) <= 0.02 * max_diff(wanted, torch.zeros_like(wanted))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_double_precision_is_kept(architecture: str) -> None:
    """Routers of transformers compute their weights in fp32; nothing else may be rounded so."""
    model, inputs = moe_model(architecture, dtype=torch.float64), moe_inputs(architecture, IDS)
    wanted, wanted_grads = loss_and_grads(copy.deepcopy(model), inputs)
    compiled = compile_with_report(model, [], example=inputs)
    got, grads = loss_and_grads(compiled.model, inputs)
    assert max_diff(got, wanted) <= 1e-12
    assert worst(grads, stacked(wanted_grads)) < (1e-6, "")  # the router's own backward is fp32


def test_ids_beyond_the_last_expert_are_dropped() -> None:
    """transformers marks the experts of other ranks by the id num_experts."""
    model = moe_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    ids, weights = torch.tensor([[0, 1], [4, 2], [3, 4], [4, 4], [1, 3]]), torch.full((5, 2), 0.5)
    wanted = experts(hidden, ids, weights)
    region, site = find_existing(record_model(model, EXAMPLE), Captured(), unproven)[0]
    graph_module = passed(region, layer_on_one_device(site), Rewrite()).graph
    assert max_diff(graph_module(hidden, ids, weights), wanted) <= 1e-5
    assert graph_module(hidden, ids, weights)[3].abs().max() == 0


# -- load and balance ------------------------------------------------------------------------------------------------


def test_the_load_is_counted_in_training_alone() -> None:
    model = moe_model("mixtral")
    moecompile.compile_model(model, [], example=EXAMPLE)
    assert [name for name, _ in meters_of(model)] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    model(**EXAMPLE)
    assert all(int(load.load.sum()) == 0 for load in update_balance(model))
    chosen: list[Tensor] = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda module, args, out: chosen.append(out[2]))
    model.train()(**EXAMPLE)
    first, second = update_balance(model)
    assert torch.equal(first.load, F.one_hot(chosen[0], 4).sum((0, 1)))
    assert first.tokens == second.tokens == IDS.numel()


@pytest.mark.parametrize("update", ["sign", "proportional"])
def test_the_rule_moves_the_models_own_bias(update: str) -> None:
    model = moe_model("deepseek_v3")
    overrides = ["balance.rule=bias", "balance.rate=0.01", f"balance.update={update}"]
    compiled = compile_with_report(model, overrides, example=EXAMPLE)
    assert compiled.plan.layers[0].balance.rule == "bias"
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    before = bias.clone()
    model.train()(**EXAMPLE)
    (load,) = update_balance(model)
    error = load.load.double().mean() - load.load
    step = error.sign() if update == "sign" else error / load.load.double().mean()
    assert max_diff(bias, before + (0.01 * step).float()) <= 1e-7
    assert step.abs().max() > 0


def test_without_the_rule_the_bias_stays() -> None:
    model = moe_model("deepseek_v3")
    moecompile.compile_model(model, [], example=EXAMPLE)
    before = model.model.layers[1].mlp.gate.e_score_correction_bias.clone()
    model.train()(**EXAMPLE)
    update_balance(model)
    assert torch.equal(model.model.layers[1].mlp.gate.e_score_correction_bias, before)


# -- which sites -----------------------------------------------------------------------------------------------------


def listed(sites: str) -> tuple[list[str], dict[str, tuple[str, str]]]:
    """(planned paths, the others with status and reason) of DeepSeek-V3 with one dense and one MoE layer."""
    overrides = [f"experts.sites={sites}", *COPY4]
    compiled = compile_with_report(moe_model("deepseek_v3"), config(*overrides), example=EXAMPLE)
    assert compiled.step0.max_abs_diff is not None and compiled.step0.max_abs_diff <= 1e-5
    others = {site.fqn: (site.status, site.reason) for site in compiled.sites if site.status != "rewritten"}
    return [layer.site.fqn for layer in compiled.plan.layers], others


SHARED = {
    "model.layers.1.mlp.shared_experts": (
        "not_matched",
        "lies in an MoE block that the model has already (a shared expert); name it by experts.match to rewrite it",
    )
}  # fmt: skip
DENSE, EXPERTS = "model.layers.0.mlp", "model.layers.1.mlp.experts"


def test_auto_and_existing_take_the_experts() -> None:
    for sites in ("auto", "existing"):
        reason = f"experts.sites={sites} takes the experts that the model has"
        assert listed(sites) == ([EXPERTS], {DENSE: ("left", reason), **SHARED})


def test_dense_takes_dense_ffns_and_leaves_the_shared_expert() -> None:
    reason = "experts.sites=dense takes dense FFNs alone"
    assert listed("dense") == ([DENSE], {EXPERTS: ("left", reason), **SHARED})


def test_a_shared_expert_that_is_named_is_rewritten() -> None:
    overrides = config("experts.sites=dense", "experts.match='*.shared_experts'", *COPY4)
    compiled = compile_with_report(moe_model("deepseek_v3"), overrides, example=EXAMPLE)
    assert [layer.site.fqn for layer in compiled.plan.layers] == ["model.layers.1.mlp.shared_experts"]
    assert compiled.step0.max_abs_diff is not None and compiled.step0.max_abs_diff <= 1e-5


def test_both_takes_both_in_model_order() -> None:
    assert listed("both") == ([DENSE, EXPERTS], SHARED)
    plan = make_plan(moe_model("deepseek_v3"), config("experts.sites=both", *COPY4), example=EXAMPLE)
    assert [type(layer.site) for layer in plan.layers] == [FFNSite, ExpertsSite]
    assert [layer.experts.num_routed for layer in plan.layers] == [4, 8]


def test_auto_takes_dense_ffns_where_there_are_no_experts() -> None:
    plan = make_plan(TinyGPT(), config(*COPY4), example=IDS % 31)
    assert all(isinstance(layer.site, FFNSite) for layer in plan.layers)
    with pytest.raises(ConfigError, match=r"^experts\.sites=existing: the model has no experts\. Use auto or dense\.$"):
        make_plan(TinyGPT(), config("experts.sites=existing"), example=IDS % 31)


def test_experts_are_selected_like_ffns() -> None:
    selected = config("experts.layers='1:'")
    compiled = compile_with_report(moe_model("mixtral"), selected, example=EXAMPLE)
    assert [(site.fqn, site.status) for site in compiled.sites] == [
        ("model.layers.0.mlp.experts", "left"), ("model.layers.1.mlp.experts", "rewritten"),
    ]  # fmt: skip


# -- what is refused -------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Experts in transformers' form; `forward` is its loop."""

    def __init__(self, num_experts: int = 4) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 12, 8) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(num_experts, 8, 6) * 0.3)
        self.act_fn = nn.SiLU()

    def one(self, x: Tensor, expert: int) -> Tensor:
        gate, up = (x @ self.gate_up_proj[expert].T).chunk(2, -1)
        return (self.act_fn(gate) * up) @ self.down_proj[expert].T

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            chosen = (weights * (ids == expert)).sum(1, keepdim=True)
            out = out + chosen * self.one(x, expert)
        return out


class Scaled(Stack):
    """What it computes is not what its weights alone say."""

    def one(self, x: Tensor, expert: int) -> Tensor:
        return 2 * super().one(x, expert)


class Noisy(Stack):
    """It computes something else in training mode."""

    def one(self, x: Tensor, expert: int) -> Tensor:
        return F.dropout(super().one(x, expert), 0.5, self.training)


class WithScale(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class Uneven(Stack):
    """One more expert projects up than down."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(5, 12, 8))


class OtherCall(Stack):
    """Every expert gets the same number of tokens, and ids are not needed."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.stack([self.one(rows, i) for i, rows in enumerate(x.chunk(4))]).flatten(0, 1)


class LearnedActivation(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.PReLU()


class Own(nn.Module):
    """An expert that is a module of its own; `between` is between its linears."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.up, self.between, self.down = nn.Linear(8, 6), between, nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(F.silu(self.up(x))))


class OwnExperts(nn.ModuleList):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        chosen = [(weights * (ids == e)).sum(1, keepdim=True) * expert(x) for e, expert in enumerate(self)]
        return torch.stack(chosen).sum(0)


class Times(nn.Module):
    """One number, or one for each hidden unit, learned or not."""

    def __init__(self, size: int, *, learned: bool = True) -> None:
        super().__init__()
        if learned:
            self.scale = nn.Parameter(torch.ones(size))
        else:
            self.register_buffer("scale", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Block(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.norm, self.gate, self.experts = nn.LayerNorm(8), nn.Linear(8, 4), experts

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if isinstance(self.experts, OtherCall):
            return self.experts(x)
        weights, ids = self.gate(x).softmax(-1).topk(2)
        return self.experts(x, ids, weights)


X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
REFUSED = {
    Scaled: "the recorded call gives other outputs than its gate_up_proj, down_proj explain",
    Noisy: "it computes something else in training mode",
    WithScale: "its parameter scale is not known",
    Uneven: "its weights are not stacked over the same experts: gate_up_proj (5, 12, 8), down_proj (4, 8, 6)",
    OtherCall: "it holds stacked weights, but is not called with hidden states (T, D), expert ids (T, K) and weights (T, K)",
    LearnedActivation: "its act_fn has weights of its own",
}  # fmt: skip


def test_experts_of_ones_own_in_the_same_form_are_taken() -> None:
    torch.manual_seed(0)
    model = Block(Stack())
    wanted = model(X)
    compiled = compile_with_report(model, [], example=X)
    assert [layer.site.fqn for layer in compiled.plan.layers] == ["experts"]
    assert max_diff(compiled.model(X), wanted) <= 1e-6


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_understood_is_refused_with_the_reason(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Block(kind())
    message = (
        f"experts.sites=auto: the model has experts already (experts), and they cannot be rewritten: {REFUSED[kind]}. "
        "Use experts.sites=dense to rewrite only its dense FFNs outside of MoE blocks."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make_plan(model, [], example=X)
    compiled = compile_with_report(model, ["experts.sites=dense"], example=X)
    assert [(site.fqn, site.kind, site.status, site.reason) for site in compiled.sites] == [
        ("experts", "experts", "not_matched", REFUSED[kind])
    ]


WITH_WEIGHTS: list[list[nn.Module]] = [
    [Times(6) for _ in range(4)],
    [Times(1) for _ in range(4)],
    [Times(1, learned=False) for _ in range(4)],
    [nn.LayerNorm(6)] * 4,
]


@pytest.mark.parametrize("between", WITH_WEIGHTS, ids=["each", "scalars", "buffers", "shared"])
def test_weights_inside_an_experts_activation_are_not_merged_into_one(between: list[nn.Module]) -> None:
    """One activation is for all rows of a stack: it would hold those of the first expert."""
    ((name, _), *_) = between[0].state_dict().items()
    rule = re.escape(f"its experts have weights between their linears (between.{name}), for which a stack has no rows")
    with pytest.raises(ConfigError, match=f"cannot be rewritten: {rule}"):
        make_plan(Block(OwnExperts(map(Own, between))), [], example=X)


def test_experts_without_such_weights_are_stacked() -> None:
    torch.manual_seed(0)
    model = Block(OwnExperts(Own(nn.GELU()) for _ in range(4)))
    wanted = model(X)
    compiled = compile_with_report(model, [], example=X)
    assert [layer.site.fqn for layer in compiled.plan.layers] == ["experts"]
    assert max_diff(compiled.model(X), wanted) <= 1e-6


def test_on_the_meta_device_only_declared_layouts_are_taken() -> None:
    with pytest.raises(ConfigError, match="its class does not declare the layout, and on the meta device it cannot be"):
        make_plan(Block(Stack()).to("meta"), [], example=X.to("meta"))


# -- the config beside the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("experts.num_routed=8", "experts.num_routed=8: {site} is in the model already, and the model has experts.num_routed=4"),
        ("++routing.top_k=1", "routing.top_k=1: {site} is in the model already, and the model has routing.top_k=2"),
        ("routing.score=sigmoid", "routing.score=sigmoid: {site} is in the model already, and the model determines that itself"),
        ("experts.init=random", "experts.init=random: {site} is in the model already, and the model determines that itself"),
        (
            "+per_layer={late: {routing: {top_k: 1}}}",
            "per_layer.late.routing.top_k=1: {site} is in the model already, and the model has routing.top_k=2",
        ),
        (
            "+per_layer.late={routing: {top_k: 1}}",
            "per_layer.late.routing.top_k=1: {site} is in the model already, and the model has routing.top_k=2",
        ),
    ],
)  # fmt: skip
def test_values_of_the_caller_are_refused(override: str, says: str) -> None:
    site = "model.layers.0.mlp.experts"
    message = f"{says.format(site=site)}. Leave it out."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make_plan(moe_model("mixtral"), [override], example=EXAMPLE)


def test_values_of_presets_and_recipes_are_ignored_and_listed() -> None:
    given = compose_config(["recipe=deepseek_ep", "balance=none", "experts.layers=':'", "routing.max_nodes=null"])
    assert given.given == ["balance", "experts.layers", "routing.max_nodes"]
    plan = make_plan(moe_model("deepseek_v3"), given, example=EXAMPLE)
    assert (plan.layers[0].experts.num_routed, plan.layers[0].routing.top_k) == (8, 3)
    assert notes(plan, given)[0] == (
        "read from the model: experts.num_routed=8 (config: 16), routing.top_k=3 (config: 4), "
        "routing.groups=4 (config: 2), routing.top_groups=2 (config: 1)"
    )


IGNORED = [
    (
        "mixtral", [*TWO_NODES], {"routing.max_nodes", "balance.rule"}, {"routing.max_nodes=1", "balance.rule=bias"},
    ),
    (
        "deepseek_v3", ["mesh.num_nodes=4", "experts.layers=':'"], {"routing.max_nodes"}, {"routing.max_nodes=1"},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "mesh", "ignored", "given"), IGNORED)
def test_what_the_models_router_cannot_keep_is_ignored_unless_the_caller_gave_it(
    architecture: str, mesh: list[str], ignored: set[str], given: set[str]
) -> None:
    composed = compose_config(["recipe=deepseek_ep", "mesh=cpu_1", "mesh.ranks_per_node=1", *mesh])
    plan = make_plan(moe_model(architecture), composed, example=EXAMPLE)
    said = notes(plan, composed)
    assert {re.match(r"ignored: ([\w.]+)=", note)[1] for note in said if note.startswith("ignored")} == ignored  # type: ignore[index]
    assert plan.layers[0].balance.rule == ("none" if architecture == "mixtral" else "bias")
    assert plan.layers[0].balance.losses == {"sequence": 0.0001}  # what the router allows is planned
    for value in given:
        overrides = ["recipe=deepseek_ep", "mesh=cpu_1", "mesh.ranks_per_node=1", *mesh, value]
        with pytest.raises(ConfigError, match=f"^{re.escape(value)}: the router of"):
            make_plan(moe_model(architecture), overrides, example=EXAMPLE)


def test_a_recipe_selects_layers_of_its_own_model_alone() -> None:
    model = moe_model("mixtral")
    layers = {}
    for chosen in ([], ["model=llama_nano"], ["model=llama_nano", "experts.layers='1:'"]):
        composed = compose_config(["recipe=deepseek_ep", "mesh=cpu_1", "balance=none", "routing=softmax_topk", *chosen])
        composed.routing.max_nodes = None
        plan = make_plan(model, composed, example=EXAMPLE)
        layers[len(chosen)] = len(plan.layers)
        said = [note for note in notes(plan, composed) if "experts.layers" in note]
        selects = "it selects FFNs of the recipe's own model"
        assert said == [f"ignored: experts.layers=1: ({selects})"] * (len(chosen) == 1)
    assert layers == {0: 1, 1: 2, 2: 1}


def test_with_dense_sites_beside_them_the_callers_values_are_for_those() -> None:
    overrides = ["experts.sites=both", "experts.num_routed=4", "routing.top_k=2"]
    plan = make_plan(moe_model("deepseek_v3"), overrides, example=EXAMPLE)
    assert [layer.experts.num_routed for layer in plan.layers] == [4, 8]


def test_what_the_caller_gave_is_kept_in_the_resolved_config(tmp_path: Path) -> None:
    """So the ranks of a launched task know it too."""
    given = compose_config(["experts.num_routed=4", "routing=deepseek_v3", "+per_layer={late: {layers: '1:'}}"])
    assert given.given == ["experts.num_routed", "per_layer.late.layers"]
    save_resolved(given, tmp_path / "resolved.yaml")
    assert load_resolved(tmp_path / "resolved.yaml").given == given.given
    with pytest.raises(ConfigError, match=r"^given=\['a\.b'\]: is filled in by the program\. Leave it out\.$"):
        compose_config(["given=[a.b]"])


@pytest.mark.parametrize(
    ("architecture", "overrides", "message"),
    [
        (
            "mixtral", ["mesh.ranks_per_node=8"],
            "mesh.ep=8: must divide the 4 experts of model.layers.0.mlp.experts. Use one of [1, 2, 4], or mesh.ep=search.",
        ),
        (
            "mixtral", [*TWO_NODES, "routing.max_nodes=1"],
            "routing.max_nodes=1: the router of model.layers.0.mlp.experts is the model's own (top-2 without groups) and "
            "lets a token reach 2 nodes. Use 2 or null, or a mesh whose EP group spans fewer nodes.",
        ),
        (
            "deepseek_v3", ["mesh.num_nodes=4", "routing.max_nodes=1"],
            "routing.max_nodes=1: the router of model.layers.1.mlp.experts is the model's own (2 of 4 groups) and lets a "
            "token reach 2 nodes. Use 2 or null, or a mesh whose EP group spans fewer nodes.",
        ),
        (
            "mixtral", ["balance=bias"],
            "balance.rule=bias: the router of model.layers.0.mlp.experts is the model's own and has no buffer "
            "e_score_correction_bias to update. Use balance=aux, or balance=none.",
        ),
        (
            "mixtral", ["balance.rule=quantile"],
            "balance.rule=quantile: the router of model.layers.0.mlp.experts is the model's own, and only routers that "
            "are made here solve for their bias. Use balance.rule=none.",
        ),
        (
            "deepseek_v3", ["balance.rule=quantile"],
            "balance.rule=quantile: the router of model.layers.1.mlp.experts is the model's own, and only routers that "
            "are made here solve for their bias. Use balance.rule=bias.",
        ),
        (
            "switch_transformers",
            ["+per_layer={first: {layers: ':1', balance: {losses: {z: 0.1, micro_batch: 0.5}}}}"],
            "per_layer.first.balance.losses.micro_batch=0.5: the router of encoder.block.1.layer.1.mlp.experts is the "
            "model's own, and it drops tokens itself, so what it chose before is not known. Use 0.",
        ),
        (
            "switch_transformers", ["routing.capacity_factor=1.0"],
            "routing.capacity_factor=1.0: the router of encoder.block.1.layer.1.mlp.experts is the model's own and has a "
            "capacity of its own. Use null, and set the model's own in model.config.",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_says_so(architecture: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make_plan(moe_model(architecture), overrides, example=moe_inputs(architecture, IDS))


@pytest.mark.parametrize(
    ("mesh", "note"),
    [
        (["mesh.num_nodes=4"], "1 on each of the 4 nodes of an EP group; a token reaches up to 2 of them"),
        (["mesh.num_nodes=2"], "2 on each of the 2 nodes of an EP group; a token may reach all of them"),
        (
            ["mesh.num_nodes=8"],
            "which do not fill the 8 nodes of an EP group evenly, so groups straddle nodes; a token reaches up to 3 of them",
        ),
        (["mesh.ranks_per_node=4"], None),
    ],
)  # fmt: skip
def test_what_the_models_groups_mean_on_the_mesh_is_said(mesh: list[str], note: str | None) -> None:
    given = config(*mesh)
    plan = make_plan(moe_model("deepseek_v3"), given, example=EXAMPLE)
    says = "each token may use 2 of the 4 expert groups"
    one_node = f"{says}; an EP group is on one node here, so this limits no traffic between nodes"
    assert notes(plan, given)[1:] == [f"{says}, {note}" if note else one_node]


def test_a_limit_that_the_models_groups_keep_is_accepted() -> None:
    plan = make_plan(moe_model("deepseek_v3"), config("mesh.num_nodes=4", "routing.max_nodes=2"), example=EXAMPLE)
    assert (plan.layers[0].routing.groups, plan.layers[0].routing.top_groups) == (4, 2)


# -- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_is_read_back_and_followed() -> None:
    model, wanted = moe_model("deepseek_v3"), moe_model("deepseek_v3")(**EXAMPLE).logits
    plan = make_plan(model, ["balance.rule=bias"], example=EXAMPLE)
    again = from_yaml(to_yaml(plan))
    assert (again, again.hash) == (plan, plan.hash)
    site = plan.layers[0].site
    assert isinstance(site, ExpertsSite)
    assert (site.num_experts, site.top_k, site.groups, site.top_groups, site.correction_bias) == (8, 3, 4, 2, True)
    compiled = compile_with_report(model, [], example=EXAMPLE, plan=again)
    assert moecompile.plan_of(compiled.model) == plan
    assert max_diff(model(**EXAMPLE).logits, wanted) <= 1e-5
    assert dict(meters_of(model))[site.fqn].balance.rate == 0.001


def test_a_plan_for_other_experts_is_refused() -> None:
    plan = make_plan(moe_model("mixtral"), [], example=EXAMPLE)
    message = (
        "plan.layers[model.layers.0.mlp.experts]=4 stacked experts 32x48 top-2: the model has 4 stacked experts 32x48 "
        "top-1 there. Plan again for this model."
    )
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        moecompile.compile_model(moe_model("mixtral", num_experts_per_tok=1), plan=plan, example=EXAMPLE)
    with pytest.raises(
        PlanError, match=r"^plan\.layers=model\.layers\.0\.mlp\.experts: the model has no experts there"
    ):
        moecompile.compile_model(moe_model("deepseek_v3"), plan=plan, example=EXAMPLE)


def test_a_plan_made_on_meta_is_the_plan_of_the_model_with_values() -> None:
    """For the published sizes that fit no machine."""
    with torch.device("meta"):
        shapes = moe_model("deepseek_v3")
    given = config("mesh.num_nodes=2")
    compiled = compile_with_report(shapes, given, example={"input_ids": IDS.to("meta")})
    assert compiled.plan == make_plan(moe_model("deepseek_v3"), given, example=EXAMPLE)
    assert (compiled.step0.max_abs_diff, compiled.step0.reason) == (None, "the model is on the meta device")
    assert count_ops(shapes.get_submodule("model.layers.1.mlp.experts"))["all_to_all"] > 0


def test_graphs_that_are_kept_to_be_shown_hold_no_weights() -> None:
    """Else a sharded model would keep the full experts alive."""
    compiled = compile_with_report(moe_model("mixtral"), ["mesh.ranks_per_node=2"], example=EXAMPLE)
    for stage in ("captured", "rewritten"):
        for graph_module in compiled.graphs[stage].values():
            assert all(parameter.is_meta for parameter in graph_module.parameters()), stage


def test_a_gradient_checkpointed_model_counts_once() -> None:
    model = moe_model("mixtral")
    moecompile.compile_model(model, [], example=EXAMPLE)
    wanted = loss_and_grads(model.train(), EXAMPLE)[1]
    update_balance(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    got = loss_and_grads(model, EXAMPLE)[1]
    assert worst(got, wanted) < (1e-5, "")
    assert [int(load.load.sum()) for load in update_balance(model)] == [2 * IDS.numel()] * 2


def test_the_example_may_have_any_form() -> None:
    model = Block(Stack())
    for example in (X, (X,), {"x": X}):
        assert call_with(model, example).shape == (8, 8)
        assert len(make_plan(model, [], example=example).layers) == 1
