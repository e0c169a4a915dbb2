"""The programmatic API, end to end on one process."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable

import pytest
import torch
import yaml
from torch import Tensor, fx, nn
from torch.nn import functional as F

import moecompile
from moecompile.errors import CaptureError, ConfigError, PlanError
from moecompile.nn import Experts, Router, routers_of
from moecompile.passes.base import count_ops
from moecompile.pipeline import compile_with_report
from moecompile.plan import Plan, from_yaml, to_yaml
from moecompile.report.graphs import listing
from tests.tiny import (
    COPY4,
    Gated,
    TinyGPT,
    UpDown,
    config,
    ids,
    max_diff,
    randomize,
    text,
    tiny_deepseek,
    tiny_llama,
    tokens,
    trace,
)

COPY = config(*COPY4)
DEEPSEEK = config(
    "experts.init=virtual_group", "experts.granularity=4", "experts.num_shared=1", "experts.num_routed=6",
    "routing.top_k=3", "routing.score=sigmoid", "routing.scale=2.5",
)  # fmt: skip


def mlp() -> nn.Sequential:
    """A small regression network with one FFN."""
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class TwoFFNs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = UpDown(), Gated()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


class InOneModule(nn.Module):
    """Two FFNs whose linears all belong to one module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
        self.c, self.d = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(F.relu(self.a(x)))
        return x + self.d(F.gelu(self.c(x)))


# -- transform -------------------------------------------------------------------------------------------------------


def test_override_strings_compose_inside_the_call() -> None:
    graph_module = moecompile.transform(trace(mlp()), ["experts.num_routed=4", "routing.top_k=2", "balance=bias"])
    (layer,) = moecompile.plan_of(graph_module).layers
    assert (layer.experts.num_routed, layer.routing.top_k, layer.balance.rule) == (4, 2, "bias")
    with pytest.raises(moecompile.ConfigError, match=r"experts\.num_routde"):
        moecompile.transform(trace(mlp()), ["experts.num_routde=4"])


def test_a_transformed_graph_runs_trains_and_prints() -> None:
    graph_module = moecompile.transform(trace(mlp()), COPY)
    x, target = tokens(64), tokens(64, seed=1)
    optimizer = torch.optim.Adam(graph_module.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (graph_module(x) - target).square().mean()
        loss.backward()
        assert all(parameter.grad is not None for parameter in graph_module.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    assert "experts[Experts]" in listing(graph_module)
    assert "torch.ops.moecompile.permute" in graph_module.code
    assert "4 experts, 8 -> 16, up-down" in str(graph_module)


def test_the_input_is_untouched() -> None:
    graph_module = trace(mlp())
    before = (text(graph_module), graph_module.code, {k: v.clone() for k, v in graph_module.state_dict().items()})
    result = moecompile.transform(graph_module, COPY)
    optimizer = torch.optim.SGD(result.parameters(), lr=1.0)
    result(tokens()).square().sum().backward()
    optimizer.step()
    assert (text(graph_module), graph_module.code) == before[:2]
    assert all(torch.equal(value, before[2][name]) for name, value in graph_module.state_dict().items())
    assert not {p.data_ptr() for p in graph_module.parameters()} & {p.data_ptr() for p in result.parameters()}
    with pytest.raises(PlanError, match="holds 0 compiled models"):
        moecompile.plan_of(graph_module)


@pytest.mark.parametrize("build", [TwoFFNs, InOneModule, lambda: nn.Sequential(UpDown(), Gated(), UpDown())])
def test_several_ffns_in_one_graph(build: Callable[[], nn.Module]) -> None:
    """Also back to back, where one reads the other's output, and within one module."""
    model = build()
    graph_module = moecompile.transform(trace(model), COPY)
    plan = moecompile.plan_of(graph_module)
    assert len({layer.site.fqn for layer in plan.layers}) == len(plan.layers) == len(routers_of(graph_module)) >= 2
    assert max_diff(graph_module(tokens()), model(tokens())) <= 1e-5
    ops = count_ops(graph_module)  # gated ones are fused
    assert ops["permute"] + ops["sort_assignments"] == len(plan.layers)
    assert not any(isinstance(module, nn.Linear) for module in graph_module.modules())


def test_sites_of_one_module_are_told_apart() -> None:
    plan = moecompile.make_plan(trace(InOneModule()), COPY)
    assert [layer.site.fqn for layer in plan.layers] == ["@b", "@d"]
    graph_module = moecompile.transform(trace(InOneModule()), config(*COPY4, "experts.layers='1:'"))
    assert [layer.site.fqn for layer in moecompile.plan_of(graph_module).layers] == ["@d"]
    assert {name for name, _ in graph_module.named_children()} == {"a", "b", "router", "experts"}


def test_a_graph_without_an_ffn_comes_back_unchanged() -> None:
    graph_module = trace(nn.Sequential(nn.Linear(8, 8)))
    result = moecompile.transform(graph_module, COPY)
    assert moecompile.plan_of(result).layers == ()
    assert text(result) == text(graph_module)
    assert result is not graph_module


def test_training_flags_are_kept() -> None:
    assert not moecompile.transform(trace(mlp().eval()), COPY).training
    assert moecompile.transform(trace(mlp()), COPY).training


# -- a plan as input -------------------------------------------------------------------------------------------------


def test_a_plan_says_all_there_is_to_say() -> None:
    plan = moecompile.make_plan(trace(mlp()), DEEPSEEK)
    by_plan, by_config = (moecompile.transform(trace(mlp()), given) for given in (from_yaml(to_yaml(plan)), DEEPSEEK))
    assert text(by_plan) == text(by_config)
    assert moecompile.plan_of(by_plan) == plan
    for name, value in by_config.state_dict().items():
        assert torch.equal(by_plan.state_dict()[name], value), name


def edit(plan: Plan, change: Callable[[list[dict]], None]) -> Plan:
    body = yaml.safe_load(to_yaml(plan))
    change(body["layers"])
    return from_yaml(yaml.safe_dump(body))


def test_an_edited_plan_is_followed() -> None:
    def change(layers: list[dict]) -> None:
        layers[0]["routing"].update(top_k=1, score="sigmoid")
        del layers[1]

    model = TwoFFNs()
    plan = edit(moecompile.make_plan(trace(model), COPY), change)
    graph_module = moecompile.transform(trace(model), plan)
    ((name, router),) = routers_of(graph_module)
    assert (name, router.config.top_k, router.config.score) == ("first.router", 1, "sigmoid")
    assert isinstance(graph_module.second.down, nn.Linear)
    assert max_diff(graph_module(tokens()), model(tokens())) <= 1e-5


def test_layers_of_a_plan_may_stand_in_any_order() -> None:
    """Each layer gets its own numbers, though the plan lists them the other way round."""

    def change(layers: list[dict]) -> None:
        layers[1]["experts"]["num_routed"] = layers[1]["placement"]["num_experts"] = 8
        layers.reverse()

    plan = moecompile.make_plan(trace(TwoFFNs()), config(*COPY4, "mesh.ranks_per_node=2", "dispatch.kind=dedup"))
    graph_module = moecompile.transform(trace(TwoFFNs()), edit(plan, change))
    packs = [node for node in graph_module.graph.nodes if node.name.startswith("pack_rows")]
    assert [node.args[3] for node in packs] == [4, 8]
    assert graph_module.first.experts.num_experts, graph_module.second.experts.num_experts == (4, 8)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: nn.Sequential(nn.LayerNorm(8), UpDown()),
            "plan.layers=: the model has no FFN there. Plan again; it has ['1'].",
        ),
        (
            lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)),
            "plan.layers[the graph]=up_down 8x16 with bias_up, bias_down: the model has up_down 8x32 with bias_up, "
            "bias_down there. Plan again for this model.",
        ),
        (
            lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False)),
            "plan.layers[the graph]=up_down 8x16 with bias_up, bias_down: the model has up_down 8x16 with bias_up "
            "there. Plan again for this model.",
        ),
        (
            Gated,
            "plan.layers[the graph]=up_down 8x16 with bias_up, bias_down: the model has gated 8x16 there. Plan again "
            "for this model.",
        ),
        (lambda: nn.Sequential(nn.Linear(8, 8)), "plan.layers=: the model has no FFN there. Plan again; it has []."),
    ],
)
def test_a_plan_for_another_model_is_refused(other: Callable[[], nn.Module], message: str) -> None:
    plan = moecompile.make_plan(trace(mlp()), COPY)
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        moecompile.transform(trace(other()), plan)
    if type(other()) is Gated or len(moecompile.make_plan(trace(other()), COPY).layers) == 1:
        with pytest.raises(PlanError):
            moecompile.compile_model(other(), example=tokens(), plan=plan)


# -- make_plan and plan_of -------------------------------------------------------------------------------------------


def test_a_wrapper_that_answers_for_what_it_holds_is_not_a_second_compiled_model() -> None:
    module = nn.Module()
    model = moecompile.compile_model(nn.Sequential(UpDown(8, 16)), COPY4, example=torch.zeros(1, 8))
    module.model = torch.compile(model, backend="eager")  # its __getattr__ asks the model
    assert moecompile.plan_of(module) == moecompile.plan_of(model)


def test_make_plan_changes_nothing() -> None:
    model = tiny_llama()
    model.model.layers[0].eval()
    modules = {name: (type(m), m.training) for name, m in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    plan = moecompile.make_plan(model, COPY, example={"input_ids": ids()})
    assert [layer.site.fqn for layer in plan.layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert {name: (type(m), m.training) for name, m in model.named_modules()} == modules
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    with pytest.raises(PlanError, match="holds 0 compiled models"):
        moecompile.plan_of(model)


def test_a_graph_needs_no_example_and_a_module_does() -> None:
    assert moecompile.make_plan(trace(mlp()), COPY).layers
    with pytest.raises(CaptureError, match=r"make_plan needs example=\.\.\. for a module that is not a GraphModule"):
        moecompile.make_plan(mlp(), COPY)


def test_plan_of_finds_the_compiled_module_inside_another() -> None:
    compiled = moecompile.compile_model(TinyGPT(), COPY, example=ids())
    wrapper = nn.ModuleDict({"model": compiled, "loss": nn.CrossEntropyLoss()})
    assert moecompile.plan_of(wrapper) is moecompile.plan_of(compiled)
    both = nn.ModuleList([compiled, moecompile.compile_model(TinyGPT(), COPY, example=ids())])
    message = "model=ModuleList: holds 2 compiled models, one is needed. Call moecompile.compile_model on the one to be"
    with pytest.raises(PlanError, match=re.escape(message)):
        moecompile.plan_of(both)


def test_planning_works_on_the_meta_device() -> None:
    model = nn.Sequential(nn.LayerNorm(8), UpDown()).to("meta")
    compiled = compile_with_report(model, COPY, example=tokens().to("meta"))
    assert [layer.site.fqn for layer in compiled.plan.layers] == ["1"]
    assert (compiled.step0.max_abs_diff, compiled.step0.reason) == (None, "the model is on the meta device")
    assert all(parameter.is_meta for parameter in model.parameters())


# -- compile_model ---------------------------------------------------------------------------------------------------


def test_a_hand_written_gpt_is_compiled_in_place() -> None:
    model = TinyGPT(dropout=0.1).eval()
    wanted, kept = model(ids()), {id(p) for n, p in model.named_parameters() if ".mlp." not in n}
    compiled = compile_with_report(model, COPY, example=ids())
    assert compiled.model is model
    assert max_diff(model(ids()), wanted) <= 1e-5
    assert compiled.step0.max_abs_diff is not None
    assert compiled.step0.max_abs_diff <= 1e-5
    assert kept <= {id(p) for p in model.parameters()}
    assert [name for name, _ in routers_of(model)] == ["blocks.0.mlp.router", "blocks.1.mlp.router"]
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert [(site.fqn, site.kind, site.status) for site in compiled.sites] == [
        ("blocks.0.mlp", "up_down", "rewritten"), ("blocks.1.mlp", "up_down", "rewritten"),
    ]  # fmt: skip


def test_what_each_pass_did_is_recorded() -> None:
    compiled = compile_with_report(
        TinyGPT(), config(*COPY4, "mesh.ranks_per_node=2", "dispatch.kind=flat"), example=ids()
    )
    records = {record.name: record for record in compiled.records}
    assert list(records) == ["capture", "match", "build_plan", "rewrite", "lower", "fuse"]
    assert records["match"].detail == "2 dense FFNs"
    assert records["lower"].added["all_to_all"] == 4
    assert records["lower"].nodes_after - records["lower"].nodes_before == 2 * 10
    assert set(compiled.graphs) == {"captured", "rewritten", "lowered", "fused"}
    assert all(set(graphs) == {"blocks.0.mlp", "blocks.1.mlp"} for graphs in compiled.graphs.values())
    assert count_ops(compiled.graphs["captured"]["blocks.0.mlp"])["permute"] == 0


@pytest.mark.parametrize("until", ["rewrite", "lower"])
def test_until(until: str) -> None:
    model = moecompile.compile_model(
        TinyGPT(), config(*COPY4, "mesh.ranks_per_node=2", "dispatch.kind=flat"), example=ids(), until=until
    )
    assert count_ops(model.blocks[0].mlp)["all_to_all"] == {"rewrite": 0, "lower": 2}[until]


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^until=train: must be rewrite, lower or shard\. Use one of these\.$"):
        moecompile.compile_model(TinyGPT(), COPY, example=ids(), until="train")


def test_sites_that_were_not_selected_are_listed() -> None:
    compiled = compile_with_report(TinyGPT(layers=3), config(*COPY4, "experts.layers='1:2'"), example=ids())
    assert [(site.fqn, site.status, site.reason) for site in compiled.sites] == [
        ("blocks.0.mlp", "left", "not selected by experts.match and experts.layers"),
        ("blocks.1.mlp", "rewritten", ""),
        ("blocks.2.mlp", "left", "not selected by experts.match and experts.layers"),
    ]
    assert isinstance(compiled.model.blocks[0].mlp, nn.Sequential)


def test_near_misses_are_listed_with_their_reason() -> None:
    model = nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8))
    compiled = compile_with_report(model, COPY, example=tokens())
    assert compiled.model is model
    assert moecompile.plan_of(model).layers == ()
    ((site,)) = compiled.sites
    assert (site.fqn, site.status) == ("2", "not_matched")
    assert site.reason == "a bottleneck of 2 in 8 is an adapter, not an FFN"


def test_regions_that_cannot_be_traced_are_listed_with_their_reason() -> None:
    class Branches(UpDown):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    model = nn.Sequential(Branches(), UpDown())
    compiled = compile_with_report(model, COPY, example=tokens())
    refused = next(site for site in compiled.sites if site.status == "not_matched")
    assert refused.fqn == "0"
    assert refused.reason.startswith("cannot be traced: TraceError")
    assert [layer.site.fqn for layer in compiled.plan.layers] == ["1"]


def test_two_ffns_of_one_region_are_told_apart_by_their_last_linears() -> None:
    model = nn.Sequential(InOneModule(), UpDown())
    wanted = model(tokens())
    compiled = compile_with_report(model, COPY, example=tokens())
    assert [site.fqn for site in compiled.sites] == ["0@b.weight", "0@d.weight", "1"]
    assert {site.status for site in compiled.sites} == {"rewritten"}
    assert max_diff(compiled.model(tokens()), wanted) <= 1e-5
    assert not any(isinstance(module, nn.Linear) for module in compiled.model.modules())


def test_one_of_two_ffns_of_a_region_can_be_chosen() -> None:
    model = InOneModule()
    compiled = compile_with_report(model, config(*COPY4, "experts.match='*@d.weight'"), example=tokens())
    assert [(site.fqn, site.status) for site in compiled.sites] == [("@b.weight", "left"), ("@d.weight", "rewritten")]
    assert max_diff(compiled.model(tokens()), model(tokens())) <= 1e-5
    assert compiled.model.a is model.a


@pytest.mark.parametrize("build", [UpDown, Gated])
def test_when_the_whole_model_is_one_ffn_its_graph_is_returned(build: Callable[[], nn.Module]) -> None:
    model = build()
    wanted = model(tokens())
    result = moecompile.compile_model(model, COPY, example=tokens())
    assert isinstance(result, fx.GraphModule)
    assert max_diff(result(tokens()), wanted) <= 1e-5
    assert torch.equal(model(tokens()), wanted)
    assert moecompile.plan_of(result).layers[0].site.fqn == ""
    assert moecompile.plan_of(copy.deepcopy(result)) == moecompile.plan_of(result)


def test_a_compiled_model_cannot_be_compiled_again() -> None:
    model = moecompile.compile_model(TinyGPT(), DEEPSEEK, example=ids())
    with pytest.raises(PlanError, match=r"^model=TinyGPT: is compiled already\. Give a freshly built model\.$"):
        moecompile.compile_model(model, COPY, example=ids())
    with pytest.raises(PlanError, match=r"^model_or_graph=TinyGPT: is compiled already"):
        moecompile.make_plan(model, COPY, example=ids())
    assert len(moecompile.plan_of(model).layers) == 2


def test_a_transformed_graph_is_neither_planned_nor_transformed_again() -> None:
    moe = moecompile.transform(fx.symbolic_trace(UpDown()), COPY)
    for name, call in (("model_or_graph", moecompile.make_plan), ("graph_module", moecompile.transform)):
        with pytest.raises(PlanError, match=rf"^{name}=GraphModule: is compiled already"):
            call(moe, COPY)
    assert len(moecompile.plan_of(moe).layers) == 1


def test_a_module_with_two_names_is_replaced_under_both() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffns = nn.ModuleList([UpDown()] * 2)

        def forward(self, x: Tensor) -> Tensor:
            for ffn in self.ffns:
                x = x + ffn(x)
            return x

    model = Shared()
    wanted = model(tokens())
    moecompile.compile_model(model, COPY, example=tokens())
    assert model.ffns[0] is model.ffns[1]
    assert isinstance(model.ffns[1], fx.GraphModule)
    assert max_diff(model(tokens()), wanted) <= 1e-5


class Repeated(nn.Module):
    """One FFN that runs several times, as in ALBERT."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.ffn, self.times = Gated(), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x + self.ffn(x)
        return x


def test_what_is_counted_once_of_a_layer_that_runs_several_times_is_said() -> None:
    note = "ffn runs 3 times in one forward: rows, memory and seconds are planned for one run"
    losses = f"{note}, and balance losses are those of the last"
    for times, balance, wanted in ((3, "aux", [losses]), (3, "none", [note]), (1, "aux", [])):
        compiled = compile_with_report(Repeated(times), [*COPY4, f"balance={balance}"], example=tokens())
        assert [said for said in compiled.notes if "one forward" in said] == wanted


def test_hooks_of_a_region_stay_and_their_handles_work() -> None:
    model, calls = TinyGPT(layers=1), []
    mlp_module = model.blocks[0].mlp
    before = mlp_module.register_forward_pre_hook(lambda *_: calls.append("before"))
    mlp_module.register_forward_hook(lambda *_, **__: calls.append("after"), with_kwargs=True)
    mlp_module.register_full_backward_hook(lambda *_: calls.append("backward"))
    moecompile.compile_model(model, COPY, example=ids())
    calls.clear()
    model(ids()).sum().backward()
    assert calls == ["before", "after", "backward"]
    before.remove()
    calls.clear()
    model(ids())
    assert calls == ["after"]


def test_an_in_place_residual_after_the_ffn_trains() -> None:
    class AddsInPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = UpDown()

        def forward(self, x: Tensor) -> Tensor:
            y = self.ffn(x)
            y += x
            return y

    model = AddsInPlace()
    wanted = model(tokens())
    moecompile.compile_model(model, COPY, example=tokens())
    out = model(tokens())
    assert max_diff(out, wanted) <= 1e-5
    out.sum().backward()
    assert model.ffn.experts.down_proj.grad.abs().max() > 0


def test_the_seed_draws_the_router() -> None:
    def weight(*overrides: str) -> Tensor:
        model = moecompile.compile_model(TinyGPT(), config(*COPY4, *overrides), example=ids())
        return model.blocks[0].mlp.router.weight

    assert torch.equal(weight(), weight())
    assert not torch.equal(weight(), weight("seed=1"))


# -- transformers ----------------------------------------------------------------------------------------------------

MODELS = {"llama": tiny_llama, "deepseek_v3": tiny_deepseek}
BOTH = pytest.mark.parametrize("name", MODELS)


def compiled_model(name: str, given: object = DEEPSEEK) -> nn.Module:
    model = MODELS[name]().eval()
    return moecompile.compile_model(model, given, example={"input_ids": ids()})


@BOTH
@pytest.mark.parametrize("given", [COPY, DEEPSEEK], ids=["copy", "virtual groups"])
def test_logits_are_the_dense_ones_at_step_0(name: str, given: object) -> None:
    wanted = MODELS[name]().eval()(ids()).logits
    assert max_diff(compiled_model(name, given)(input_ids=ids()).logits, wanted) <= 1e-5


@BOTH
def test_generate_with_a_cache_equals_the_dense_model(name: str) -> None:
    prompt = ids(batch=1, length=4)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    model = compiled_model(name)
    wanted = MODELS[name]().eval().generate(prompt, **settings)
    assert torch.equal(model.generate(prompt, use_cache=True, **settings), wanted)
    assert torch.equal(model.generate(prompt, use_cache=False, **settings), wanted)
    assert all(router.meter.load.sum() == 0 for _, router in routers_of(model))


@BOTH
def test_train_and_eval_switch_every_module(name: str) -> None:
    model = compiled_model(name)
    for training in (True, False):
        model.train(training)
        assert {module.training for module in model.modules()} == {training}
        model(ids())
    loads = [int(router.meter.load.sum()) for _, router in routers_of(model)]
    assert loads == [ids().numel() * 3] * 2  # counted in training only


@BOTH
def test_weights_load_into_a_second_compiled_model(name: str) -> None:
    first, second = compiled_model(name), compiled_model(name)
    randomize(first, std=0.1)
    first.model.layers[0].mlp.router.correction_bias.fill_(0.25)
    assert max_diff(second(ids()).logits, first(ids()).logits) > 1e-3
    assert str(second.load_state_dict(first.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(second(ids()).logits, first(ids()).logits)
    assert not any(key.endswith(".load") for key in first.state_dict())


@BOTH
def test_a_deep_copy_is_independent(name: str) -> None:
    model = compiled_model(name)
    other = copy.deepcopy(model)
    wanted = model(ids()).logits
    assert torch.equal(other(ids()).logits, wanted)
    assert moecompile.plan_of(other) == moecompile.plan_of(model)
    randomize(other)
    assert torch.equal(model(ids()).logits, wanted)


@BOTH
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients_and_counts(name: str, use_reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = compiled_model(name).train()
        randomize(model, std=0.1)
        calls: list[int] = []
        model.model.layers[0].mlp.router.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
        assert len(calls) == 1 + checkpointing
        grads = {key: parameter.grad for key, parameter in model.named_parameters()}
        assert all(grad is not None for grad in grads.values())
        results.append((grads, [router.meter.load.tolist() for _, router in routers_of(model)]))
    (plain, loads), (checkpointed, loads_again) = results
    assert loads == loads_again
    for key, grad in plain.items():
        assert torch.allclose(grad, checkpointed[key], atol=1e-7), key


@BOTH
def test_a_compiled_model_trains(name: str) -> None:
    model = compiled_model(name).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_recipe_works_on_a_transformers_model() -> None:
    model = tiny_deepseek(intermediate_size=80, num_hidden_layers=3, first_k_dense_replace=3)
    moecompile.compile_model(model, ["recipe=deepseek_ep"], example={"input_ids": ids()}, until="rewrite")
    plan = moecompile.plan_of(model)
    assert [layer.site.fqn for layer in plan.layers] == ["model.layers.1.mlp", "model.layers.2.mlp"]  # the first stays
    assert isinstance(model.model.layers[1].mlp.router, Router)
    assert isinstance(model.model.layers[1].mlp.experts, Experts)


def test_the_plan_counts_the_parameters_that_the_model_gets() -> None:
    overrides = [
        "experts.num_routed=8", "experts.granularity=4", "experts.num_shared=2", "experts.shared_gate=true",
        "experts.init=virtual_group", "routing.top_k=2", "routing.bias=true",
    ]  # fmt: skip
    model = moecompile.compile_model(TinyGPT(), overrides, example=ids())
    estimate = moecompile.plan_of(model).estimate
    assert estimate is not None
    assert estimate.params_total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("build", [TinyGPT, lambda: nn.Sequential(InOneModule(), UpDown())])
def test_no_dense_weight_outlives_the_compilation(build: Callable[[], nn.Module]) -> None:
    """Not in the captured graphs that are kept to be shown, and not in the record of the forward."""
    model = build()
    example = ids() if isinstance(model, TinyGPT) else tokens()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    alive = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    compiled = compile_with_report(model, COPY, example=example)
    del model
    gc.collect()
    kept = {id(parameter) for parameter in compiled.model.parameters()}
    assert {name for name, reference in alive.items() if reference() is not None} == {
        names[i] for i in kept if i in names
    }
    assert sum(reference() is None for reference in alive.values()) == 8 if example.dtype == torch.int64 else 12
